"""The initramfs archive format: cpio "newc" (Linux: early-userspace/buffer-format).

The same entries in the same order always give the same bytes: every time stamp is zero, inode
numbers count up, and everything belongs to root.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive; ``name`` has no leading slash, ``mode`` includes the file type."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory; it must come before what is in it."""
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to ``target``."""
    return Entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, b"", (major, minor))


def _record(entry: Entry, inode: int) -> bytes:
    name = os.fsencode(entry.name) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields) + name
    header += b"\0" * (-len(header) % 4)
    return header + entry.data + b"\0" * (-len(entry.data) % 4)


def archive(entries: list[Entry]) -> bytes:
    """The archive of ``entries``, ended by its trailer and padded to 512 bytes.

    Raises ValueError for a name twice, an absolute name, or data of 4 GiB or more.
    """
    seen: set[str] = set()
    records = []
    for inode, entry in enumerate(entries, start=1):
        if entry.name in seen or entry.name.startswith("/") or not entry.name:
            raise ValueError(f"bad or repeated name in the archive: {entry.name!r}")
        if len(entry.data) >> 32:
            raise ValueError(f"{entry.name} does not fit: a file is below 4 GiB")
        seen.add(entry.name)
        records.append(_record(entry, inode))
    records.append(_record(Entry(_TRAILER, 0), 0))
    content = b"".join(records)
    return content + b"\0" * (-len(content) % 512)
