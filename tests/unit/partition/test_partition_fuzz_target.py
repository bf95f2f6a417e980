"""The body of ``fuzz/fuzz_partition.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from simulated.partition_target import fuzz_partition

ADDRESSES = st.one_of(
    st.builds(
        lambda base, offset: (base + offset) % 2**64,
        st.sampled_from([0, 0x7F00, 0x8000, 1 << 32, (1 << 32) + 0x4000, 2**64 - 8]),
        st.integers(-260, 260),
    ),
    st.integers(0, 2**64 - 1),
)
STEPS = st.builds(
    lambda *values: struct.pack("<BBHQQ", *values),
    st.integers(0, 5),
    st.integers(0, 15),
    st.integers(0, 0xFFFF),
    ADDRESSES,
    ADDRESSES,
)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=20), st.binary(max_size=30))
def test_partition(steps: list[bytes], tail: bytes) -> None:
    fuzz_partition(b"".join(steps) + tail)
