"""Image files in memory: one that is as slow as nothing, one that remembers how it was written."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Write:
    """*data* went to *offset*."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Clear:
    """*length* bytes at *offset* became zeros."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """The file got *size*."""

    size: int


@dataclass(frozen=True, slots=True)
class Flush:
    """All before is on stable storage."""


Operation = Write | Clear | Truncate | Flush


def apply(content: bytearray, operations: Iterable[Operation]) -> None:
    """Do *operations* to *content*."""
    for operation in operations:
        match operation:
            case Write(offset, data):
                content.extend(bytes(max(0, offset - len(content))))
                content[offset : offset + len(data)] = data
            case Clear(offset, length):
                end = min(offset + length, len(content))
                content[offset:end] = bytes(max(0, end - offset))
            case Truncate(size):
                del content[size:]
                content.extend(bytes(size - len(content)))


class MemoryFile:
    """An image file in memory that records what is done to it."""

    name = "memory"

    def __init__(self, content: bytearray | bytes = b"") -> None:
        self.content = bytearray(content)
        self.recorded: list[Operation] = []

    def _do(self, operation: Operation) -> None:
        self.recorded.append(operation)
        apply(self.content, [operation])

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            if offset + len(buffer) > len(self.content):
                raise OSError(errno.EIO, "the file ends before the data")
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        if offset + length > len(self.content):
            return False
        self.readv(offset, buffers)
        return True

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._do(Write(offset, b"".join(buffers)))

    def clear(self, offset: int, length: int) -> None:
        self._do(Clear(offset, length))

    def size(self) -> int:
        return len(self.content)

    def truncate(self, size: int) -> None:
        self._do(Truncate(size))

    def reserve(self, offset: int, length: int) -> None:
        if offset + length > len(self.content):
            self.truncate(offset + length)

    def may_have_data(self, offset: int, length: int) -> bool:
        part = self.content[offset : offset + length]
        return part != bytes(len(part))

    def flush(self) -> None:
        self._do(Flush())

    def allocated(self) -> int:
        return len(self.content)

    def close(self) -> None: ...
