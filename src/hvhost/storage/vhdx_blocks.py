"""The block allocation table of a VHDX file, [MS-VHDX] 2.5, in memory.

It is kept in pieces of 8,192 entries; those without any block share one piece of zeros, so that a
table is as big as what it holds, whatever the file claims.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise

from hvhost.errors import DiskError
from hvhost.storage.buffers import only_zeros
from hvhost.storage.vhdx_format import (
    BAT_ENTRY_SIZE,
    BITMAP_SIZE,
    HEADER_SECTION_SIZE,
    OFFSET_MASK,
    STATE_MASK,
    BitmapState,
    PayloadState,
)
from hvhost.storage.vhdx_layout import PAGE, Layout, ReplayedFile

PIECE_SHIFT = 13
PIECE_ENTRIES = 1 << PIECE_SHIFT
PIECE_MASK = PIECE_ENTRIES - 1
PIECE_SIZE = PIECE_ENTRIES * BAT_ENTRY_SIZE
ENTRIES_PER_PAGE = PAGE // BAT_ENTRY_SIZE
_NO_BLOCKS = array("Q", bytes(PIECE_SIZE))
_PRESENT = (PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT)


class BlockTable:
    """All entries, and which 4 KiB pages of the table have changed since they were written."""

    def __init__(self, entry_count: int) -> None:
        self.pieces: list[array[int]] = []
        self.dirty: set[int] = set()
        self.grow(entry_count)

    @classmethod
    def read(cls, layout: Layout, replayed: ReplayedFile) -> BlockTable:
        """The table of a file."""
        table = cls(layout.entry_count)
        used = layout.entry_count * BAT_ENTRY_SIZE
        for number in range(len(table.pieces)):
            start = number * PIECE_SIZE
            length = min(PIECE_SIZE, -(-(used - start) // PAGE) * PAGE)
            if not replayed.may_have_data(layout.bat.file_offset + start, length):
                continue
            data = replayed.read(layout.bat.file_offset + start, length)
            valid = min(length, used - start)
            if not only_zeros(data[:valid]):
                table.pieces[number] = array("Q", bytes(data[:valid]).ljust(PIECE_SIZE, b"\0"))
        return table

    def grow(self, entry_count: int) -> None:
        """Make room for that many entries."""
        while len(self.pieces) << PIECE_SHIFT < entry_count:
            self.pieces.append(_NO_BLOCKS)

    def get(self, index: int) -> int:
        """An entry."""
        return self.pieces[index >> PIECE_SHIFT][index & PIECE_MASK]

    def set(self, index: int, entry: int) -> None:
        """Change an entry."""
        number = index >> PIECE_SHIFT
        if self.pieces[number] is _NO_BLOCKS:
            self.pieces[number] = array("Q", _NO_BLOCKS)
        self.pieces[number][index & PIECE_MASK] = entry
        self.dirty.add(index // ENTRIES_PER_PAGE)

    def page(self, number: int) -> bytes:
        """The bytes of a page of the table."""
        first = number * ENTRIES_PER_PAGE
        piece, start = self.pieces[first >> PIECE_SHIFT], first & PIECE_MASK
        return piece[start : start + ENTRIES_PER_PAGE].tobytes()


@dataclass(frozen=True, slots=True)
class Survey:
    """What a table has in use. Extents: offset and length in bytes, sorted."""

    extents: list[tuple[int, int]]
    present_blocks: int
    last_block_is_short: bool


def survey(name: str, layout: Layout, table: BlockTable, file_size: int) -> Survey:
    """Everything in use; :class:`DiskError` for blocks outside the file or on each other."""
    extents: list[tuple[int, int]] = [
        (0, HEADER_SECTION_SIZE),
        (layout.bat.file_offset, layout.bat.length),
        (layout.metadata.file_offset, layout.metadata.length),
    ]
    if layout.header.log_length:
        extents.append((layout.header.log_offset, layout.header.log_length))
    blocks = 0
    last_block: tuple[int, int] | None = None
    ratio, block_size = layout.chunk_ratio, layout.block_size
    for number, piece in enumerate(table.pieces):
        if piece is _NO_BLOCKS:
            continue
        base = number << PIECE_SHIFT
        for within, entry in enumerate(piece):
            if not entry:
                continue
            chunk, position = divmod(base + within, ratio + 1)
            state, place = entry & STATE_MASK, entry & OFFSET_MASK
            if position == ratio:
                if state == BitmapState.PRESENT and layout.has_parent:
                    if place + BITMAP_SIZE > file_size:
                        raise _outside(name, "sector bitmap", chunk, place)
                    extents.append((place, BITMAP_SIZE))
                elif state != BitmapState.NOT_PRESENT:
                    raise _bad_state(name, "sector bitmap", chunk, state)
                continue
            block = chunk * ratio + position
            if block >= layout.block_count or state <= PayloadState.UNMAPPED:
                continue
            if state not in _PRESENT:
                raise _bad_state(name, "block", block, state)
            if state == PayloadState.PARTIALLY_PRESENT:
                bitmap = table.get(chunk * (ratio + 1) + ratio) if layout.has_parent else 0
                if bitmap & STATE_MASK != BitmapState.PRESENT:
                    raise DiskError(f"{name} has block {block} in part, but not what says which.")
            blocks += 1
            length = min(block_size, layout.size - block * block_size)
            if place + length > file_size:
                raise _outside(name, "block", block, place)
            if length < block_size:
                last_block = (place, length)
            else:
                extents.append((place, length))
    short = _add_last_block(extents, last_block, block_size)
    for (first, length), (second, _) in pairwise(extents):
        if first + length > second:
            raise DiskError(
                f"{name} has two things at one place, at {second} in the file; it is damaged."
            )
    return Survey(extents, blocks, short)


def _add_last_block(
    extents: list[tuple[int, int]], last_block: tuple[int, int] | None, block_size: int
) -> bool:
    """Add a last block that the disk's end cuts, and sort; whether only that part is its own."""
    if last_block is None:
        extents.sort()
        return False
    place, length = last_block
    short = any(place < start < place + block_size for start, _ in extents)
    extents.append((place, length if short else block_size))
    extents.sort()
    return short


def _outside(name: str, what: str, number: int, place: int) -> DiskError:
    return DiskError(f"{name} has {what} {number} outside the file, at {place}; it is damaged.")


def _bad_state(name: str, what: str, number: int, state: int) -> DiskError:
    return DiskError(f"{name} has {what} {number} in state {state}, which there is not.")
