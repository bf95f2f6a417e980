"""Sector bitmaps of a differencing VHDX, [MS-VHDX] 2.4: which sectors are this file's own.

A bitmap covers 2**23 sectors, a bit each; pages of it are kept in memory as they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from hvhost.storage.bits import runs
from hvhost.storage.vhdx_layout import PAGE, ReplayedFile

_BITS = PAGE * 8
_MAXIMUM_PAGES = 4096


class SectorBitmaps:
    """Bits by the offset of their bitmap in the file, and by number in that bitmap."""

    def __init__(self, replayed: ReplayedFile) -> None:
        self._replayed = replayed
        self._pages: dict[int, bytearray] = {}
        self.dirty: set[int] = set()

    def page(self, offset: int) -> bytearray:
        """The page of the file at *offset*."""
        page = self._pages.get(offset)
        if page is None:
            if len(self._pages) >= _MAXIMUM_PAGES:
                self._pages = {each: self._pages[each] for each in self.dirty}
            page = self._pages[offset] = self._replayed.read(offset, PAGE)
        return page

    def forget(self) -> None:
        """Read all anew when it is needed: for when pages have moved."""
        assert not self.dirty
        self._pages.clear()

    def start_empty(self, place: int, length: int) -> None:
        """A new bitmap at *place*: nothing there is to be read from the file."""
        for offset in range(place, place + length, PAGE):
            self._pages.pop(offset, None)

    def _parts(self, place: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Page, first bit in it and number of bits, for each page that the bits are in."""
        while count:
            number, within = divmod(first, _BITS)
            here = min(count, _BITS - within)
            yield place + number * PAGE, within, here
            first += here
            count -= here

    def runs(self, place: int, first: int, count: int) -> Iterator[tuple[bool, int]]:
        """Runs of bits that are alike: whether set, and how many."""
        for offset, within, here in self._parts(place, first, count):
            start = within // 8
            data = self.page(offset)[start : -(-(within + here) // 8)]
            bits = int.from_bytes(data, "little") >> within % 8
            yield from runs(bits, here)

    def put(self, place: int, first: int, count: int, value: bool) -> None:
        """Set or clear bits."""
        for offset, within, here in self._parts(place, first, count):
            page = self.page(offset)
            start, end = within // 8, -(-(within + here) // 8)
            bits = int.from_bytes(page[start:end], "little")
            mask = ((1 << here) - 1) << within % 8
            changed = bits | mask if value else bits & ~mask
            if changed != bits:
                page[start:end] = changed.to_bytes(end - start, "little")
                self.dirty.add(offset)

    def all_set(self, place: int, first: int, count: int) -> bool:
        """Whether all these bits are set."""
        return all(value for value, _ in self.runs(place, first, count))
