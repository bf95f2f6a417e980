"""Storage: virtual disks, and the SCSI controller that gives them to the guest."""
