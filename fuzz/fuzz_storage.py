"""Fuzz the storage controller."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.storage_targets", "fuzz_storage")
