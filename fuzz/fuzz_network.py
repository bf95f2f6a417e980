"""Fuzz the network adapter."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.targets", "fuzz_network")
