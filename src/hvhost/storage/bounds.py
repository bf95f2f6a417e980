"""The checks that every disk makes before it moves data."""

from __future__ import annotations

from collections.abc import Sequence

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.storage.buffers import total


def check_range(size: int, offset: int, length: int | Sequence[memoryview]) -> int:
    """The length in bytes; :class:`LocalProtocolError` unless the range is inside the disk."""
    count = length if isinstance(length, int) else total(length)
    if offset < 0 or count < 0 or offset + count > size:
        raise LocalProtocolError(
            f"{count} bytes at {offset} were asked of a disk of {size} bytes: a bug of hvhost."
        )
    return count


def check_writable(read_only: bool, name: str) -> None:
    """:class:`HvHostError` for a disk that is opened read-only."""
    if read_only:
        raise HvHostError(f"{name} is open for reading only; nothing can be written to it.")
