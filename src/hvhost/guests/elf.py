"""The little of ELF that guests need: sections by name, and the libraries a program wants.

Both classes (32 and 64 bits), little-endian only. Source: elf(5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hvhost.errors import HvHostError

Buffer = bytes | memoryview

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
SHN_XINDEX = 0xFFFF


class ElfError(HvHostError):
    """The file is not an ELF file this computer's guests could run, or is cut short."""


@dataclass(frozen=True, slots=True)
class _Layout:
    wide: bool
    program_offset: int
    program_size: int
    program_count: int
    section_offset: int
    section_size: int
    section_count: int
    names_index: int


def _unpack(form: str, data: Buffer, offset: int) -> tuple[int, ...]:
    return struct.unpack(form, _slice(data, offset, struct.calcsize(form)))


def _slice(data: Buffer, offset: int, size: int) -> bytes:
    if offset + size > len(data):
        raise ElfError("The ELF file is cut short; build or download it again.")
    return bytes(data[offset : offset + size])


def _layout(data: Buffer) -> _Layout:
    if bytes(data[:4]) != b"\x7fELF" or len(data) < 52 or data[4] not in (1, 2) or data[5] != 1:
        raise ElfError("This is not a little-endian ELF file; give one built for x86.")
    wide = data[4] == 2
    program_offset, section_offset = _unpack("<QQ" if wide else "<II", data, 32 if wide else 28)
    values = _unpack("<6H", data, 52 if wide else 40)
    _, program_size, program_count, section_size, section_count, names_index = values
    return _Layout(
        wide,
        program_offset,
        program_size,
        program_count,
        section_offset,
        section_size,
        section_count,
        names_index,
    )


def _section_header(data: Buffer, layout: _Layout, index: int) -> tuple[int, int, int]:
    """Offset of the name, of the content, and the content's size."""
    base = layout.section_offset + index * layout.section_size
    (name,) = _unpack("<I", data, base)
    offset, size = _unpack(
        "<QQ" if layout.wide else "<II", data, base + (24 if layout.wide else 16)
    )
    return name, offset, size


def section(data: Buffer, name: str) -> bytes | None:
    """The content of the section ``name``; ``None`` if there is none. Raises ElfError."""
    layout = _layout(data)
    if layout.section_count == 0:
        return None
    _, names_offset, names_size = _section_header(data, layout, layout.names_index)
    names = _slice(data, names_offset, names_size)
    wanted = name.encode() + b"\0"
    for index in range(layout.section_count):
        name_offset, offset, size = _section_header(data, layout, index)
        if names[name_offset : name_offset + len(wanted)] == wanted:
            return _slice(data, offset, size)
    return None


@dataclass(frozen=True, slots=True)
class Linkage:
    """What the dynamic linker must find: ``interpreter`` is a path, ``needed`` are sonames."""

    interpreter: str | None
    needed: tuple[str, ...]


def linkage(data: Buffer) -> Linkage:
    """The interpreter and the libraries of a program or library. Raises ElfError."""
    layout = _layout(data)
    loads: list[tuple[int, int, int]] = []
    dynamic = b""
    interpreter = None
    for index in range(layout.program_count):
        base = layout.program_offset + index * layout.program_size
        if layout.wide:
            kind, _flags = _unpack("<II", data, base)
            offset, address, _, size = _unpack("<4Q", data, base + 8)
        else:
            kind, offset, address, _, size = _unpack("<5I", data, base)
        if kind == PT_LOAD:
            loads.append((address, offset, size))
        elif kind == PT_DYNAMIC:
            dynamic = _slice(data, offset, size)
        elif kind == PT_INTERP:
            interpreter = _slice(data, offset, size).rstrip(b"\0").decode("utf-8", "replace")
    entries = []
    form = "<qQ" if layout.wide else "<iI"
    for tag, value in struct.iter_unpack(
        form, dynamic[: len(dynamic) // struct.calcsize(form) * struct.calcsize(form)]
    ):
        if tag == DT_NULL:
            break
        entries.append((tag, value))
    strings = dict(entries).get(DT_STRTAB)
    if strings is None:
        return Linkage(interpreter, ())
    table = next((off + strings - at for at, off, size in loads if at <= strings < at + size), None)
    if table is None:
        raise ElfError("The ELF file's string table lies outside its segments; build it again.")
    needed = []
    for tag, value in entries:
        if tag == DT_NEEDED:
            start = table + value
            text = _slice(data, start, min(256, max(len(data) - start, 0)))
            needed.append(text.split(b"\0", 1)[0].decode("utf-8", "replace"))
    return Linkage(interpreter, tuple(needed))
