"""Fuzz disk images: VHDX and VHD."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.disk_targets", "fuzz_vhdx", "fuzz_vhd")
