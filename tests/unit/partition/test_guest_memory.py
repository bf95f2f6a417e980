from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import GuestMemoryError, LocalProtocolError
from hvhost.partition.memory import GuestMemory, MemoryRegion

LOW, HIGH, GAP = 0x4000, 0x3000, 0x10000


def two_regions() -> tuple[GuestMemory, bytearray]:
    """RAM at 0..LOW and GAP..GAP+HIGH over one backing buffer."""
    backing = bytearray(LOW + HIGH)
    view = memoryview(backing)
    regions = [MemoryRegion(GAP, view[LOW:], LOW), MemoryRegion(0, view[:LOW])]
    return GuestMemory(regions), backing


def inside(address: int, length: int) -> bool:
    return length >= 0 and (
        (address >= 0 and address + length <= LOW)
        or (address >= GAP and address + length <= GAP + HIGH)
    )


EDGES = st.sampled_from([0, LOW, GAP, GAP + HIGH, 1 << 32, 1 << 63, 1 << 64])
ADDRESSES = st.builds(lambda edge, offset: edge + offset, EDGES, st.integers(-9, 9))
LENGTHS = st.one_of(st.integers(-2, 16), st.sampled_from([LOW, HIGH, LOW + 1, GAP, 1 << 64]))


@given(ADDRESSES, LENGTHS)
def test_a_view_is_inside_one_region_or_refused(address: int, length: int) -> None:
    memory, backing = two_regions()
    if not inside(address, length):
        with pytest.raises(GuestMemoryError, match="not RAM"):
            memory.view(address, length)
        with pytest.raises(GuestMemoryError):
            memory.read(address, length)
        return
    view = memory.view(address, length)
    assert len(view) == length
    view[:] = b"\x5a" * length
    start = address if address < GAP else address - GAP + LOW
    assert backing.count(0x5A) == length
    assert backing[start : start + length] == b"\x5a" * length


@given(ADDRESSES, st.binary(max_size=20))
def test_a_write_is_inside_or_changes_nothing(address: int, data: bytes) -> None:
    memory, backing = two_regions()
    if inside(address, len(data)):
        memory.write(address, data)
        assert memory.read(address, len(data)) == data
    else:
        with pytest.raises(GuestMemoryError):
            memory.write(address, data)
        assert not any(backing)


@given(ADDRESSES, st.sampled_from([4, 8]))
def test_words_are_aligned_and_inside(address: int, size: int) -> None:
    memory, backing = two_regions()
    load, store = (memory.load32, memory.store32) if size == 4 else (memory.load64, memory.store64)
    if inside(address, size) and address % size == 0:
        store(address, 0x01020304)
        assert load(address) == 0x01020304
        assert memory.read(address, size) == (0x01020304).to_bytes(size, "little")
        assert sum(byte != 0 for byte in backing) == 4
        return
    for call in (lambda: load(address), lambda: store(address, 1)):
        with pytest.raises(GuestMemoryError):
            call()
    assert not any(backing)


def test_a_region_that_is_no_whole_number_of_words() -> None:
    memory = GuestMemory([MemoryRegion(0, memoryview(bytearray(4096 + 8)))])
    memory.store64(4096, 7)
    assert memory.load32(4096) == 7
    assert memory.size == 4104


def test_an_error_names_the_range() -> None:
    memory, _ = two_regions()
    with pytest.raises(GuestMemoryError, match=r"0xfff00000\+0x10 is not RAM"):
        memory.view(0xFFF00000, 0x10)
    with pytest.raises(GuestMemoryError, match="0x2 is not aligned to 4"):
        memory.load32(2)


def test_there_is_nothing_below_the_first_region() -> None:
    backing = bytearray(b"\x5a" * HIGH)
    memory = GuestMemory([MemoryRegion(GAP, memoryview(backing))])
    for access in (
        lambda: memory.read(GAP - 8, 8),
        lambda: memory.load32(GAP - 8),
        lambda: memory.store64(GAP - 8, 1),
    ):
        with pytest.raises(GuestMemoryError, match="0xfff8"):
            access()
    assert backing == b"\x5a" * HIGH


@pytest.mark.parametrize("offset", range(1, 8))
def test_a_word_between_words(offset: int) -> None:
    memory, backing = two_regions()
    words: list[Callable[[], object]] = [
        lambda: memory.load64(offset),
        lambda: memory.store64(offset, 1),
    ]
    if offset != 4:
        words += [lambda: memory.load32(offset), lambda: memory.store32(offset, 1)]
    for word in words:
        with pytest.raises(GuestMemoryError, match="is not aligned"):
            word()
    assert not any(backing)


def test_memory_that_is_added() -> None:
    memory = GuestMemory([MemoryRegion(0, memoryview(bytearray(0x2000)))])
    with pytest.raises(GuestMemoryError):
        memory.load32(0x10000)
    memory.append(MemoryRegion(0x10000, memoryview(bytearray(0x1000)), 0x2000))
    memory.store32(0x10FFC, 7)
    assert memory.load32(0x10FFC) == 7 and memory.size == 0x3000
    assert memory.backing_offset(0x10800, 0x800) == 0x2800
    with pytest.raises(GuestMemoryError):
        memory.backing_offset(0x10800, 0x801)
    with pytest.raises(LocalProtocolError, match="does not lie at the end"):
        memory.append(MemoryRegion(0x8000, memoryview(bytearray(0x1000))))
