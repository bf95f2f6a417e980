"""Another size for an open VHD: each step leaves a disk that opens, of the old size or the new."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from hvhost.storage.file import write_all
from hvhost.storage.vhd_format import (
    FOOTER_SIZE,
    SECTOR,
    UNUSED_BLOCK,
    DynamicHeader,
    Footer,
    geometry,
    packed,
)

if TYPE_CHECKING:
    from hvhost.storage.vhd import VhdDisk

_PAGE = 4096


def resize(disk: VhdDisk, size: int) -> None:
    """Resize a disk, all of whose changes are stable, to a size that a VHD can have."""
    cylinders, heads, sectors = geometry(size)
    footer = replace(
        disk.footer,
        current_size=size,
        cylinders=cylinders,
        heads=heads,
        sectors_per_track=sectors,
    )
    if disk.header is None:
        _resize_fixed(disk, footer)
    else:
        _resize_dynamic(disk, footer, disk.header)


def _resize_fixed(disk: VhdDisk, footer: Footer) -> None:
    old, new = disk.size, footer.current_size
    write_all(disk.file, new, packed(footer))
    disk.file.flush()
    if new > old:
        disk.file.clear(old, min(FOOTER_SIZE, new - old))
        disk.file.reserve(old, new - old)
    else:
        disk.file.truncate(new + FOOTER_SIZE)
    disk.file.flush()
    disk.footer = footer


def _resize_dynamic(disk: VhdDisk, footer: Footer, header: DynamicHeader) -> None:
    count = -(-footer.current_size // header.block_size)
    within = disk.size % header.block_size
    last = len(disk.table) - 1
    if footer.current_size > disk.size and within and disk.table[last] != UNUSED_BLOCK:
        # A smaller size left there what it cut off.
        disk.file.clear(disk.data(last) + within, header.block_size - within)
        disk.file.flush()
    if count > len(disk.table):
        table = disk.table + array("I", [UNUSED_BLOCK]) * (count - len(disk.table))
        if count > header.maximum_table_entries:
            header = _move_table(disk, header, table)
        else:
            # Of a shrinking that was cut off, entries may be left there.
            disk.write_table(0, table)
            disk.file.flush()
        disk.table = table
    write_all(disk.file, 0, packed(footer))
    disk.footer = footer
    _write_end(disk)
    if count < len(disk.table):
        dropped = [each for each in disk.table[count:] if each != UNUSED_BLOCK]
        disk.write_table(count, array("I", [UNUSED_BLOCK]) * (len(disk.table) - count))
        del disk.table[count:]
        disk.bitmaps.clear()
        # The new size is stable: whether these reach the disk, and in what order, is all the same.
        for each in dropped:
            disk.file.clear(each * SECTOR, disk.bitmap_size + header.block_size)


def _move_table(disk: VhdDisk, header: DynamicHeader, table: array[int]) -> DynamicHeader:
    """Room for a longer table behind all else; it is written there before it is named."""
    place = -(-disk.end // _PAGE) * _PAGE
    length = -(-4 * len(table) // _PAGE) * _PAGE
    disk.file.truncate(disk.end)
    disk.file.truncate(place + length)
    new = replace(header, table_offset=place, maximum_table_entries=length // 4)
    spare = array("I", [UNUSED_BLOCK]) * (length // 4 - len(table))
    disk.header = new
    disk.write_table(0, table + spare)
    disk.file.flush()
    # All that changes is in the header's first sector: it is there as a whole or not at all.
    write_all(disk.file, disk.footer.data_offset, packed(new)[:SECTOR])
    disk.file.flush()
    disk.end = place + length
    return new


def _write_end(disk: VhdDisk) -> None:
    """The footer at the file's end."""
    disk.file.truncate(disk.end)
    write_all(disk.file, disk.end, packed(disk.footer))
    disk.file.flush()
