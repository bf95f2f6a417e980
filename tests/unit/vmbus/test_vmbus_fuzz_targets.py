"""The bodies of ``fuzz/fuzz_vmbus.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from simulated.targets import fuzz_decode, fuzz_messages, fuzz_ring

# Messages that start like real ones, so that most get past the first check.
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 4096, 8192, 0x50003, 2**32 - 1])
MESSAGE = st.builds(
    lambda kind, words, tail: struct.pack(f"<II{len(words)}I", kind, 0, *words) + tail,
    st.integers(0, 26),
    st.lists(NUMBERS, max_size=10),
    st.binary(max_size=150),
)
MESSAGES = st.lists(MESSAGE | st.binary(max_size=255), max_size=20).map(
    lambda pieces: b"".join(bytes([len(piece[:255])]) + piece[:255] for piece in pieces)
)


@given(MESSAGES | st.binary(max_size=2000))
def test_messages(data: bytes) -> None:
    fuzz_messages(data)


@given(st.binary(max_size=300))
@example(b"")
def test_decoding(data: bytes) -> None:
    fuzz_decode(data)


DESCRIPTOR = st.builds(
    lambda kind, offset8, length8, flags, tail: (
        struct.pack("<HHHHQ", kind, offset8, length8, flags, 7) + tail
    ),
    st.integers(0, 14),
    st.integers(0, 8),
    st.integers(0, 40),
    st.integers(0, 1),
    st.binary(max_size=60),
)
WORDS = st.lists(
    st.integers(0, 12400) | st.sampled_from([0, 2**32 - 1]), min_size=8, max_size=8
).map(lambda words: struct.pack("<8I", *words))


@settings(max_examples=200)
@given(
    st.builds(
        lambda flags, words, packets: bytes([flags]) + words + b"".join(packets),
        st.integers(0, 7),
        WORDS | st.binary(min_size=32, max_size=32),
        st.lists(DESCRIPTOR, max_size=20),
    )
    | st.binary(max_size=200)
)
def test_rings(data: bytes) -> None:
    fuzz_ring(data)
