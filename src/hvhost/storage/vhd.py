"""VHD disks: fixed, dynamic and differencing.

VHD has no log. Its order of writes keeps it whole: data is stable before the sector bitmap that
names its sectors, that before the table that names its block. The footer of a dynamic file stands
at its end, which a crash can lose, and in its first sector, which is taken then.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from uuid import UUID

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.bits import runs
from hvhost.storage.bounds import check_range, check_writable
from hvhost.storage.buffers import clear, section
from hvhost.storage.disk import ImageDisk, read_parent
from hvhost.storage.file import ImageFile, read_exactly, write_all
from hvhost.storage.vhd_format import (
    DYNAMIC_COOKIE,
    DYNAMIC_HEADER_SIZE,
    FOOTER_COOKIE,
    FOOTER_SIZE,
    MAXIMUM_BLOCK_SIZE,
    MAXIMUM_SIZE,
    SECTOR,
    UNUSED_BLOCK,
    DiskType,
    DynamicHeader,
    Footer,
    bitmap_size,
    checksum_is_right,
    packed,
)
from hvhost.storage.vhd_resize import resize

_PAGE = 4096
_MAXIMUM_BITMAPS = 4096
_ENTRIES_PER_PAGE = _PAGE // 4
# In bitmaps of VHD the highest bit of a byte is its first.
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def read_footer(file: ImageFile) -> Footer:
    """The footer that counts; :class:`DiskError` if there is none."""
    # The end first: a fixed disk's first sector is the guest's, and may look like a footer.
    end = file.size() - FOOTER_SIZE
    for offset in (end, 0) if end >= 0 else ():
        footer = Footer.unpack(read_exactly(file, offset, FOOTER_SIZE))
        is_valid = footer.cookie == FOOTER_COOKIE and checksum_is_right(footer)
        if is_valid and (offset or footer.disk_type != DiskType.FIXED):
            break
    else:
        raise DiskError(f"{file.name} has no valid VHD footer; it is no VHD, or was cut.")
    if not 0 < footer.current_size <= MAXIMUM_SIZE or footer.current_size % SECTOR:
        raise DiskError(f"{file.name} holds a disk of {footer.current_size} bytes; no VHD can.")
    return footer


class VhdDisk:
    """An open VHD file; see :mod:`hvhost.storage.disk` for the rules."""

    logical_sector_size = SECTOR
    physical_sector_size = SECTOR

    def __init__(self, file: ImageFile, *, read_only: bool = False) -> None:
        """Takes *file* over; :class:`DiskError` if it is damaged.

        A differencing one wants its parent by :meth:`attach` before data is read.
        """
        self.file = file
        self.read_only = read_only
        self.parent: ImageDisk | None = None
        self.footer = read_footer(file)
        self.header: DynamicHeader | None = None
        self.table = array("I")
        self._dirty_pages: set[int] = set()
        self.bitmaps: dict[int, bytearray] = {}
        self._dirty_bitmaps: set[int] = set()
        self.end = self.footer.current_size
        if self.footer.disk_type == DiskType.FIXED:
            if self.footer.current_size + FOOTER_SIZE > file.size():
                raise DiskError(f"{file.name} is shorter than its disk; it was cut.")
        elif self.footer.disk_type in (DiskType.DYNAMIC, DiskType.DIFFERENCING):
            self._read_dynamic()
        else:
            raise DiskError(f"{file.name} is a VHD of type {self.footer.disk_type}; it is unknown.")

    def _read_dynamic(self) -> None:
        file, place = self.file, self.footer.data_offset
        if place % SECTOR or place + DYNAMIC_HEADER_SIZE > file.size():
            raise DiskError(f"{file.name} has its header outside the file; it is damaged.")
        header = DynamicHeader.unpack(read_exactly(file, place, DYNAMIC_HEADER_SIZE))
        if header.cookie != DYNAMIC_COOKIE or not checksum_is_right(header):
            raise DiskError(f"{file.name} has no valid dynamic disk header; it is damaged.")
        block_size, entries = header.block_size, header.maximum_table_entries
        if not SECTOR <= block_size <= MAXIMUM_BLOCK_SIZE or block_size & (block_size - 1):
            raise DiskError(f"{file.name} has blocks of {block_size} bytes; it is damaged.")
        count = -(-self.size // block_size)
        if count > entries or header.table_offset + 4 * entries > file.size():
            raise DiskError(f"{file.name} has a block table that does not fit; it is damaged.")
        self.header = header
        self.table.frombytes(read_exactly(file, header.table_offset, 4 * count))
        self.table.byteswap()
        self.bitmap_size = bitmap_size(block_size)
        self._survey(place, header)

    def _survey(self, place: int, header: DynamicHeader) -> None:
        """Find the end of what is used; refuse blocks outside the file or on each other."""
        extents = [
            (0, FOOTER_SIZE),
            (place, DYNAMIC_HEADER_SIZE),
            (header.table_offset, 4 * header.maximum_table_entries),
        ]
        whole = self.bitmap_size + header.block_size
        extents += [(each * SECTOR, whole) for each in self.table if each != UNUSED_BLOCK]
        extents.sort()
        for (first, length), (second, _) in pairwise(extents):
            if first + length > second:
                raise DiskError(
                    f"{self.file.name} has two things at one place, at {second} in the file; "
                    "it is damaged."
                )
        self.end = sum(extents[-1])
        if self.end > self.file.size():
            raise DiskError(f"{self.file.name} has a block outside the file; it is damaged.")

    @property
    def size(self) -> int:
        return self.footer.current_size

    @property
    def identifier(self) -> UUID:
        return UUID(bytes=self.footer.unique_id)

    @property
    def allocated(self) -> int:
        return self.file.allocated()

    @property
    def has_parent(self) -> bool:
        """Whether it is a differencing disk."""
        return self.footer.disk_type == DiskType.DIFFERENCING

    def attach(self, parent: ImageDisk) -> None:
        """Take over the disk that this one is the difference to."""
        if parent.logical_sector_size != SECTOR:
            raise DiskError(f"{self.file.name} and its parent differ in their sector size.")
        self.parent = parent

    # --- reading ------------------------------------------------------------------------------

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = check_range(self.size, offset, buffers)
        if self.header is None:
            self.file.readv(offset, buffers)
            return
        done = 0
        for block, within, count in self._blocks(offset, length):
            self._read_block(block, within, section(buffers, done, count), count)
            done += count

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        if offset < 0 or offset + length > self.size:
            return False
        if self.header is not None:
            block, within = divmod(offset, self.header.block_size)
            if (
                self.has_parent
                or within + length > self.header.block_size
                or self.table[block] == UNUSED_BLOCK
            ):
                return False
            offset = self.data(block) + within
        return self.file.read_now(offset, length, buffers)

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        assert self.header is not None
        size = self.header.block_size
        while length:
            block, within = divmod(offset, size)
            count = min(length, size - within)
            yield block, within, count
            offset += count
            length -= count

    def data(self, block: int) -> int:
        """Where the block's data is."""
        return self.table[block] * SECTOR + self.bitmap_size

    def _read_block(
        self, block: int, within: int, buffers: Sequence[memoryview], count: int
    ) -> None:
        assert self.header is not None
        start = block * self.header.block_size + within
        if self.table[block] == UNUSED_BLOCK:
            self._read_parent(start, buffers, count)
        elif not self.has_parent:
            self.file.readv(self.data(block) + within, buffers)
        else:
            done = 0
            for own, size in self._runs(block, within, count):
                part = section(buffers, done, size)
                if own:
                    self.file.readv(self.data(block) + within + done, part)
                else:
                    self._read_parent(start + done, part, size)
                done += size

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range may be something else than zeros."""
        if self.header is None:
            return self.file.may_have_data(offset, length)
        for block, within, count in self._blocks(offset, min(length, self.size - offset)):
            start = block * self.header.block_size + within
            if self.table[block] != UNUSED_BLOCK:
                return True
            if (
                self.parent is not None
                and start < self.parent.size
                and self.parent.may_have_data(start, count)
            ):
                return True
        return False

    def own_ranges(self) -> Iterator[tuple[int, int, bool]]:
        """Offset, length and True, of what is not the parent's."""
        for block, within, count in self._blocks(0, self.size):
            start = block * (self.header.block_size if self.header is not None else 0) + within
            if self.table[block] != UNUSED_BLOCK:
                for own, size in self._runs(block, within, count):
                    if own:
                        yield start, size, True
                    start += size

    def _read_parent(self, offset: int, buffers: Sequence[memoryview], count: int) -> None:
        if self.has_parent:
            read_parent(self.file.name, self.parent, offset, buffers, count)
        else:
            clear(section(buffers, 0, count))

    def _bitmap(self, block: int) -> bytearray:
        bitmap = self.bitmaps.get(block)
        if bitmap is None:
            raw = read_exactly(self.file, self.table[block] * SECTOR, self.bitmap_size)
            bitmap = self.bitmaps[block] = raw.translate(_REVERSED)
        return bitmap

    def _runs(self, block: int, within: int, count: int) -> Iterator[tuple[bool, int]]:
        """Whether the bytes are this file's own, and how many, for each run."""
        first, sectors = within // SECTOR, count // SECTOR
        data = self._bitmap(block)[first // 8 : -(-(first + sectors) // 8)]
        for own, length in runs(int.from_bytes(data, "little") >> first % 8, sectors):
            yield own, length * SECTOR

    # --- writing ------------------------------------------------------------------------------

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = check_range(self.size, offset, buffers)
        check_writable(self.read_only, self.file.name)
        if self.header is None:
            self.file.writev(offset, buffers)
            return
        done = 0
        for block, within, count in self._blocks(offset, length):
            new = self.table[block] == UNUSED_BLOCK
            place = self._new_place() if new else self.table[block] * SECTOR
            self.file.writev(place + self.bitmap_size + within, section(buffers, done, count))
            self._settle_block(block, place, within, count)
            done += count

    def _new_place(self) -> int:
        """Where the next block begins: its data at a page of the host's."""
        assert self.header is not None
        # The old footer, and what a crash left, must not be read as part of the new block.
        self.file.truncate(self.end)
        data = -(-(self.end + self.bitmap_size) // _PAGE) * _PAGE
        self.file.truncate(data + self.header.block_size)
        write_all(self.file, data + self.header.block_size, packed(self.footer))
        return data - self.bitmap_size

    def _settle_block(self, block: int, place: int, within: int, count: int) -> None:
        """The range of a block, a new one perhaps, is this file's own now."""
        assert self.header is not None
        if self.table[block] == UNUSED_BLOCK:
            fill = b"\0" if self.has_parent else b"\xff"
            self.bitmaps[block] = bytearray(fill * self.bitmap_size)
            self._dirty_bitmaps.add(block)
            self.end = place + self.bitmap_size + self.header.block_size
            self.table[block] = place // SECTOR
            self._dirty_pages.add(block // _ENTRIES_PER_PAGE)
        if self.has_parent:
            bitmap = self._bitmap(block)
            first, sectors = within // SECTOR, count // SECTOR
            start, end = first // 8, -(-(first + sectors) // 8)
            mask = ((1 << sectors) - 1) << first % 8
            old = int.from_bytes(bitmap[start:end], "little")
            if old | mask != old:
                bitmap[start:end] = (old | mask).to_bytes(end - start, "little")
                self._dirty_bitmaps.add(block)

    def unmap(self, offset: int, length: int) -> None:
        check_range(self.size, offset, length)
        check_writable(self.read_only, self.file.name)
        if self.header is None:
            self.file.clear(offset, length)
            return
        for block, within, count in self._blocks(offset, length):
            if self.table[block] != UNUSED_BLOCK:
                self.file.clear(self.data(block) + within, count)
                self._settle_block(block, self.table[block] * SECTOR, within, count)
            elif self.has_parent:
                self._settle_block(block, self._new_place(), within, count)

    def flush(self) -> None:
        if self.read_only:
            return
        self.file.flush()
        if self._dirty_bitmaps:
            for block in self._dirty_bitmaps:
                raw = self.bitmaps[block].translate(_REVERSED)
                write_all(self.file, self.table[block] * SECTOR, raw)
            self.file.flush()
            self._dirty_bitmaps.clear()
            if len(self.bitmaps) > _MAXIMUM_BITMAPS:
                self.bitmaps.clear()
        if self._dirty_pages and self.header is not None:
            for page in self._dirty_pages:
                first = page * _ENTRIES_PER_PAGE
                self.write_table(first, self.table[first : first + _ENTRIES_PER_PAGE])
            self.file.flush()
            self._dirty_pages.clear()

    def write_table(self, first: int, entries: array[int]) -> None:
        """Put entries where they belong in the file."""
        assert self.header is not None
        entries = entries[:]
        entries.byteswap()
        write_all(self.file, self.header.table_offset + 4 * first, entries.tobytes())

    def resize(self, size: int) -> None:
        check_writable(self.read_only, self.file.name)
        if not 0 < size <= MAXIMUM_SIZE or size % SECTOR:
            raise HvHostError(
                f"{self.file.name} cannot have {size} bytes; name a multiple of 512 up to 2040G."
            )
        if self.has_parent:
            raise HvHostError(
                f"{self.file.name} is a differencing VHD, whose size is its parent's; "
                "convert it to VHDX to resize it."
            )
        self.flush()
        resize(self, size)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.read_only = True
            self.file.close()
            if self.parent is not None:
                self.parent.close()
