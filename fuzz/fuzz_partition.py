"""Fuzz what a guest can tell its hypervisor."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.partition_target", "fuzz_partition")
