"""A mapping and the memory behind it: how much of it there is, and where views of it lie."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

from hvhost.errors import HvHostError
from hvhost.partition.memory import PAGE_SIZE

#: Of shared memory, only removal frees pages. asm-generic/mman-common.h; mmap may lack it.
MADV_REMOVE = 9
_PIECE = 1 << 30


class Residence:
    """What is asked about one mapping; works for anonymous and for shared memory."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._mincore = ctypes.CDLL(None, use_errno=True).mincore

    @property
    def address(self) -> int:
        """Where the mapping begins in this process."""
        return self._base

    def places(self, views: Sequence[memoryview]) -> list[tuple[int, int]]:
        """Offset and size of *views* of the mapping, in order, those that follow each other joined.

        Empty ones are left out.
        """
        found: list[tuple[int, int]] = []
        for view in filter(len, views):
            offset = ctypes.addressof(ctypes.c_char.from_buffer(view)) - self._base
            if found and sum(found[-1]) == offset:
                found[-1] = found[-1][0], found[-1][1] + len(view)
            else:
                found.append((offset, len(view)))
        return found

    def bytes_in(self, offset: int, size: int) -> int:
        """Bytes of ``offset`` to ``offset + size`` that are there, says ``mincore(2)``.

        Both are multiples of a page.
        """
        pages = 0
        for start in range(offset, offset + size, _PIECE):
            length = min(_PIECE, offset + size - start)
            vector = (ctypes.c_ubyte * -(-length // PAGE_SIZE))()
            if self._mincore(ctypes.c_void_p(self._base + start), ctypes.c_size_t(length), vector):
                reason = os.strerror(ctypes.get_errno())
                raise HvHostError(f"this computer does not tell what memory it holds: {reason}.")
            pages += bytes(vector).translate(_LOWEST_BIT).count(1)
        return pages * PAGE_SIZE


# Only the lowest bit of each byte is defined.
_LOWEST_BIT = bytes(value & 1 for value in range(256))
