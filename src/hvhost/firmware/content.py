"""Bytes on their way into guest memory: those of a file go there without a stop in between."""

from __future__ import annotations

import os
from pathlib import Path

from hvhost.errors import HvHostError


class FileContent:
    """A file that stays open; copying it lets other threads run."""

    def __init__(self, path: Path) -> None:
        """``OSError`` if it cannot be read."""
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._descriptor).st_size

    def __len__(self) -> int:
        return self._size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # it was opened
            os.close(self._descriptor)

    def fileno(self) -> int:
        """The open descriptor."""
        return self._descriptor

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill *view* with what lies at *offset*; :class:`HvHostError` if the file ends before."""
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if not count:
                raise HvHostError(f"{self._path} became shorter while it was read; start again.")
            view, offset = view[count:], offset + count


Content = bytes | bytearray | memoryview | FileContent


def copy(content: Content, view: memoryview, offset: int = 0) -> None:
    """Fill *view* with what *content* has at *offset*."""
    if isinstance(content, FileContent):
        content.read_into(view, offset)
    else:
        view[:] = memoryview(content)[offset : offset + len(view)]
