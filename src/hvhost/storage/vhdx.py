"""VHDX disks, [MS-VHDX]: fixed, dynamic and differencing.

Reads and writes go straight to the blocks; a new block, a sector bitmap or the disk's size changes
in memory first and, with the next flush at the latest, in the file through its log (see
:mod:`hvhost.storage.vhdx_journal`). A crash before that flush leaves the old state, and the new
blocks as free space.

In a file with a parent, what is not there is read from the parent, which is open for reading only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

from hvhost.errors import DiskError
from hvhost.storage.bounds import check_range, check_writable
from hvhost.storage.buffers import clear, section
from hvhost.storage.disk import ImageDisk, read_parent
from hvhost.storage.file import ImageFile
from hvhost.storage.space import Space
from hvhost.storage.vhdx_bitmap import SectorBitmaps
from hvhost.storage.vhdx_blocks import PIECE_MASK, PIECE_SHIFT, BlockTable, survey
from hvhost.storage.vhdx_format import (
    ALIGNMENT,
    BITMAP_SIZE,
    OFFSET_MASK,
    STATE_MASK,
    BitmapState,
    PayloadState,
)
from hvhost.storage.vhdx_journal import MAXIMUM_PAGES, Journal
from hvhost.storage.vhdx_layout import (
    PAGE,
    Layout,
    ReplayedFile,
    read_headers,
    read_layout,
    read_replay,
)
from hvhost.storage.vhdx_log import Replay
from hvhost.storage.vhdx_resize import resize

_FULL, _PARTIAL = PayloadState.FULLY_PRESENT, PayloadState.PARTIALLY_PRESENT
_ZERO = int(PayloadState.ZERO)
# A write changes few pages more; they must fit one commit.
_COMMIT_AT = MAXIMUM_PAGES // 2


class VhdxDisk:
    """An open VHDX file; see :mod:`hvhost.storage.disk` for the rules."""

    def __init__(self, file: ImageFile, *, read_only: bool = False) -> None:
        """Takes *file* over; :class:`DiskError` if it is damaged.

        One with a parent wants it by :meth:`attach` before data is read.
        """
        self.file = file
        self.read_only = read_only
        self.parent: ImageDisk | None = None
        header, slot, notes = read_headers(file)
        replay = read_replay(file, header)
        self.journal = Journal(file, header, slot)
        replayed = ReplayedFile(file, replay)
        self.layout = layout = read_layout(file, header, slot, replayed)
        self.notes = (*notes, *layout.notes)
        self.table = BlockTable.read(layout, replayed)
        file_size = max(file.size(), replay.last_file_offset)
        found = survey(file.name, layout, self.table, file_size)
        self.last_block_is_short = found.last_block_is_short
        if not read_only:
            self.journal.replay(replay)
            replayed = ReplayedFile(file, Replay())
        self.bitmaps = SectorBitmaps(replayed)
        self.space = Space(file, found.extents, ALIGNMENT)
        self._size = layout.size
        self._block_size = layout.block_size
        self._block_shift = layout.block_size.bit_length() - 1
        self._block_mask = layout.block_size - 1
        self._ratio = layout.chunk_ratio
        self._ratio_shift = self._ratio.bit_length() - 1
        self.logical_sector_size = layout.logical_sector_size
        self.physical_sector_size = layout.physical_sector_size
        self.identifier: UUID = layout.identifier
        self.next_guid: UUID | None = None

    def attach(self, parent: ImageDisk) -> None:
        """Take over the disk that this one is the difference to."""
        if parent.logical_sector_size != self.logical_sector_size:
            raise DiskError(f"{self.file.name} and its parent differ in their sector size.")
        self.parent = parent

    @property
    def size(self) -> int:
        return self._size

    def set_layout(self, layout: Layout) -> None:
        """The file is another from now on: after a resize."""
        self.layout = layout
        self._size = layout.size

    @property
    def allocated(self) -> int:
        return self.file.allocated()

    # --- reading ------------------------------------------------------------------------------

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        within = offset & self._block_mask
        if offset >= 0 and offset + length <= self._size and within + length <= self._block_size:
            # The quick way: all in one block that is there.
            block = offset >> self._block_shift
            index = block + (block >> self._ratio_shift)
            entry = self.table.pieces[index >> PIECE_SHIFT][index & PIECE_MASK]
            if entry & STATE_MASK == 6:
                self.file.readv((entry & OFFSET_MASK) + within, buffers)
                return
        check_range(self._size, offset, length)
        done = 0
        for block, within, count in self._blocks(offset, length):
            self._read_block(block, within, section(buffers, done, count), count)
            done += count

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        within = offset & self._block_mask
        if offset < 0 or offset + length > self._size or within + length > self._block_size:
            return False
        block = offset >> self._block_shift
        index = block + (block >> self._ratio_shift)
        entry = self.table.pieces[index >> PIECE_SHIFT][index & PIECE_MASK]
        return entry & STATE_MASK == 6 and self.file.read_now(
            (entry & OFFSET_MASK) + within, length, buffers
        )

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Block, offset in it and bytes, for each block of a range."""
        while length:
            within = offset & self._block_mask
            count = min(length, self._block_size - within)
            yield offset >> self._block_shift, within, count
            offset += count
            length -= count

    def index(self, block: int) -> int:
        """The block's entry in the table: there is a sector bitmap's after each chunk."""
        return block + (block >> self._ratio_shift)

    def _read_block(
        self, block: int, within: int, buffers: Sequence[memoryview], count: int
    ) -> None:
        entry = self.table.get(self.index(block))
        state, place = entry & STATE_MASK, entry & OFFSET_MASK
        if state == _FULL:
            self.file.readv(place + within, buffers)
        elif state == _PARTIAL:
            done = 0
            for own, size in self._runs(block, within, count):
                part = section(buffers, done, size)
                if own:
                    self.file.readv(place + within + done, part)
                else:
                    self._read_parent((block << self._block_shift) + within + done, part, size)
                done += size
        elif state == PayloadState.NOT_PRESENT and self.layout.has_parent:
            self._read_parent((block << self._block_shift) + within, buffers, count)
        else:
            clear(buffers)

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range may be something else than zeros."""
        for block, within, count in self._blocks(offset, min(length, self._size - offset)):
            entry = self.table.get(self.index(block))
            state = entry & STATE_MASK
            if state == _PARTIAL:
                return True
            if state == _FULL and self.file.may_have_data((entry & OFFSET_MASK) + within, count):
                return True
            if state == PayloadState.NOT_PRESENT and self.parent is not None:
                start = (block << self._block_shift) + within
                if start < self.parent.size and self.parent.may_have_data(start, count):
                    return True
        return False

    def own_ranges(self) -> Iterator[tuple[int, int, bool]]:
        """Offset, length, and whether there is data (or zeros), of what is not the parent's."""
        for block in range(self.layout.block_count):
            start, used = block << self._block_shift, self.used(block)
            state = self.table.get(self.index(block)) & STATE_MASK
            if state == _PARTIAL:
                for own, count in self._runs(block, 0, used):
                    if own:
                        yield start, count, True
                    start += count
            elif state != PayloadState.NOT_PRESENT:
                yield start, used, state == _FULL

    def _read_parent(self, offset: int, buffers: Sequence[memoryview], count: int) -> None:
        read_parent(self.file.name, self.parent, offset, buffers, count)

    # --- sector bitmaps -----------------------------------------------------------------------

    def _bitmap_index(self, block: int) -> int:
        return (block >> self._ratio_shift) * (self._ratio + 1) + self._ratio

    def bits(self, block: int, within: int, count: int) -> tuple[int, int, int]:
        """Place of the block's bitmap, first bit and number of bits."""
        place = self.table.get(self._bitmap_index(block)) & OFFSET_MASK
        sector = self.logical_sector_size
        in_chunk = (block & (self._ratio - 1)) * (self._block_size // sector)
        first = within // sector
        return place, in_chunk + first, -(-(within + count) // sector) - first

    def _runs(self, block: int, within: int, count: int) -> Iterator[tuple[bool, int]]:
        """Whether the bytes are this file's own, and how many, for each run."""
        sector = self.logical_sector_size
        skip = within % sector
        for own, sectors in self.bitmaps.runs(*self.bits(block, within, count)):
            size = min(sectors * sector - skip, count)
            skip = 0
            yield own, size
            count -= size

    def need_bitmap(self, block: int) -> None:
        """Give the block's chunk a bitmap if it has none."""
        index = self._bitmap_index(block)
        if self.table.get(index) & STATE_MASK != BitmapState.PRESENT:
            place = self.space.allocate(BITMAP_SIZE)
            self.bitmaps.start_empty(place, BITMAP_SIZE)
            self.table.set(index, place | BitmapState.PRESENT)

    def _own(self, block: int, within: int, count: int) -> None:
        """These sectors of a block in part are this file's own from now on."""
        self.bitmaps.put(*self.bits(block, within, count), True)
        end = within + count
        if end == self.used(block) and self.bitmaps.all_set(*self.bits(block, 0, end)):
            index = self.index(block)
            self.table.set(index, self.table.get(index) & OFFSET_MASK | _FULL)

    def used(self, block: int) -> int:
        """Bytes of the block that are inside the disk."""
        return min(self._block_size, self._size - (block << self._block_shift))

    # --- writing ------------------------------------------------------------------------------

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        within = offset & self._block_mask
        if (
            self.journal.active
            and offset >= 0
            and offset + length <= self._size
            and within + length <= self._block_size
        ):
            # The quick way, as above.
            block = offset >> self._block_shift
            index = block + (block >> self._ratio_shift)
            entry = self.table.pieces[index >> PIECE_SHIFT][index & PIECE_MASK]
            if entry & STATE_MASK == 6:
                self.file.writev((entry & OFFSET_MASK) + within, buffers)
                return
        check_range(self._size, offset, length)
        self.begin()
        done = 0
        for block, within, count in self._blocks(offset, length):
            self._write_block(block, within, section(buffers, done, count), count)
            self.commit_if_much()
            done += count

    def begin(self) -> None:
        """Announce the first change; :class:`HvHostError` if the disk is read-only."""
        check_writable(self.read_only, self.file.name)
        self.journal.begin(self.next_guid)

    def _write_block(
        self, block: int, within: int, buffers: Sequence[memoryview], count: int
    ) -> None:
        index = self.index(block)
        entry = self.table.get(index)
        state, place = entry & STATE_MASK, entry & OFFSET_MASK
        if state in (_FULL, _PARTIAL):
            self.file.writev(place + within, buffers)
            if state == _PARTIAL:
                self._own(block, within, count)
            return
        partial = (
            self.layout.has_parent
            and state == PayloadState.NOT_PRESENT
            and count < self.used(block)
        )
        if partial:
            self.need_bitmap(block)
        new = self.space.allocate(self._block_size)
        try:
            self.file.writev(new + within, buffers)
        except BaseException:
            self.space.give_back(new, self._block_size)
            raise
        self._take_block(block, new, within, count, partial=partial)

    def _take_block(
        self, block: int, place: int, within: int, count: int, *, partial: bool
    ) -> None:
        """The new block at *place* holds this range; without *partial*, zeros around it."""
        if not partial:
            self.table.set(self.index(block), place | _FULL)
            return
        self.bitmaps.put(*self.bits(block, 0, self._block_size), False)
        self.table.set(self.index(block), place | _PARTIAL)
        self._own(block, within, count)

    def unmap(self, offset: int, length: int) -> None:
        check_range(self._size, offset, length)
        self.begin()
        for block, within, count in self._blocks(offset, length):
            self._unmap_block(block, within, count)
            self.commit_if_much()

    def _unmap_block(self, block: int, within: int, count: int) -> None:
        index = self.index(block)
        entry = self.table.get(index)
        state, place = entry & STATE_MASK, entry & OFFSET_MASK
        from_parent = self.layout.has_parent and state == PayloadState.NOT_PRESENT
        if not from_parent and state not in (_FULL, _PARTIAL):
            return
        if count == self.used(block) and not self._keeps_blocks:
            self.drop_block(index, _ZERO)
        elif not from_parent:
            self.file.clear(place + within, count)
            if state == _PARTIAL:
                self._own(block, within, count)
        elif self.parent is None or (block << self._block_shift) + within < self.parent.size:
            self.need_bitmap(block)
            new = self.space.allocate(self._block_size)
            self._take_block(block, new, within, count, partial=True)

    @property
    def _keeps_blocks(self) -> bool:
        return self.layout.leave_block_allocated

    def drop_block(self, index: int, state: int) -> None:
        """The block's entry becomes *state*; its place, if it had one, is given back."""
        entry = self.table.get(index)
        if entry & STATE_MASK in (_FULL, _PARTIAL):
            block = self.block_of(index)
            short = self.last_block_is_short and block == self.layout.block_count - 1
            length = self.used(block) if short else self._block_size
            self.space.release(entry & OFFSET_MASK, -(-length // ALIGNMENT) * ALIGNMENT)
        if entry != state:
            self.table.set(index, state)

    def block_of(self, index: int) -> int:
        """The block that an entry is for."""
        return index - index // (self._ratio + 1)

    # --- making it stable ---------------------------------------------------------------------

    def flush(self) -> None:
        if self.read_only:
            return
        if self.table.dirty or self.bitmaps.dirty:
            self.commit()
        else:
            self.file.flush()

    def commit_if_much(self) -> None:
        """Before the changes are more than one commit takes."""
        if len(self.table.dirty) + len(self.bitmaps.dirty) >= _COMMIT_AT:
            self.commit()

    def commit(self, more: dict[int, bytes] | None = None) -> None:
        """Changed pages of the table and the bitmaps, and *more*, become stable, all at once."""
        bat = self.layout.bat.file_offset
        pages = {bat + number * PAGE: self.table.page(number) for number in self.table.dirty}
        pages |= {offset: bytes(self.bitmaps.page(offset)) for offset in self.bitmaps.dirty}
        pages |= more or {}
        self.journal.commit(pages)
        self.table.dirty.clear()
        self.bitmaps.dirty.clear()
        self.space.settle()

    def trim(self) -> None:
        """Cut what is free at the file's end, once all changes are stable."""
        assert not self.table.dirty and not self.bitmaps.dirty
        # An entry in the log tells how long the file was: a shorter one would count as cut.
        self.journal.end()
        self.space.trim()

    def resize(self, size: int) -> None:
        check_writable(self.read_only, self.file.name)
        resize(self, size)

    def close(self) -> None:
        try:
            if not self.read_only:
                self.flush()
                self.journal.end()
        finally:
            self.read_only = True
            self.journal.active = False
            self.file.close()
            if self.parent is not None:
                self.parent.close()
