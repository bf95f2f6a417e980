"""The body of ``fuzz/fuzz_network.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from simulated.netvsc import nvsp, rndis_packet
from simulated.targets import fuzz_network

NVSP = st.builds(
    nvsp,
    st.sampled_from([1, 100, 101, 103, 104, 106, 107, 108, 125, 129, 133, 134]),
    st.integers(0, 40) | st.integers(0, 2**32 - 1),
    st.integers(0, 40) | st.integers(0, 2**32 - 1),
)
FRAME = st.builds(
    lambda data, kind, value: rndis_packet(data, (kind, value)),
    st.binary(max_size=120),
    st.sampled_from([0, 2, 6, 8, 0x80000001]),
    st.integers(0, 2**32 - 1),
)
REQUEST = st.builds(
    lambda kind, oid, size, offset, data: (
        struct.pack("<7I", kind, 28 + len(data), 1, oid, size, offset, 0) + data
    ),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from(
        [0x10114, 0x1010E, 0x1010103, 0x10204, 0x10203, 0x1021B, 0xFC01020C, 0xFC01020D]
    ),
    st.integers(0, 60),
    st.integers(0, 60),
    st.binary(max_size=80),
)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 31),
    st.lists(NVSP | FRAME | REQUEST | st.binary(max_size=50), max_size=10).map(
        lambda pieces: b"".join(bytes([len(piece)]) + piece for piece in pieces)
    ),
)
def test_network(first: int, data: bytes) -> None:
    fuzz_network(bytes([first]) + data)
