"""GPADLs: lists of guest pages which the guest lends to the host under a number.

Source: ``linux/hyperv.h`` (``gpa_range``, GPADL messages). A list longer than one message arrives
as a header and bodies. Everything here belongs to one connection and is bounded: the guest decides
neither how much memory the host spends nor how many numbers it keeps.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from hvhost.errors import GuestMemoryError, RemoteProtocolError
from hvhost.partition.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from hvhost.vmbus.saved import SavedGpadl

#: GPADLs of one connection, finished and unfinished together.
MAX_GPADLS: Final = 4096
#: Pages of all GPADLs of one connection (4 GiB of guest memory, 8 MiB of host memory).
MAX_PAGES: Final = 1 << 20

_RANGE = struct.Struct("<II")
#: A range of one page.
_PAGE_BUFFER_SIZE: Final = 16
#: So many of them, and so many pages of one, are looked at together; drivers name up to 32
#: (``MAX_PAGE_BUFFER_COUNT``).
_MANY: Final = 64
#: Lists of pages in a row that are remembered: a guest sends from the same pages again and again.
_ROWS: Final = 1024


class GpaRange(NamedTuple):
    """``struct gpa_range``: *byte_count* bytes from *byte_offset* in the first of *pfns*.

    Page frame numbers come from the guest and are checked by :class:`GuestMemory` when used.
    """

    byte_count: int
    byte_offset: int
    pfns: array[int]

    def views(self, memory: GuestMemory) -> list[memoryview]:
        """The range as writable views in order, pages that follow each other joined; no copy.

        :class:`hvhost.errors.GuestMemoryError` if a page is not RAM.
        """
        views, left, offset = [], self.byte_count, self.byte_offset
        pfns, index, count = self.pfns, 0, len(self.pfns)
        if count > 1 and _in_a_row(pfns):
            length = min(left, count * PAGE_SIZE - offset)
            return _run(memory, (pfns[0] << PAGE_SHIFT) + offset, length) if left else []
        while index < count and left:
            start = index
            index += 1
            while index < count and pfns[index] == pfns[index - 1] + 1:
                index += 1
            length = min(left, (index - start) * PAGE_SIZE - offset)
            views += _run(memory, (pfns[start] << PAGE_SHIFT) + offset, length)
            left -= length
            offset = 0
        return views


def _in_a_row(pfns: array[int]) -> bool:
    """Whether each page follows the one before, seen at C's speed; there is at least one."""
    first, count = pfns[0], len(pfns)
    return pfns[-1] - first == count - 1 and pfns == array("Q", range(first, first + count))


def _run(memory: GuestMemory, address: int, length: int) -> list[memoryview]:
    """Neighbouring pages, as one view unless one region of RAM ends where another begins."""
    try:
        return [memory.view(address, length)]
    except GuestMemoryError:
        views = []
        while length:
            piece = min(length, PAGE_SIZE - address % PAGE_SIZE)
            views.append(memory.view(address, piece))
            address, length = address + piece, length - piece
        return views


@functools.lru_cache(maxsize=_MANY + 1)
def _page_buffers(count: int) -> struct.Struct:
    return struct.Struct("<" + count * "IIQ")


@functools.lru_cache(maxsize=_ROWS)
def _row(numbers: bytes) -> int:
    """The first of page *numbers* that follow each other; -1 if they do not."""
    pfns = array("Q", numbers)
    return pfns[0] if _in_a_row(pfns) else -1


def range_views(data: bytes, count: int, start: int, memory: GuestMemory) -> list[memoryview]:
    """The views of :func:`parse_ranges`, all in a row, neighbours joined; its errors, and theirs.

    Network drivers name either each page in a range of its own (``struct hv_page_buffer``) or each
    piece of a packet (``struct hv_mpb_array``); both come often, and few Python steps suffice.
    """
    if not 1 < count <= _MANY:
        return _views_one_by_one(data, count, start, memory)
    if len(data) - start == count * _PAGE_BUFFER_SIZE:
        items = iter(_page_buffers(count).unpack_from(data, start))
        pieces = _pages(zip(items, items, items, strict=True))
    else:
        pieces = _pieces(data, count, start)
    if not pieces:
        return _views_one_by_one(data, count, start, memory)
    views: list[memoryview] = []
    address = end = 0
    for here, length in pieces:
        if here == end:
            end += length
            continue
        if end:
            views += _run(memory, address, end - address)
        address, end = here, here + length
    return views + _run(memory, address, end - address)


def _pages(items: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Address and length of each (length, offset, page); empty if one is not within one page."""
    pieces: list[tuple[int, int]] = []
    for length, offset, pfn in items:
        if not 0 < length <= PAGE_SIZE - offset:
            return []
        pieces.append(((pfn << PAGE_SHIFT) + offset, length))
    return pieces


def _pieces(data: bytes, count: int, start: int) -> list[tuple[int, int]]:
    """Address and length of each range; empty if they are not all of pages in a row."""
    pieces: list[tuple[int, int]] = []
    position, size = start, len(data)
    for _ in range(count):
        begin = position + _RANGE.size
        if begin > size:
            return []
        length, offset = _RANGE.unpack_from(data, position)
        position = begin + (offset + length + PAGE_SIZE - 1 >> PAGE_SHIFT) * 8
        if position > size or position > begin + 8 * _MANY or offset >= PAGE_SIZE or not length:
            return []
        first = _row(data[begin:position])
        if first < 0:
            return []
        pieces.append(((first << PAGE_SHIFT) + offset, length))
    return pieces


def _views_one_by_one(data: bytes, count: int, start: int, memory: GuestMemory) -> list[memoryview]:
    ranges = parse_ranges(data, count, start)
    return [view for item in ranges for view in item.views(memory)]


def parse_ranges(data: bytes, count: int, start: int = 0) -> tuple[GpaRange, ...]:
    """*count* ``gpa_range`` structures that fill *data* from *start* on, exactly or with a rest.

    :class:`RemoteProtocolError` if they do not fit in it or an offset lies behind the first page.
    """
    ranges, position = [], start
    for number in range(count):
        if len(data) - position < _RANGE.size:
            raise RemoteProtocolError(f"range {number} of {count} is missing in the page list.")
        byte_count, byte_offset = _RANGE.unpack_from(data, position)
        position += _RANGE.size
        if byte_offset >= PAGE_SIZE:
            raise RemoteProtocolError(
                f"range {number} starts at byte {byte_offset:#x}, behind its first page."
            )
        end = position + (byte_offset + byte_count + PAGE_SIZE - 1 >> PAGE_SHIFT) * 8
        if end > len(data):
            raise RemoteProtocolError(
                f"range {number} of {byte_count} bytes needs {end - position >> 3} page numbers, "
                f"the list has {len(data) - position >> 3}."
            )
        ranges.append(GpaRange(byte_count, byte_offset, array("Q", data[position:end])))
        position = end
    return tuple(ranges)


def pack_ranges(ranges: tuple[GpaRange, ...]) -> bytes:
    """The wire form of *ranges*."""
    return b"".join(
        _RANGE.pack(item.byte_count, item.byte_offset) + item.pfns.tobytes() for item in ranges
    )


@dataclass(frozen=True, slots=True)
class Gpadl:
    """A finished list; all its pages were RAM when it was made."""

    handle: int
    channel_id: int
    ranges: tuple[GpaRange, ...]

    @property
    def page_count(self) -> int:
        return sum(len(item.pfns) for item in self.ranges)

    def ring_pages(self) -> array[int]:
        """The page frame numbers of a ring pair: one range of whole pages.

        :class:`RemoteProtocolError` if the list is of another shape.
        """
        if len(self.ranges) != 1:
            raise RemoteProtocolError(
                f"GPADL {self.handle:#x} has {len(self.ranges)} ranges, a ring buffer has one."
            )
        (item,) = self.ranges
        if item.byte_offset or item.byte_count & PAGE_SIZE - 1:
            raise RemoteProtocolError(
                f"GPADL {self.handle:#x} is not made of whole pages, a ring buffer must be."
            )
        return item.pfns


@dataclass(slots=True)
class _Partial:
    channel_id: int
    range_count: int
    size: int
    data: bytearray


class GpadlTable:
    """The GPADLs of one connection."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._finished: dict[int, Gpadl] = {}
        self._partial: dict[int, _Partial] = {}
        self._pages = 0

    def __len__(self) -> int:
        return len(self._finished) + len(self._partial)

    @property
    def pages(self) -> int:
        """Pages of all lists, as far as the limit counts them."""
        return self._pages

    def start(
        self, channel_id: int, handle: int, range_count: int, size: int, data: bytes
    ) -> Gpadl | None:
        """A GPADL header; the finished list, or ``None`` while page numbers are missing."""
        if handle in self._finished or handle in self._partial:
            raise RemoteProtocolError(f"GPADL {handle:#x} exists already.")
        if len(self) >= MAX_GPADLS:
            raise RemoteProtocolError(
                f"GPADL {handle:#x} is one more than the {MAX_GPADLS} a guest may have."
            )
        if not range_count or size < range_count * _RANGE.size or size & 7:
            raise RemoteProtocolError(
                f"GPADL {handle:#x} announces {range_count} ranges in {size} bytes."
            )
        pages = size - range_count * _RANGE.size >> 3
        if self._pages + pages > MAX_PAGES:
            raise RemoteProtocolError(
                f"GPADL {handle:#x} exceeds the {MAX_PAGES} pages a guest may lend at once."
            )
        self._pages += pages
        self._partial[handle] = _Partial(channel_id, range_count, size, bytearray())
        return self.extend(handle, data)

    def extend(self, handle: int, data: bytes) -> Gpadl | None:
        """A GPADL body; the list if this finished it. A wrong one is forgotten."""
        partial = self._partial.get(handle)
        if partial is None:
            raise RemoteProtocolError(f"GPADL {handle:#x} is not waiting for page numbers.")
        if len(partial.data) + len(data) > partial.size or len(data) & 7:
            self.remove(handle)
            raise RemoteProtocolError(
                f"GPADL {handle:#x} of {partial.size} bytes was sent {len(data)} bytes on top of "
                f"{len(partial.data)}."
            )
        partial.data += data
        if len(partial.data) < partial.size:
            return None
        try:
            ranges = parse_ranges(bytes(partial.data), partial.range_count)
            if sum(_RANGE.size + 8 * len(item.pfns) for item in ranges) != partial.size:
                raise RemoteProtocolError(f"GPADL {handle:#x} lists more pages than it describes.")
            for item in ranges:
                item.views(self._memory)
        except RemoteProtocolError:
            self.remove(handle)
            raise
        del self._partial[handle]
        gpadl = self._finished[handle] = Gpadl(handle, partial.channel_id, ranges)
        return gpadl

    def save(self) -> tuple[SavedGpadl, ...]:
        """Every list as the guest sent it, so far as it came; :meth:`start` takes it back."""
        finished = [
            (gpadl.handle, gpadl.channel_id, len(gpadl.ranges), pack_ranges(gpadl.ranges))
            for gpadl in self._finished.values()
        ]
        return (
            *(
                SavedGpadl(handle, channel, count, len(data), data)
                for handle, channel, count, data in finished
            ),
            *(
                SavedGpadl(handle, each.channel_id, each.range_count, each.size, bytes(each.data))
                for handle, each in self._partial.items()
            ),
        )

    def channel_of(self, handle: int) -> int | None:
        """The channel for which *handle* was made, finished or not."""
        entry = self._finished.get(handle) or self._partial.get(handle)
        return entry.channel_id if entry else None

    def get(self, handle: int, channel_id: int) -> Gpadl:
        """The finished list *handle* of that channel, or :class:`RemoteProtocolError`."""
        gpadl = self._finished.get(handle)
        if gpadl is None or gpadl.channel_id != channel_id:
            raise RemoteProtocolError(f"GPADL {handle:#x} is none of channel {channel_id}.")
        return gpadl

    def remove(self, handle: int) -> None:
        """Forget *handle*, finished or not; :class:`RemoteProtocolError` if there is none."""
        partial, gpadl = self._partial.pop(handle, None), self._finished.pop(handle, None)
        if partial is not None:
            self._pages -= partial.size - partial.range_count * _RANGE.size >> 3
        elif gpadl is not None:
            self._pages -= gpadl.page_count
        else:
            raise RemoteProtocolError(f"GPADL {handle:#x} does not exist.")

    def remove_channel(self, channel_id: int) -> None:
        """Forget every list of a channel that is gone."""
        for table in (self._finished, self._partial):
            for handle in [key for key, entry in table.items() if entry.channel_id == channel_id]:
                self.remove(handle)
