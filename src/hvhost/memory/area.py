"""Where hot-added memory goes; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.memory.protocol import RANGE_PAGES_MAX, PageRange

#: Most pages of one request; a guest that puts memory online slowly still answers now and then.
REQUEST_PAGES_MAX = min(1 << 19, RANGE_PAGES_MAX)


@dataclass(slots=True)
class HotAddArea:
    """Guest page frames from *start* to *end* that no memory and no device lies at.

    The guest adds memory in blocks of its alignment. ``covered`` is where the pages end that it
    took, ``block_end`` where the block ends that it has begun.
    """

    start: int
    end: int
    covered: int = 0
    block_end: int = 0

    def __post_init__(self) -> None:
        self.covered = self.block_end = self.start

    @property
    def room(self) -> int:
        """Pages that may still be added."""
        return self.end - self.covered

    def next(self, count: int, alignment: int) -> tuple[PageRange, PageRange | None] | None:
        """Up to *count* pages to add next, and the region to announce with them.

        A block that was begun is filled first, without a region. *alignment* is in pages, a power
        of two. ``None`` when there is no room.
        """
        count = min(count, REQUEST_PAGES_MAX)
        if self.covered < self.block_end:
            return PageRange(self.covered, min(count, self.block_end - self.covered)), None
        start = -(-self.covered // alignment) * alignment
        blocks = min(-(-count // alignment), (self.end - start) // alignment)
        if blocks <= 0:
            return None
        region = PageRange(start, blocks * alignment)
        return PageRange(start, min(count, region.count)), region

    def taken(self, pages: PageRange, region: PageRange | None, count: int) -> None:
        """The guest took *count* of the *pages* it was offered with *region*."""
        if region is not None and count:
            self.block_end = region.end
        if region is None or count:
            self.covered = pages.start + count

    def forget_block(self) -> None:
        """The driver that had begun a block is gone; the next one begins another."""
        self.covered = self.block_end
