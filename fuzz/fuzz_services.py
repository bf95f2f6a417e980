"""Fuzz the integration services: all of them, a file being copied, snapshots."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.targets", "fuzz_services", "fuzz_filecopy", "fuzz_vss")
