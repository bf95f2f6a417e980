"""Changes of an open VHDX file's metadata: its size, a longer table, an item's value.

Everything that a new state needs becomes stable first, and last the one page that makes it so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.file import read_exactly, write_all
from hvhost.storage.vhdx_blocks import ENTRIES_PER_PAGE, PIECE_SIZE
from hvhost.storage.vhdx_create import region_table
from hvhost.storage.vhdx_format import (
    ALIGNMENT,
    BAT_ENTRY_SIZE,
    BAT_REGION,
    BITMAP_SIZE,
    MAXIMUM_DISK_SIZE,
    METADATA_TABLE_SIZE,
    MIB,
    OFFSET_MASK,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    STATE_MASK,
    VIRTUAL_DISK_SIZE,
    BitmapState,
    ItemFlags,
    MetadataTableEntry,
    MetadataTableHeader,
    PayloadState,
    RegionTableEntry,
    RegionTableHeader,
    bat_entry_count,
    checksum_is_right,
)
from hvhost.storage.vhdx_layout import PAGE, ReplayedFile
from hvhost.storage.vhdx_log import Replay

if TYPE_CHECKING:
    from hvhost.storage.vhdx import VhdxDisk

_STEP = MIB


def resize(disk: VhdxDisk, size: int) -> None:
    """See :meth:`hvhost.storage.disk.Disk.resize`."""
    if not 0 < size <= MAXIMUM_DISK_SIZE or size % disk.logical_sector_size:
        raise HvHostError(
            f"{disk.file.name} cannot have {size} bytes; name a multiple of "
            f"{disk.logical_sector_size} up to 64T."
        )
    if size == disk.size:
        return
    disk.begin()
    if size > disk.size:
        _grow(disk, size)
    else:
        _shrink(disk, size)


def _grow(disk: VhdxDisk, size: int) -> None:
    layout = disk.layout
    entries = bat_entry_count(
        size, layout.block_size, layout.logical_sector_size, layout.has_parent
    )
    if entries * BAT_ENTRY_SIZE > layout.bat.length:
        _move_table(disk, entries)
    disk.table.grow(entries)
    _complete_last_block(disk)
    for block in range(layout.block_count, -(-size // layout.block_size)):
        entry = int(PayloadState.NOT_PRESENT)
        if layout.leave_block_allocated:
            place = disk.space.allocate(layout.block_size)
            disk.file.reserve(place, layout.block_size)
            entry = place | PayloadState.FULLY_PRESENT
        elif disk.parent is not None and block * layout.block_size < disk.parent.size:
            entry = int(PayloadState.ZERO)
        if disk.table.get(disk.index(block)) != entry:
            disk.table.set(disk.index(block), entry)
        disk.commit_if_much()
    # The file may have anything where the longer table's entries are: write them all.
    for page in range(layout.entry_count // ENTRIES_PER_PAGE, -(-entries // ENTRIES_PER_PAGE)):
        disk.table.dirty.add(page)
        disk.commit_if_much()
    _set_size(disk, size)


def _set_size(disk: VhdxDisk, size: int) -> None:
    disk.commit(_item_pages(disk, VIRTUAL_DISK_SIZE, size.to_bytes(8, "little")))
    disk.set_layout(replace(disk.layout, size=size))


def _complete_last_block(disk: VhdxDisk) -> None:
    """The last block's part beyond the old end becomes zeros, for the disk to grow over it."""
    block_size, block = disk.layout.block_size, disk.layout.block_count - 1
    used = disk.size - block * block_size
    entry = disk.table.get(disk.index(block))
    state, place = entry & STATE_MASK, entry & OFFSET_MASK
    if used == block_size:
        return
    if state in (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT):
        if disk.last_block_is_short:
            place = _move_short_block(disk, block, used)
        elif disk.file.size() < place + block_size:
            disk.file.truncate(place + block_size)
        disk.file.clear(place + used, block_size - used)
    elif (
        disk.parent is not None
        and state == PayloadState.NOT_PRESENT
        and disk.parent.size > disk.size
    ):
        disk.need_bitmap(block)
        place = disk.space.allocate(block_size)
        disk.bitmaps.put(*disk.bits(block, 0, block_size), False)
        disk.table.set(disk.index(block), place | PayloadState.PARTIALLY_PRESENT)
        state = PayloadState.PARTIALLY_PRESENT
    if state == PayloadState.PARTIALLY_PRESENT:
        disk.bitmaps.put(*disk.bits(block, used, block_size - used), True)


def _move_short_block(disk: VhdxDisk, block: int, used: int) -> int:
    """Move the last block, in whose place another extent begins, to where there is room."""
    entry = disk.table.get(disk.index(block))
    place = disk.space.allocate(disk.layout.block_size)
    copy_bytes(disk, entry & OFFSET_MASK, place, used)
    disk.drop_block(disk.index(block), place | entry & STATE_MASK)
    disk.last_block_is_short = False
    return place


def copy_bytes(disk: VhdxDisk, source: int, destination: int, length: int) -> None:
    """Copy a range of the file to another place in it."""
    for start in range(0, length, _STEP):
        data = read_exactly(disk.file, source + start, min(_STEP, length - start))
        write_all(disk.file, destination + start, data)


def _shrink(disk: VhdxDisk, size: int) -> None:
    old = disk.layout
    # The new size first: from then on, nobody looks at what is behind it.
    disk.commit(_item_pages(disk, VIRTUAL_DISK_SIZE, size.to_bytes(8, "little")))
    kept = -(-size // old.block_size)
    for block in range(kept, old.block_count):
        disk.drop_block(disk.index(block), PayloadState.NOT_PRESENT)
        disk.commit_if_much()
    if kept < old.block_count:
        disk.last_block_is_short = False
    disk.set_layout(replace(old, size=size))
    if old.has_parent:
        for index in range(disk.layout.entry_count, old.entry_count):
            entry = disk.table.get(index)
            if (
                index % (old.chunk_ratio + 1) == old.chunk_ratio
                and entry & STATE_MASK == BitmapState.PRESENT
            ):
                disk.space.release(entry & OFFSET_MASK, BITMAP_SIZE)
                disk.table.set(index, BitmapState.NOT_PRESENT)
                disk.commit_if_much()
    disk.flush()
    disk.bitmaps.forget()
    disk.trim()


def _move_table(disk: VhdxDisk, entries: int) -> None:
    """Write the table once more, where it can be longer, and then name it in the region tables."""
    old = disk.layout.bat
    length = -(-entries * BAT_ENTRY_SIZE // ALIGNMENT) * ALIGNMENT
    place = disk.space.allocate(length)
    new = RegionTableEntry(BAT_REGION, place, length, old.required)
    try:
        for number, piece in enumerate(disk.table.pieces):
            if any(piece):
                write_all(disk.file, place + number * PIECE_SIZE, piece.tobytes())
        disk.commit(_region_pages(disk, new))
    except BaseException:
        disk.space.give_back(place, length)
        raise
    disk.set_layout(replace(disk.layout, bat=new))
    disk.space.release(old.file_offset, old.length)
    disk.space.settle()


def _region_pages(disk: VhdxDisk, bat: RegionTableEntry) -> dict[int, bytes]:
    """Pages of both region tables, with this table region in them."""
    tables = [read_exactly(disk.file, each, REGION_TABLE_SIZE) for each in REGION_TABLE_OFFSETS]
    valid = next((each for each in tables if checksum_is_right(each)), None)
    if valid is None:
        raise DiskError(f"{disk.file.name} has no valid region table any more; it is damaged.")
    count = RegionTableHeader.unpack(valid).entry_count
    regions = [RegionTableEntry.unpack(valid, 16 + 32 * number) for number in range(count)]
    new = region_table(tuple(bat if each.guid == BAT_REGION else each for each in regions))
    pages: dict[int, bytes] = {}
    for offset, table in zip(REGION_TABLE_OFFSETS, tables, strict=True):
        pages |= _changed_pages(offset, table, new)
    return pages


def _changed_pages(offset: int, before: bytearray, after: bytes | bytearray) -> dict[int, bytes]:
    """Pages that differ, by their offset in the file."""
    return {
        offset + start: bytes(after[start : start + PAGE])
        for start in range(0, len(before), PAGE)
        if before[start : start + PAGE] != after[start : start + PAGE]
    }


def _item_pages(disk: VhdxDisk, guid: UUID, value: bytes) -> dict[int, bytes]:
    """Pages of the metadata region that change when an item gets *value*.

    A value longer than the old one goes behind all other items.
    """
    region = disk.layout.metadata
    before = ReplayedFile(disk.file, Replay()).read(region.file_offset, min(region.length, MIB))
    after = bytearray(before)
    count = MetadataTableHeader.unpack(before).entry_count
    entries = [MetadataTableEntry.unpack(before, 32 + 32 * number) for number in range(count)]
    # A user's item may have the same name (2.6.1.2).
    number = next(
        index
        for index, each in enumerate(entries)
        if each.item_id == guid and not each.flags & ItemFlags.IS_USER
    )
    entry = entries[number]
    offset = entry.offset
    if len(value) > entry.length:
        offset = max(METADATA_TABLE_SIZE, *(each.offset + each.length for each in entries))
        offset = -(-offset // 8) * 8
    if offset + len(value) > len(after):
        raise DiskError(f"{disk.file.name} has no room for its metadata; convert it to a new file.")
    after[offset : offset + len(value)] = value
    changed = replace(entry, offset=offset, length=len(value)).pack()
    after[32 + 32 * number : 64 + 32 * number] = changed
    return _changed_pages(region.file_offset, before, after)


def set_item(disk: VhdxDisk, guid: UUID, value: bytes) -> None:
    """Give an item of metadata another value; stable when this returns."""
    disk.begin()
    disk.commit(_item_pages(disk, guid, value))
