"""Kernel files made up for tests: valid unless a test says otherwise."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from hvhost.partition.memory import GuestMemory, MemoryRegion

MIB = 1 << 20
PT_LOAD, PT_NOTE = 1, 4


def note(name: bytes, kind: int, value: bytes) -> bytes:
    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<III", len(name), len(value), kind) + pad(name) + pad(value)


@dataclass
class Segment:
    data: bytes
    address: int = 0x1000000
    memory_size: int | None = None
    kind: int = PT_LOAD


@dataclass
class Elf:
    segments: list[Segment] = field(default_factory=lambda: [Segment(b"kernel text" * 10)])
    entry: int = 0x1000000
    file_class: int = 2
    byte_order: int = 1
    machine: int = 62
    kind: int = 2
    header_size: int | None = None
    header_count: int | None = None
    header_offset: int = 64

    @classmethod
    def of_32_bits(cls, segments: list[Segment], entry: int = 0x1000000) -> Elf:
        return cls(segments, entry, file_class=1, machine=3, header_offset=52)

    def build(self) -> bytes:
        narrow = self.file_class == 1
        layout = "<16sHHIIIIIHHHHHH" if narrow else "<16sHHIQQQIHHHHHH"
        count = len(self.segments) if self.header_count is None else self.header_count
        ident = b"\x7fELF" + bytes([self.file_class, self.byte_order, 1]) + bytes(9)
        own_size, per_segment = (52, 32) if narrow else (64, 56)
        header = struct.pack(
            layout,
            ident,
            self.kind,
            self.machine,
            1,
            self.entry,
            self.header_offset,
            0,
            0,
            own_size,
            per_segment if self.header_size is None else self.header_size,
            count,
            0,
            0,
            0,
        )
        offset = own_size + per_segment * len(self.segments)
        headers, body = b"", b""
        for segment in self.segments:
            size = len(segment.data)
            memory_size = size if segment.memory_size is None else segment.memory_size
            place, lengths = offset + len(body), (size, memory_size)
            if narrow:
                linear = 0xC0000000 + segment.address & 0xFFFFFFFF
                fields = (segment.kind, place, linear, segment.address, *lengths, 7, 0x1000)
            else:
                linear = 0xFFFFFFFF80000000 | segment.address
                fields = (segment.kind, 7, place, linear, segment.address, *lengths, 0x1000)
            headers += struct.pack("<IIIIIIII" if narrow else "<IIQQQQQQ", *fields)
            body += segment.data
        return header + headers + body


def pvh_note(entry: int = 0x1000000, width: int = 4) -> Segment:
    return Segment(note(b"Xen\0", 18, entry.to_bytes(width, "little")), 0, kind=PT_NOTE)


@dataclass
class BzImage:
    payload: bytes = b""
    protected_mode: bytes = b"\x90" * 0x400
    setup_sectors: int = 3
    version: int = 0x20F
    boot_flag: int = 0xAA55
    magic: bytes = b"HdrS"
    jump: int = 0x6A
    loadflags: int = 1
    xloadflags: int = 0x7F
    load_address: int = 0x1000000
    init_size: int = 2 * MIB
    initrd_address_max: int = 0x7FFFFFFF
    command_line_size: int = 2047
    size_paragraphs: int | None = None
    payload_offset: int | None = None
    payload_length: int | None = None

    def build(self) -> bytes:
        body = self.protected_mode + self.payload
        body += bytes(-len(body) % 16)
        file = bytearray(512 * ((self.setup_sectors or 4) + 1))
        paragraphs = len(body) // 16 if self.size_paragraphs is None else self.size_paragraphs
        offset = len(self.protected_mode) if self.payload_offset is None else self.payload_offset
        length = len(self.payload) if self.payload_length is None else self.payload_length

        def put(layout: str, at: int, *values: int | bytes) -> None:
            struct.pack_into("<" + layout, file, at, *values)

        put("BHI", 0x1F1, self.setup_sectors, 0, paragraphs)
        put("H", 0x1FE, self.boot_flag)
        put("BB", 0x200, 0xEB, self.jump)
        put("4sH", 0x202, self.magic, self.version)
        put("B", 0x211, self.loadflags)
        put("I", 0x22C, self.initrd_address_max)
        put("IBB", 0x230, 0x200000, 1, 21)
        put("HI", 0x236, self.xloadflags, self.command_line_size)
        put("II", 0x248, offset, length)
        put("QI", 0x258, self.load_address, self.init_size)
        return bytes(file) + body


def guest_memory(size: int = 32 * MIB, high: int = 0) -> GuestMemory:
    regions = [MemoryRegion(0, memoryview(bytearray(size)))]
    if high:
        regions.append(MemoryRegion(1 << 32, memoryview(bytearray(high)), size))
    return GuestMemory(regions)
