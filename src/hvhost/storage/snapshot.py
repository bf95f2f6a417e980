"""A disk that goes on being used while what it held at one moment is copied away.

Copy before write: the guest's disk stays the file it was, and before a part of it is overwritten
for the first time, that part goes into the copy. So nothing has to be merged afterwards, whatever
ends the copy, and any format can be copied. The price is paid by the first write to each part
(:data:`CHUNK` bytes) that the copy has not reached: it waits for a read and a write of that part.

A copy that fails never fails the guest: :attr:`Snapshot.problem` says why, and writes go on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from hvhost.errors import HvHostError
from hvhost.storage.backup_base import Keeper
from hvhost.storage.buffers import total
from hvhost.storage.disk import ImageDisk

#: Bytes that are kept at once when the guest overwrites one of them.
CHUNK: Final = 64 << 10
#: Chunks that are read at once for the copy, while the guest's commands wait.
STEP: Final = 16
#: Pieces without data that are looked at before the guest's commands get their turn.
_LOOKS: Final = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """What :meth:`Snapshot.take` read: *data*, if there is any, and the chunk to go on with.

    ``zeros`` are ranges, offset and length, without data that were passed on the way.
    """

    offset: int
    data: memoryview
    following: int
    zeros: tuple[tuple[int, int], ...] = ()


class Snapshot:
    """Implements :class:`hvhost.storage.disk.Disk` for the guest, on top of *disk*.

    *keeper* is given all of what *disk* was, each part once. :meth:`take` is called by the thread
    that uses the disk, :meth:`put` by another.
    """

    def __init__(self, disk: ImageDisk, keeper: Keeper) -> None:
        self.disk, self.keeper = disk, keeper
        self.problem: str | None = None
        self._chunks = -(-disk.size // CHUNK)
        # One byte for each chunk: 1 if it is in the copy, or read for it.
        self._kept = bytearray(self._chunks)
        self._writing = threading.Lock()
        self._buffer = memoryview(bytearray(STEP * CHUNK))

    # For the copy.

    def take(self, chunk: int) -> Piece | None:
        """The next piece from *chunk* on that is not kept yet, ``None`` at the end.

        Its data are valid until the next call. :class:`OSError` if they cannot be read.
        """
        empty, zeros = self._buffer[:0], list[tuple[int, int]]()
        for _ in range(_LOOKS):
            first = self._kept.find(0, chunk)
            if first < 0:
                if not zeros:
                    return None
                break
            end = self._kept.find(1, first, first + STEP)
            if end < 0:
                end = min(first + STEP, self._chunks)
            offset, length = self._place(first, end)
            self._kept[first:end] = b"\1" * (end - first)
            chunk = end
            if self.disk.may_have_data(offset, length):
                data = self._buffer[:length]
                self.disk.readv(offset, [data])
                return Piece(offset, data, chunk, tuple(zeros))
            zeros.append((offset, length))
        return Piece(0, empty, chunk, tuple(zeros))

    def put(self, piece: Piece) -> None:
        """Write a piece to the copy; :class:`OSError` if that cannot be."""
        for offset, length in piece.zeros:
            with self._writing:
                self.keeper.put_zeros(offset, length)
        if piece.data:
            with self._writing:
                self.keeper.put(piece.offset, piece.data)

    def _place(self, first: int, end: int) -> tuple[int, int]:
        offset = first * CHUNK
        return offset, min(end * CHUNK, self.disk.size) - offset

    def _keep(self, offset: int, length: int) -> None:
        """Copy what is about to be overwritten."""
        last = min(-(-(offset + length) // CHUNK), self._chunks)
        chunk = offset // CHUNK
        while self.problem is None and (chunk := self._kept.find(0, chunk, last)) >= 0:
            self._kept[chunk] = 1
            start, count = self._place(chunk, chunk + 1)
            try:
                if self.disk.may_have_data(start, count):
                    data = memoryview(bytearray(count))
                    self.disk.readv(start, [data])
                    with self._writing:
                        self.keeper.put(start, data)
                else:
                    with self._writing:
                        self.keeper.put_zeros(start, count)
            except (OSError, HvHostError) as error:
                self.problem = f"what the guest was about to overwrite could not be kept: {error}"

    # For the guest.

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def logical_sector_size(self) -> int:
        return self.disk.logical_sector_size

    @property
    def physical_sector_size(self) -> int:
        return self.disk.physical_sector_size

    @property
    def read_only(self) -> bool:
        return self.disk.read_only

    @property
    def identifier(self) -> UUID:
        return self.disk.identifier

    @property
    def allocated(self) -> int:
        return self.disk.allocated

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.disk.readv(offset, buffers)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        return self.disk.read_now(offset, length, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._keep(offset, total(buffers))
        self.disk.writev(offset, buffers)

    def flush(self) -> None:
        self.disk.flush()

    def unmap(self, offset: int, length: int) -> None:
        self._keep(offset, length)
        self.disk.unmap(offset, length)

    def resize(self, size: int) -> None:
        raise HvHostError("the disk is being backed up; resize it when that is done.")

    def close(self) -> None:
        self.disk.close()
