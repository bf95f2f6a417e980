"""Who has which part of the rig's memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.rig import layout
from hvhost.rig.server import ALIGNMENT, Memory

GIB = 1 << 30
MIB = 1 << 20
SIZE = layout.CONTROL_AREA + 2 * GIB


@pytest.fixture(scope="module")
def shared() -> Iterator[Memory]:
    memory = Memory(SIZE)
    yield memory
    memory.close()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(1, 700 * MIB)),
            st.tuples(st.just("free"), st.integers(0, 20)),
        ),
        max_size=40,
    )
)
def test_no_part_is_lent_twice(shared: Memory, steps: list[tuple[str, int]]) -> None:
    lent: dict[int, int] = {}
    for step, number in steps:
        if step == "free":
            if lent:
                offset = sorted(lent)[number % len(lent)]
                del lent[offset]
                shared.free(offset)
            continue
        try:
            offset = shared.allocate(number)
        except HvHostError:
            taken = sorted((start, start + size) for start, size in lent.items())
            ends = [layout.CONTROL_AREA, *(-(-end // ALIGNMENT) * ALIGNMENT for _, end in taken)]
            gaps = zip(ends, [*(start for start, _ in taken), SIZE], strict=True)
            needed = -(-number // ALIGNMENT) * ALIGNMENT
            assert all(start - end < needed for end, start in gaps), "there was room"
            continue
        assert offset % ALIGNMENT == 0
        assert offset >= layout.CONTROL_AREA, "the control blocks are nobody's"
        assert offset + number <= SIZE
        assert all(
            offset + number <= start or start + size <= offset for start, size in lent.items()
        )
        lent[offset] = number
    for offset in lent:
        shared.free(offset)
    whole = shared.allocate(2 * GIB)
    assert whole == layout.CONTROL_AREA, "everything freed is there again"
    shared.free(whole)


@pytest.mark.parametrize("size", [0, -1, -GIB])
def test_sizes_that_are_none(shared: Memory, size: int) -> None:
    with pytest.raises(HvHostError, match="cannot lend"):
        shared.allocate(size)
    assert shared._used == [(0, layout.CONTROL_AREA)]


def test_a_full_rig_says_so(shared: Memory) -> None:
    offset = shared.allocate(GIB + 1)
    with pytest.raises(HvHostError, match=r"no room for another 1 GiB of guest memory"):
        shared.allocate(GIB)
    shared.free(offset)


def test_the_first_gap_that_is_large_enough(shared: Memory) -> None:
    first, second, third = (shared.allocate(size) for size in (600 * MIB, 200 * MIB, GIB))
    shared.free(first)
    assert shared.allocate(400 * MIB) == first
    assert shared.allocate(200 * MIB) == first + 400 * MIB
    for offset in (first, first + 400 * MIB, second, third):
        shared.free(offset)


def test_freeing_what_is_not_lent_does_nothing(shared: Memory) -> None:
    used = list(shared._used)
    shared.free(12345 * ALIGNMENT)
    assert shared._used == used


def test_freed_memory_is_the_computers_again(shared: Memory) -> None:
    offset = shared.allocate(8 * MIB)
    blocks = os.fstat(shared.descriptor).st_blocks
    with mmap.mmap(shared.descriptor, 8 * MIB, offset=offset) as view:
        view[:] = b"\xff" * (8 * MIB)
        assert os.fstat(shared.descriptor).st_blocks >= blocks + 8 * MIB // 512
        shared.free(offset)
        assert os.fstat(shared.descriptor).st_blocks <= blocks
        assert not any(view[: 64 << 10]), "whoever gets it next must not see what was there"


def test_words_of_the_control_area(shared: Memory) -> None:
    shared.store(layout.HEADER_PING, 0xFFFFFFFF)
    assert shared.load(layout.HEADER_PING) == 0xFFFFFFFF
    assert shared.load(layout.HEADER_PONG) == 0
    assert shared.control[layout.HEADER_PING : layout.HEADER_PING + 4] == b"\xff" * 4


def test_memory_that_cannot_be_given_back_is_not_silent(shared: Memory) -> None:
    with pytest.raises(HvHostError, match="could not give memory back"):
        shared.punch(-4096, 4096)
