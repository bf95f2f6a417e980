"""Who may use which part of an image file: extents in use, gaps between them, the end."""

from __future__ import annotations

from bisect import bisect_left, insort

from hvhost.storage.file import ImageFile


class Space:
    """The free space of an image file, in units of *alignment* bytes.

    What is released may still be named by metadata on stable storage: it is free for others only
    after :meth:`settle`, to be called once the metadata that no longer names it is stable.
    """

    def __init__(self, file: ImageFile, extents: list[tuple[int, int]], alignment: int) -> None:
        """*extents*: offset and length of all in use, sorted, none overlapping."""
        self._file = file
        self._alignment = alignment
        self._gaps: list[tuple[int, int]] = []
        self._released: list[tuple[int, int]] = []
        self.end = 0
        for offset, length in extents:
            start = self._aligned(self.end)
            if offset > start:
                self._gaps.append((start, offset - start))
            self.end = offset + length
        self.end = self._aligned(self.end)
        tail = self._aligned(file.size()) - self.end
        if tail > 0:  # a crash left it, or someone else's program
            self._gaps.append((self.end, tail))
            self.end += tail

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._alignment) * self._alignment

    @property
    def free(self) -> int:
        """Bytes of gaps."""
        return sum(length for _, length in self._gaps)

    def allocate(self, length: int) -> int:
        """The offset of *length* bytes that read as zeros, in a gap or at the end."""
        offset = self.allocate_gap(length)
        if offset is None:
            offset = self.end
            self._extend(offset + length)
            self.end = offset + length
        return offset

    def allocate_gap(self, length: int, *, below: int | None = None) -> int | None:
        """The same in the first gap that is long enough, before *below*; None if there is none."""
        for index, (offset, available) in enumerate(self._gaps):
            if available < length:
                continue
            if below is not None and offset + length > below:
                return None
            self._extend(offset + length)
            self._file.clear(offset, length)
            if available > length:
                self._gaps[index] = (offset + length, available - length)
            else:
                del self._gaps[index]
            return offset
        return None

    def _extend(self, end: int) -> None:
        if self._file.size() < end:
            self._file.truncate(end)

    def release(self, offset: int, length: int) -> None:
        """The range is no longer used; see the class's text."""
        self._released.append((offset, length))

    def give_back(self, offset: int, length: int) -> None:
        """The range was allocated and never named by any metadata: free at once."""
        index = bisect_left(self._gaps, (offset, 0))
        if index < len(self._gaps) and self._gaps[index][0] == offset + length:
            length += self._gaps.pop(index)[1]
        if index and sum(self._gaps[index - 1]) == offset:
            before, size = self._gaps.pop(index - 1)
            offset, length = before, size + length
        insort(self._gaps, (offset, length))

    def settle(self) -> None:
        """What was released is free now, and its storage goes back to the host."""
        released, self._released = self._released, []
        for offset, length in released:
            self._file.clear(offset, length)
            self.give_back(offset, length)

    def trim(self) -> None:
        """Cut the file where nothing but a gap follows."""
        if self._gaps and sum(self._gaps[-1]) == self.end:
            self.end, _ = self._gaps.pop()
            if self._file.size() > self.end:
                self._file.truncate(self.end)
