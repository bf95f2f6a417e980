"""Fuzz what the probe in a guest answers."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.probe_target", "fuzz_probe")
