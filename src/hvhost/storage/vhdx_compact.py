"""Compaction of a VHDX file: blocks of zeros go, the others move to the front, the file is cut."""

from __future__ import annotations

from collections.abc import Iterator

from hvhost.errors import HvHostError
from hvhost.storage.buffers import only_zeros
from hvhost.storage.disk import Progress
from hvhost.storage.file import read_exactly
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_format import (
    BITMAP_SIZE,
    MIB,
    OFFSET_MASK,
    STATE_MASK,
    BitmapState,
    PayloadState,
)
from hvhost.storage.vhdx_resize import copy_bytes


def compact(disk: VhdxDisk, progress: Progress) -> None:
    """Make the file as short as what it holds; it can be cut off at any time, and done again.

    :class:`HvHostError` for a fixed disk, whose blocks stay.
    """
    if disk.layout.leave_block_allocated:
        raise HvHostError(
            f"{disk.file.name} is fixed; convert it to a dynamic one to make it small."
        )
    disk.begin()
    _drop_zeros(disk, progress)
    _move_to_front(disk, progress)
    disk.bitmaps.forget()
    disk.trim()
    progress(2 * disk.size, 2 * disk.size)


def _drop_zeros(disk: VhdxDisk, progress: Progress) -> None:
    """Blocks that have nothing but zeros need no place."""
    for block in range(disk.layout.block_count):
        index = disk.index(block)
        entry = disk.table.get(index)
        if entry & STATE_MASK != PayloadState.FULLY_PRESENT:
            continue
        progress(block * disk.layout.block_size, 2 * disk.size)
        if _is_zero(disk, entry & OFFSET_MASK, disk.used(block)):
            disk.drop_block(index, PayloadState.ZERO)
            disk.commit_if_much()
    # What was dropped leaves gaps for others only once that is stable.
    disk.flush()


def _is_zero(disk: VhdxDisk, place: int, length: int) -> bool:
    return all(
        only_zeros(read_exactly(disk.file, place + start, min(MIB, length - start)))
        for start in range(0, length, MIB)
    )


def _move_to_front(disk: VhdxDisk, progress: Progress) -> None:
    """The last in the file first, each to the first gap before it that is long enough."""
    places = sorted(_places(disk), reverse=True)
    for number, (place, index, length) in enumerate(places):
        progress(disk.size + disk.size * number // len(places), 2 * disk.size)
        new = disk.space.allocate_gap(length, below=place)
        if new is not None:
            copy_bytes(disk, place, new, length)
            disk.table.set(index, new | disk.table.get(index) & STATE_MASK)
            disk.space.release(place, length)
            disk.commit_if_much()
    disk.flush()


def _places(disk: VhdxDisk) -> Iterator[tuple[int, int, int]]:
    """Place, entry's index and length of all that can move: blocks and sector bitmaps."""
    layout = disk.layout
    for index in range(layout.entry_count):
        entry = disk.table.get(index)
        state, place = entry & STATE_MASK, entry & OFFSET_MASK
        if index % (layout.chunk_ratio + 1) == layout.chunk_ratio:
            if state == BitmapState.PRESENT and layout.has_parent:
                yield place, index, BITMAP_SIZE
        elif state in (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT):
            block = disk.block_of(index)
            short = disk.last_block_is_short and block == layout.block_count - 1
            if block < layout.block_count and not short:
                yield place, index, layout.block_size
