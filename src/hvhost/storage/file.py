"""The host's file under a virtual disk: vectored reads and writes, holes, and honest flushes.

Formats use it through :class:`ImageFile`, so that tests can put a recorder in its place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from uuid import NAMESPACE_URL, UUID, uuid5

from hvhost.errors import HvHostError
from hvhost.storage.buffers import section, total, zeros
from hvhost.storage.lock import lock

IOV_MAX = os.sysconf("SC_IOV_MAX")
HOST_PAGE = 4096
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2  # linux/falloc.h
_FICLONE = 0x40049409  # linux/fs.h
_NO_HOLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


class ImageFile(Protocol):
    """What a disk format asks of the file that holds it. Offsets and lengths are bytes."""

    name: str

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill *buffers* from *offset* on; EIO where the file ends before."""

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        """As :meth:`readv`, if that needs no waiting; else false, and *buffers* hold anything."""

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of *buffers* to *offset*."""

    def clear(self, offset: int, length: int) -> None:
        """Make the range read as zeros: holes where that can be. Never changes the size."""

    def size(self) -> int:
        """The file's size."""

    def truncate(self, size: int) -> None:
        """Cut the file, or extend it with zeros."""

    def reserve(self, offset: int, length: int) -> None:
        """Extend the file over the range and take the storage for it now, where that can be."""

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range is anything but a hole."""

    def flush(self) -> None:
        """Return when all is on stable storage."""

    def allocated(self) -> int:
        """Bytes of storage that the file takes."""

    def close(self) -> None:
        """Close it; harmless when closed already."""


class HostFile:
    """A file or block device of the host, locked while it is open."""

    def __init__(self, path: Path, *, read_only: bool, locked: bool = True) -> None:
        """Open *path*; :class:`HvHostError` if it is in use, :class:`OSError` as the host says."""
        self.path = path
        self.name = str(path)
        self._flush_failed = False
        mode = os.O_RDONLY if read_only else os.O_RDWR
        self._descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._descriptor)
            self.is_device = stat.S_ISBLK(status.st_mode)
            if not self.is_device and not stat.S_ISREG(status.st_mode):
                raise HvHostError(f"{path} is neither a file nor a block device; name an image.")
            if locked:
                lock(self._descriptor, self.name, writer=not read_only)
        except BaseException:
            self.close()
            raise
        self.key = (status.st_dev, status.st_ino)
        self.identifier: UUID = uuid5(NAMESPACE_URL, f"{path.resolve()}#{status.st_ino}")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = total(buffers)
        if len(buffers) > IOV_MAX or os.preadv(self._descriptor, buffers, offset) != length:
            self._piecewise(os.preadv, offset, buffers, length)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        try:
            return os.preadv(self._descriptor, buffers, offset, os.RWF_NOWAIT) == length
        except OSError:  # it would wait, the host's file system cannot tell, or there is an error
            return False

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        length = total(buffers)
        if len(buffers) > IOV_MAX or os.pwritev(self._descriptor, buffers, offset) != length:
            self._piecewise(os.pwritev, offset, buffers, length)

    def _piecewise(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        offset: int,
        buffers: Sequence[memoryview],
        length: int,
    ) -> None:
        """Until all is moved: for more buffers than one call takes, and after a short one."""
        done = 0
        rest = list(buffers)
        while done < length:
            moved = call(self._descriptor, rest[:IOV_MAX], offset + done)
            if not moved:
                raise OSError(errno.EIO, "the file ends before the data", self.name)
            done += moved
            rest = section(buffers, done, length - done)

    def clear(self, offset: int, length: int) -> None:
        start = -(-offset // HOST_PAGE) * HOST_PAGE
        end = (offset + length) // HOST_PAGE * HOST_PAGE
        if start < end and self._punch(start, end - start):
            self._zero(offset, start - offset)
            self._zero(end, offset + length - end)
        else:
            self._zero(offset, length)

    def _punch(self, offset: int, length: int) -> bool:
        try:
            _fallocate(self._descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in _NO_HOLES:
                return False
            raise
        return True

    def _zero(self, offset: int, length: int) -> None:
        """Write zeros, but not beyond the end of the file: there are none there to be seen."""
        step = 64 << 20
        end = min(offset + length, self.size())
        for start in range(offset, end, step):
            self.writev(start, zeros(min(step, end - start)))

    def may_have_data(self, offset: int, length: int) -> bool:
        if self.is_device:
            return True
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA) < offset + length
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise

    def share_with(self, descriptor: int) -> None:
        """Make another file hold the same, by the same blocks; :class:`OSError` if it cannot."""
        fcntl.ioctl(descriptor, _FICLONE, self._descriptor)

    def size(self) -> int:
        return os.lseek(self._descriptor, 0, os.SEEK_END)

    def truncate(self, size: int) -> None:
        if self.is_device:
            raise HvHostError(f"{self.name} is a device of the host; its size cannot be set.")
        os.ftruncate(self._descriptor, size)

    def reserve(self, offset: int, length: int) -> None:
        try:
            _fallocate(self._descriptor, 0, offset, length)
        except OSError as error:
            if error.errno not in _NO_HOLES:
                raise
            self.truncate(max(self.size(), offset + length))

    def flush(self) -> None:
        if self._flush_failed:
            # The kernel reports lost pages once, then calls them clean. Never as "no space" again:
            # that would be waited for, and no space brings them back.
            raise OSError(errno.EIO, "an earlier flush failed: open the disk anew", self.name)
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self._flush_failed = True
            raise

    def allocated(self) -> int:
        return self.size() if self.is_device else os.fstat(self._descriptor).st_blocks * 512

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def write_all(file: ImageFile, offset: int, data: bytes | bytearray) -> None:
    """Write *data*, for the little that is not guest data."""
    file.writev(offset, [memoryview(data)])


def read_exactly(file: ImageFile, offset: int, length: int) -> bytearray:
    """*length* bytes at *offset*; EIO if the file ends before."""
    data = bytearray(length)
    file.readv(offset, [memoryview(data)])
    return data
