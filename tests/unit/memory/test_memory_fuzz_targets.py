"""The body of ``fuzz/fuzz_memory.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.memory.protocol import PageRange, PageSet, decode
from simulated.targets import fuzz_memory

RANGES = st.lists(st.tuples(st.integers(0, 4200), st.integers(0, 60)), max_size=4)
BALLOON = st.builds(
    lambda ranges, more: (
        struct.pack("<II", 0, len(ranges) << 1 | more)
        + b"".join(struct.pack("<Q", start | count << 40) for start, count in ranges)
    ),
    RANGES,
    st.integers(0, 1),
)
HOT_ADD = st.builds(
    lambda count, result: struct.pack("<II", count, result), st.integers(0, 4000), st.integers(0, 1)
)
RAW = st.builds(
    lambda kind, size, body: struct.pack("<HHI", kind, size, 1) + body,
    st.integers(0, 13),
    st.integers(0, 60),
    st.binary(max_size=50),
)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(BALLOON | HOT_ADD | RAW | st.binary(max_size=50), max_size=12),
)
def test_memory(first: int, pieces: list[bytes]) -> None:
    fuzz_memory(bytes([first]) + b"".join(bytes([len(piece)]) + piece for piece in pieces))


@given(st.binary(max_size=80) | RAW)
def test_any_message_is_read_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except RemoteProtocolError as error:
        assert str(error)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 5)), max_size=20),
)
def test_a_page_set_is_a_set(puts: list[tuple[int, int]], takes: list[tuple[int, int]]) -> None:
    pages, model = PageSet(), set[int]()
    for start, count in puts:
        new = set(range(start, start + count))
        try:
            pages.add(PageRange(start, count))
        except RemoteProtocolError:
            assert new & model
        else:
            assert not new & model
            model |= new
        assert pages.count == len(model)
    for count, ranges in takes:
        taken = pages.take(count, ranges)
        assert len(taken) <= ranges and sum(each.count for each in taken) <= count
        for each in taken:
            frames = set(range(each.start, each.end))
            assert frames and frames <= model
            model -= frames
        assert pages.count == len(model) and (not model or taken)
