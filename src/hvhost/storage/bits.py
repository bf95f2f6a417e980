"""Runs of bits that are alike."""

from __future__ import annotations

from collections.abc import Iterator


def runs(bits: int, count: int) -> Iterator[tuple[bool, int]]:
    """For each run of the lowest *count* bits, from the lowest: whether set, and how many."""
    while count:
        value = bits & 1
        other = ~bits if value else bits
        # The lowest bit that differs ends the run.
        length = min((other & -other).bit_length() - 1, count) if other else count
        yield bool(value), length
        bits >>= length
        count -= length
