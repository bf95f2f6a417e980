"""The body of ``fuzz/fuzz_services.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from simulated.targets import fuzz_filecopy, fuzz_services, fuzz_vss

MESSAGE = st.builds(
    lambda kind, size, transaction, flags, tail: (
        struct.pack("<IIHHHHHHIBBH", 1, 0, 3, 0, kind, 3, 0, size, 0, transaction, flags, 0) + tail
    ),
    st.integers(0, 8),
    st.integers(0, 60),
    st.integers(0, 4),
    st.integers(0, 7),
    st.binary(max_size=60),
)


@settings(max_examples=150)
@given(
    st.builds(
        lambda negotiated, pieces: (
            bytes([negotiated]) + b"".join(bytes([len(piece)]) + piece for piece in pieces)
        ),
        st.integers(0, 7),
        st.lists(MESSAGE | st.binary(max_size=100), max_size=6),
    )
)
def test_services(data: bytes) -> None:
    fuzz_services(data)


@settings(max_examples=150)
@given(
    st.builds(
        lambda first, pieces: (
            bytes([first]) + b"".join(bytes([len(piece)]) + piece for piece in pieces)
        ),
        st.integers(0, 3),
        st.lists(MESSAGE | st.binary(max_size=100), max_size=9),
    )
)
def test_filecopy(data: bytes) -> None:
    fuzz_filecopy(data)


@settings(max_examples=150)
@given(
    st.builds(
        lambda first, pieces: (
            bytes([first]) + b"".join(bytes([len(piece)]) + piece for piece in pieces)
        ),
        st.integers(0, 7),
        st.lists(MESSAGE | st.binary(max_size=100), max_size=9),
    )
)
def test_vss(data: bytes) -> None:
    fuzz_vss(data)
