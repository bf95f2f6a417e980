"""A small ISO 9660 image, for a DVD drive that is to be read (ECMA-119)."""

from __future__ import annotations

import struct
from collections.abc import Mapping

SECTOR = 2048
_SYSTEM_SECTORS = 16
_PATH_TABLE_L, _PATH_TABLE_M, _ROOT, _FIRST_FILE = 18, 19, 20, 21
_DATE = bytes((126, 1, 1, 0, 0, 0, 0))
_NO_DATE = b"0" * 16 + b"\0"


def _both(value: int) -> bytes:
    """A 32-bit number in both byte orders."""
    return struct.pack("<I", value) + struct.pack(">I", value)


def _both16(value: int) -> bytes:
    return struct.pack("<H", value) + struct.pack(">H", value)


def _record(name: bytes, extent: int, size: int, *, directory: bool = False) -> bytes:
    """A directory record (9.1)."""
    length = 33 + len(name) + (len(name) + 1) % 2
    head = bytes((length, 0)) + _both(extent) + _both(size) + _DATE
    head += bytes((2 if directory else 0, 0, 0)) + _both16(1) + bytes((len(name),)) + name
    return head.ljust(length, b"\0")


def iso_image(volume: str, files: Mapping[str, bytes]) -> bytes:
    """An image with *files* in its root; names like ``HELLO.TXT``, few enough for one sector."""
    records = [
        _record(b"\0", _ROOT, SECTOR, directory=True),
        _record(b"\1", _ROOT, SECTOR, directory=True),
    ]
    extent, content = _FIRST_FILE, bytearray()
    for name, data in sorted(files.items()):
        records.append(_record(f"{name};1".encode("ascii"), extent, len(data)))
        padded = data + bytes(-len(data) % SECTOR)
        content += padded
        extent += len(padded) // SECTOR
    root = b"".join(records).ljust(SECTOR, b"\0")
    path_l = struct.pack("<BBIH2s", 1, 0, _ROOT, 1, b"\0\0")
    path_m = struct.pack(">BBIH2s", 1, 0, _ROOT, 1, b"\0\0")
    descriptor = b"".join(
        (
            b"\1CD001\1\0",
            b" " * 32,
            volume.upper().encode("ascii").ljust(32),
            bytes(8),
            _both(extent),
            bytes(32),
            _both16(1),
            _both16(1),
            _both16(SECTOR),
            _both(len(path_l)),
            struct.pack("<II", _PATH_TABLE_L, 0),
            struct.pack(">II", _PATH_TABLE_M, 0),
            _record(b"\0", _ROOT, SECTOR, directory=True),
            b" " * 128 * 4,
            b" " * 37 * 3,
            _NO_DATE * 4,
            b"\1",
        )
    )
    parts = (descriptor, b"\xffCD001\1", path_l, path_m, root)
    return (
        bytes(_SYSTEM_SECTORS * SECTOR)
        + b"".join(part.ljust(SECTOR, b"\0") for part in parts)
        + bytes(content)
    )
