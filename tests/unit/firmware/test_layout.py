from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.firmware import layout
from hvhost.firmware.layout import E820Type, memory_layout

MIB, GIB = 1 << 20, 1 << 30
APIC_PAGES = [range(0xFEC00000, 0xFEC01000), range(0xFEE00000, 0xFEE01000)]
KVM_PAGES = range(0xFFFBC000, 0xFFFC0000)


def test_small_machine() -> None:
    made = memory_layout(512 * MIB)
    assert [(r.guest_address, r.size, r.backing_offset) for r in made.regions] == [
        (0, 512 * MIB, 0)
    ]
    assert made.low_mmio == range(0xF8000000, 0xFEC00000)
    assert made.high_mmio == range(0xFE0000000, 0x1000000000)
    assert [(e.address, e.size, e.type.name) for e in made.e820] == [
        (0, 0x9FC00, "RAM"),
        (0x9FC00, 0x400, "RESERVED"),
        (0xE0000, 0x20000, "RESERVED"),
        (0x100000, 511 * MIB, "RAM"),
        (0xFFFBC000, 0x4000, "RESERVED"),
    ]


def test_memory_moves_above_4_gib() -> None:
    made = memory_layout(6 * GIB)
    low, high = made.regions
    assert (low.guest_address, low.size, low.backing_offset) == (0, 0xF8000000, 0)
    assert (high.guest_address, high.backing_offset) == (4 * GIB, 0xF8000000)
    assert low.size + high.size == 6 * GIB


def test_gap_of_ones_own() -> None:
    made = memory_layout(4 * GIB, low_mmio_bytes=3 * GIB, high_mmio_bytes=0)
    assert made.low_mmio == range(1 * GIB, 0xFEC00000)
    assert not made.high_mmio
    assert made.regions[0].size == 1 * GIB


def test_memory_that_exactly_fills_the_low_part() -> None:
    assert len(memory_layout(0xF8000000).regions) == 1
    assert len(memory_layout(0xF8000000 + 4096).regions) == 2


def test_high_window_makes_room_for_a_large_machine() -> None:
    made = memory_layout(100 * GIB)
    assert made.high_mmio.start >= made.regions[1].guest_address + made.regions[1].size
    assert made.high_mmio.stop == 128 * GIB


@pytest.mark.parametrize(
    ("memory", "low", "high"),
    [
        (15 * MIB, 128 * MIB, 0),
        (0, 128 * MIB, 0),
        (64 * MIB + 1, 128 * MIB, 0),
        (64 * MIB, 127 * MIB, 0),
        (64 * MIB, 128 * MIB + 4096, 0),
        (64 * MIB, 3585 * MIB, 0),
        (64 * MIB, 128 * MIB, -MIB),
        (64 * MIB, 128 * MIB, 4096),
        (64 * MIB, 128 * MIB, 1024 * GIB + MIB),
    ],
)
def test_impossible_sizes(memory: int, low: int, high: int) -> None:
    with pytest.raises(HvHostError, match="cannot"):
        memory_layout(memory, low_mmio_bytes=low, high_mmio_bytes=high)


@given(
    st.integers(16, 300 * 1024).map(lambda n: n * MIB),
    st.integers(128, 3584).map(lambda n: n * MIB),
    st.integers(0, 64 * 1024).map(lambda n: n * MIB),
)
def test_nothing_is_lost_and_nothing_overlaps(memory: int, low: int, high: int) -> None:
    made = memory_layout(memory, low_mmio_bytes=low, high_mmio_bytes=high)
    assert sum(region.size for region in made.regions) == memory
    offset = 0
    for region in made.regions:
        assert region.backing_offset == offset
        offset += region.size
    ram = [range(r.guest_address, r.guest_address + r.size) for r in made.regions]
    spans = [s for s in [*ram, made.low_mmio, made.high_mmio, *APIC_PAGES, KVM_PAGES] if s]
    spans.sort(key=lambda span: span.start)
    assert all(first.stop <= second.start for first, second in pairwise(spans))
    assert made.high_mmio.stop - made.high_mmio.start == high

    entries = [range(e.address, e.address + e.size) for e in made.e820]
    assert all(first.stop <= second.start for first, second in pairwise(entries))
    for entry, span in zip(made.e820, entries, strict=True):
        inside = any(r.start <= span.start and span.stop <= r.stop for r in ram)
        assert entry.size > 0
        if entry.type is E820Type.RAM:
            assert inside
    # All RAM above 1 MiB is announced, and the ACPI tables' place is RAM that is not.
    announced = sum(e.size for e in made.e820 if e.type is E820Type.RAM)
    assert announced == memory - MIB + layout.LOW_RAM_END
    assert any(
        e.type is E820Type.RESERVED and span == range(0xE0000, 0x100000)
        for e, span in zip(made.e820, entries, strict=True)
    )


@given(
    st.integers(16, 100 * 1024).map(lambda n: n * MIB),
    st.integers(128, 3584).map(lambda n: n * MIB),
    st.integers(0, 64 * 1024).map(lambda n: n * MIB),
    st.integers(1, 200 * 1024).map(lambda n: n * MIB),
)
def test_added_memory_has_a_place_of_its_own(memory: int, low: int, high: int, more: int) -> None:
    """Above 4 GiB and all RAM, where any guest's blocks begin, below the high window."""
    made = memory_layout(memory, low_mmio_bytes=low, high_mmio_bytes=high, hot_add_bytes=more)
    assert made.hot_add.start >= 4 * GIB and made.hot_add.start % (2 * GIB) == 0
    assert made.hot_add.stop - made.hot_add.start == more
    assert all(r.guest_address + r.size <= made.hot_add.start for r in made.regions)
    assert made.hot_add.stop <= made.high_mmio.start


def test_a_map_that_processors_do_not_reach() -> None:
    made = memory_layout(GIB, high_mmio_bytes=600 * GIB)
    made.check_address_width(40)
    with pytest.raises(HvHostError, match="ends at 1 TiB, but its processors address 512 GiB"):
        made.check_address_width(39)
