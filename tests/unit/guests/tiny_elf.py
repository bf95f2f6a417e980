"""Makes the smallest ELF files that the tests need."""

from __future__ import annotations

import struct


def kernel_module(**fields: str | list[str]) -> bytes:
    """A 64-bit relocatable file with a ``.modinfo`` of ``key=value`` strings."""
    pairs = [
        f"{key}={one}".encode()
        for key, value in fields.items()
        for one in ([value] if isinstance(value, str) else value)
    ]
    return with_section(".modinfo", b"\0".join(pairs) + b"\0")


def with_section(name: str, content: bytes) -> bytes:
    """A 64-bit relocatable file with one named section."""
    names = b"\0.shstrtab\0" + name.encode() + b"\0"
    start = 64
    names_at = start + len(content)
    table_at = names_at + len(names)

    def section(name_at: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, offset, size, 0, 0, 1, 0)

    table = section(0, 0, 0) + section(1, names_at, len(names)) + section(11, start, len(content))
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table_at, 0, 64, 56, 0, 64, 3, 1
    )
    return header + content + names + table


def program(interpreter: str | None = None, needed: tuple[str, ...] = ()) -> bytes:
    """A 64-bit program or library that names an interpreter and libraries; it does not run."""
    strings = b"\0"
    entries = []
    for name in needed:
        entries.append((1, len(strings)))
        strings += name.encode() + b"\0"
    count = 2 + (interpreter is not None)
    strings_at = 64 + 56 * count
    dynamic_at = strings_at + len(strings)
    base = 0x400000
    entries += [(5, base + strings_at), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    path = (interpreter or "").encode() + b"\0"
    path_at = dynamic_at + len(dynamic)
    total = path_at + len(path)

    def segment(kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, 4, offset, base + offset, 0, size, size, 8)

    segments = segment(1, 0, total) + segment(2, dynamic_at, len(dynamic))
    if interpreter is not None:
        segments += segment(3, path_at, len(path))
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, count, 64, 0, 0
    )
    return header + segments + strings + dynamic + path
