"""Fuzz the bus: channel messages, single records, ring contents."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.targets", "fuzz_messages", "fuzz_decode", "fuzz_ring")
