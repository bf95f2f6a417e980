"""What every virtual disk can do, whatever its format.

Offsets and lengths are bytes from the start of the disk, multiples of ``logical_sector_size``.
Buffers are memoryviews of bytes (format ``B``, contiguous), such as those of guest memory; data
moves between them and the file with vectored calls, without a copy in between.

Thread rule: a disk is used by one thread at a time. Which thread that is may change between calls.

Order and durability: a write is seen by every later read. It survives a crash of the process as
soon as it returned, if the block it went to was allocated before, and a crash of the host once a
:meth:`Disk.flush` that began after it has returned.

Errors: an :class:`OSError` of the host (EIO, ENOSPC) goes up unchanged, and the disk stays usable:
what failed can be tried again. After a failed flush the host may have dropped data, so every later
flush fails too, until the disk is opened anew. A range outside the disk is our own mistake,
:class:`hvhost.errors.LocalProtocolError`; writing to a read-only disk is
:class:`hvhost.errors.HvHostError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol
from uuid import UUID

from hvhost.errors import DiskError
from hvhost.storage.buffers import clear, section

Progress = Callable[[int, int], None]
"""Told how many bytes of how many are done, now and then, by work that takes long."""


class Disk(Protocol):
    """An open virtual disk; see the module's text for the rules."""

    @property
    def size(self) -> int:
        """Bytes that the guest sees."""

    @property
    def logical_sector_size(self) -> int:
        """512 or 4096."""

    @property
    def physical_sector_size(self) -> int:
        """512 or 4096; what the guest should align to."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    @property
    def identifier(self) -> UUID:
        """What the disk is known by, for VPD page 0x83; the same each time it is opened."""

    @property
    def allocated(self) -> int:
        """Bytes of the host's storage that the image file takes, without those of its parents."""

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill *buffers*, in order, with the data at *offset*."""

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        """Fill *buffers*, *length* bytes in all, if that needs no waiting.

        False if it does, if the range is not all on the disk, or for any other reason: then
        *buffers* hold anything, and :meth:`readv` is to be asked.
        """

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write *buffers*, in order, to *offset*."""

    def flush(self) -> None:
        """Return when all that was written before is on stable storage."""

    def unmap(self, offset: int, length: int) -> None:
        """Make the range read as zeros, and give its storage back to the host where that can be.

        What cannot be given back (less than a page of the host's file) is written with zeros.
        """

    def resize(self, size: int) -> None:
        """Set the disk's size, also while the guest uses it; what is cut off is lost.

        New space reads as zeros. The new size is on stable storage when this returns.
        :class:`hvhost.errors.HvHostError` if the format cannot have that size.
        """

    def close(self) -> None:
        """Flush, give the lock back and close the file; harmless when closed already."""


class ImageDisk(Disk, Protocol):
    """A disk in an image file, which knows where it has no data."""

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range may be something else than zeros; quick, for it reads nothing."""


def read_parent(
    name: str, parent: Disk | None, offset: int, buffers: Sequence[memoryview], count: int
) -> None:
    """Read *count* bytes of a differencing disk's parent; zeros beyond its end.

    :class:`DiskError` naming the child if it was opened without one.
    """
    if parent is None:
        raise DiskError(f"{name} was opened without its parent.")
    there = max(0, min(count, parent.size - offset))
    if there:
        parent.readv(offset, section(buffers, 0, there))
    clear(section(buffers, there, count - there))
