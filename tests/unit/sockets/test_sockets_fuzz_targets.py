"""The body of ``fuzz/fuzz_sockets.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from simulated.targets import fuzz_sockets

PACKET = st.builds(
    lambda kind, size, data: struct.pack("<II", kind, size) + data,
    st.sampled_from([1, 1, 1, 0, 2]),
    st.integers(0, 40) | st.integers(0, 2**32 - 1),
    st.binary(max_size=40),
)


@settings(max_examples=150)
@given(
    st.lists(PACKET | st.binary(max_size=50), max_size=12).map(
        lambda pieces: b"".join(bytes([len(piece)]) + piece for piece in pieces)
    )
)
def test_sockets(data: bytes) -> None:
    fuzz_sockets(data)
