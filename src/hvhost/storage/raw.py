"""Raw images and block devices: the disk's bytes and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from hvhost.errors import HvHostError
from hvhost.storage.bounds import check_range, check_writable
from hvhost.storage.file import HostFile

SECTOR = 512
PHYSICAL_SECTOR = 4096


class RawDisk:
    """A raw disk; see :mod:`hvhost.storage.disk` for the rules.

    A file's size is rounded down to whole sectors.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        logical_sector_size: int = SECTOR,
        locked: bool = True,
    ) -> None:
        self.file = HostFile(path, read_only=read_only, locked=locked)
        self.read_only = read_only
        self.logical_sector_size = logical_sector_size
        self.physical_sector_size = PHYSICAL_SECTOR
        self.size = self.file.size() // logical_sector_size * logical_sector_size

    @classmethod
    def create(cls, path: Path, size: int) -> RawDisk:
        """A new sparse image of *size* bytes; :class:`FileExistsError` if there is a file."""
        _check_size(path, size, SECTOR)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, size)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        return cls(path)

    @property
    def identifier(self) -> UUID:
        return self.file.identifier

    @property
    def allocated(self) -> int:
        return self.file.allocated()

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        check_range(self.size, offset, buffers)
        self.file.readv(offset, buffers)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        return 0 <= offset <= self.size - length and self.file.read_now(offset, length, buffers)

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range may be something else than zeros."""
        return self.file.may_have_data(offset, length)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        check_range(self.size, offset, buffers)
        check_writable(self.read_only, self.file.name)
        self.file.writev(offset, buffers)

    def flush(self) -> None:
        if not self.read_only:
            self.file.flush()

    def unmap(self, offset: int, length: int) -> None:
        check_range(self.size, offset, length)
        check_writable(self.read_only, self.file.name)
        self.file.clear(offset, length)

    def resize(self, size: int) -> None:
        check_writable(self.read_only, self.file.name)
        _check_size(self.file.path, size, self.logical_sector_size)
        self.file.truncate(size)
        self.file.flush()
        self.size = size

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.read_only = True
            self.file.close()


def _check_size(path: Path, size: int, sector: int) -> None:
    if size <= 0 or size % sector:
        raise HvHostError(f"{path} cannot have {size} bytes; name a multiple of {sector}.")
