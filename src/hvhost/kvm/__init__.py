"""/dev/kvm as typed Python objects, over one of two transports: local (ioctl) and rig (remote)."""
