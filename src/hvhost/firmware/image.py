"""What kind of kernel a file is, and where its parts lie. Parsing only; nothing is trusted.

Sources: Linux ``Documentation/x86/boot.rst`` (the setup header), the System V ABI (ELF) and the
Xen PVH notes (``xen/interface/elfnote.h``).
"""

from __future__ import annotations

import mmap
import struct
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hvhost.errors import HvHostError
from hvhost.firmware.content import Content, FileContent

if TYPE_CHECKING:
    from hvhost.wire import Buffer

SETUP_HEADER_OFFSET = 0x1F1
# The boot_params field behind the header; the header may not reach into it.
SETUP_HEADER_LIMIT = 0x290
XLF_KERNEL_64 = 1 << 0
_BOOT_FLAG, _MAGIC = 0xAA55, b"HdrS"
_MINIMUM_PROTOCOL = 0x206  # 2.06 (Linux 2.6.22) brought cmdline_size
_INITRD_ADDRESS_MAX = 0x37FFFFFF

_ELFDATA2LSB, _EM_X86_64, _EM_386 = 1, 62, 3
_PT_LOAD, _PT_NOTE = 1, 4
_MAXIMUM_PROGRAM_HEADERS = 128
_MAXIMUM_NOTES_SIZE = 1 << 20
XEN_ELFNOTE_PHYS32_ENTRY = 18


class ImageKind(StrEnum):
    """The formats a kernel comes in."""

    BZIMAGE = "bzImage"
    ELF64 = "ELF64"
    ELF32 = "ELF32"


class _ElfClass(NamedTuple):
    """How one class of ELF file is laid out, and for which machine it must be.

    *order* has the places of offset, physical address, size in the file and in memory among the
    fields of a program header.
    """

    kind: ImageKind
    machine: int
    header: struct.Struct
    program: struct.Struct
    order: tuple[int, int, int, int]


_ELF_CLASSES = {
    1: _ElfClass(
        ImageKind.ELF32,
        _EM_386,
        struct.Struct("<16sHHIIIIIHHHHHH"),
        struct.Struct("<IIIIIIII"),
        (1, 3, 4, 5),
    ),
    2: _ElfClass(
        ImageKind.ELF64,
        _EM_X86_64,
        struct.Struct("<16sHHIQQQIHHHHHH"),
        struct.Struct("<IIQQQQQQ"),
        (2, 4, 5, 6),
    ),
}


class SetupHeader(NamedTuple):
    """The fields of a Linux setup header that a loader needs; addresses and sizes in bytes.

    *raw* is the header as it lies in the file from offset 0x1f1, to be copied into the zero page.
    *payload_offset* counts from the protected-mode code.
    """

    raw: bytes
    version: int
    protected_mode_offset: int
    protected_mode_size: int
    command_line_size: int
    initrd_address_max: int
    load_address: int
    init_size: int
    xloadflags: int
    payload_offset: int
    payload_length: int

    @property
    def is_64_bit(self) -> bool:
        """Whether the kernel has the 64-bit entry point."""
        return bool(self.xloadflags & XLF_KERNEL_64)


class LoadSegment(NamedTuple):
    """One PT_LOAD: *file_size* bytes at *offset* go to *address*, zeros up to *memory_size*."""

    address: int
    memory_size: int
    offset: int
    file_size: int


class KernelImage(NamedTuple):
    """A parsed kernel; *data* is the whole file, usually a mapping of it, *file* the same as file.

    A bzImage has *setup*; an ELF file has *segments* and *entry*, *pvh_entry* if it carries the
    PVH note, and *setup* too if it came out of a bzImage.
    """

    name: str
    kind: ImageKind
    data: memoryview
    setup: SetupHeader | None = None
    segments: tuple[LoadSegment, ...] = ()
    entry: int = 0
    pvh_entry: int | None = None
    file: FileContent | None = None

    @property
    def content(self) -> Content:
        """The whole file as what is copied fastest."""
        return self.data if self.file is None else self.file

    @property
    def is_64_bit(self) -> bool:
        """Whether it starts, by the Linux boot protocol, in long mode."""
        if self.kind is ImageKind.BZIMAGE:
            assert self.setup is not None
            return self.setup.is_64_bit
        return self.kind is ImageKind.ELF64

    @property
    def has_linux_entry(self) -> bool:
        """Whether the Linux boot protocol applies.

        A vmlinux is entered at a physical address; other kernels (FreeBSD) put a virtual one there.
        """
        return self.kind is ImageKind.BZIMAGE or any(
            segment.address <= self.entry < segment.address + segment.file_size
            for segment in self.segments
        )


def open_kernel(path: Path) -> KernelImage:
    """Map the file at *path* and parse it; :class:`HvHostError` if it is not a kernel."""
    try:
        file = FileContent(path)
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise HvHostError(
            f"{path} cannot be read as a kernel: {error.strerror}; check the path."
        ) from None
    except ValueError:
        raise HvHostError(f"{path} is empty; give a Linux kernel (bzImage or vmlinux).") from None
    return parse_kernel(data, str(path))._replace(file=file)


def parse_kernel(data: Buffer, name: str) -> KernelImage:
    """Find out what *data* is; :class:`HvHostError` names *name* and what is wrong with it."""
    view = memoryview(data)
    if bytes(view[:4]) == b"\x7fELF":
        return _parse_elf(view, name)
    if bytes(view[0x202:0x206]) == _MAGIC:
        return KernelImage(name, ImageKind.BZIMAGE, view, setup=_parse_setup(view, name))
    raise _refusal(name, f"it starts like {_describe(view)}")


def _refusal(name: str, why: str) -> HvHostError:
    return HvHostError(
        f"{name} is not a Linux kernel: {why}; give a bzImage (/boot/vmlinuz-*) or a vmlinux."
    )


def _describe(view: memoryview) -> str:
    head = bytes(view[:8])
    known = (
        (b"\x1f\x8b", "a gzip file"),
        (b"\xfd7zXZ", "an xz file"),
        (b"BZh", "a bzip2 file"),
        (b"\x28\xb5\x2f\xfd", "a zstd file"),
        (b"0707", "an initramfs"),
        (b"!<arch>", "a Debian package or static library"),
        (b"MZ", "a Windows or EFI program without a Linux boot header"),
        (b"#!", "a script"),
    )
    for magic, what in known:
        if head.startswith(magic):
            return what
    return f"unknown data ({head.hex(' ')})"


def _parse_setup(view: memoryview, name: str) -> SetupHeader:
    # The jump instruction at 0x200 says where the header ends: 0x202 plus its displacement.
    end = 0x202 + view[0x201]
    if end < 0x23C or end > SETUP_HEADER_LIMIT or len(view) < end:
        raise _refusal(name, f"its setup header ends at {end:#x}")
    header = bytes(SETUP_HEADER_OFFSET) + bytes(view[SETUP_HEADER_OFFSET:end])
    header = header.ljust(SETUP_HEADER_LIMIT, b"\0")  # fields an older protocol lacks read as 0

    def field(layout: str, offset: int) -> int:
        value: int = struct.unpack_from("<" + layout, header, offset)[0]
        return value

    version = field("H", 0x206)
    if field("H", 0x1FE) != _BOOT_FLAG or version < _MINIMUM_PROTOCOL:
        raise _refusal(name, f"its boot protocol {version >> 8}.{version & 0xFF:02d} is too old")
    if not field("B", 0x211) & 1:
        raise _refusal(name, "it is a zImage, which loads below 1 MiB")
    start = 512 * ((field("B", 0x1F1) or 4) + 1)
    size = 16 * field("I", 0x1F4)
    if not size or start + size > len(view):
        raise _refusal(
            name, f"it should be {start + size} bytes long and is {len(view)}: it was cut short"
        )
    payload_offset, payload_length = 0, 0
    if version >= 0x208:
        payload_offset, payload_length = field("I", 0x248), field("I", 0x24C)
        if payload_offset + payload_length > size:
            raise _refusal(name, "its compressed payload lies outside the file")
    relocatable = version >= 0x20A
    return SetupHeader(
        raw=header[SETUP_HEADER_OFFSET:end],
        version=version,
        protected_mode_offset=start,
        protected_mode_size=size,
        command_line_size=field("I", 0x238),
        initrd_address_max=field("I", 0x22C) or _INITRD_ADDRESS_MAX,
        load_address=field("Q", 0x258) if relocatable else 0x100000,
        init_size=max(field("I", 0x260) if relocatable else 0, size),
        xloadflags=field("H", 0x236) if version >= 0x20C else 0,
        payload_offset=payload_offset,
        payload_length=payload_length,
    )


def _parse_elf(view: memoryview, name: str) -> KernelImage:
    if len(view) <= 5:
        raise _refusal(name, "its ELF header is cut short")
    layout = _ELF_CLASSES.get(view[4])
    if layout is None or view[5] != _ELFDATA2LSB:
        raise _refusal(name, "it is not a little-endian ELF file")
    if len(view) < layout.header.size:
        raise _refusal(name, "its ELF header is cut short")
    _, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum, _, _, _ = (
        layout.header.unpack_from(view)
    )
    if machine != layout.machine:
        raise _refusal(name, f"it is an {layout.kind} file for machine {machine}, not x86")
    if kind != 2:
        raise _refusal(name, "it is an ELF file but not an executable one with fixed addresses")
    if not 0 < phnum <= _MAXIMUM_PROGRAM_HEADERS or phentsize != layout.program.size:
        raise _refusal(name, f"it has {phnum} program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > len(view):
        raise _refusal(name, "its program headers lie outside the file")
    segments = []
    pvh_entry = None
    for index in range(phnum):
        fields = layout.program.unpack_from(view, phoff + index * phentsize)
        p_type = fields[0]
        offset, address, file_size, memory_size = (fields[place] for place in layout.order)
        if p_type not in (_PT_LOAD, _PT_NOTE):
            continue
        if offset + file_size > len(view):
            raise _refusal(name, f"its segment {index} lies outside the file: it was cut short")
        if p_type == _PT_NOTE:
            notes = view[offset : offset + min(file_size, _MAXIMUM_NOTES_SIZE)]
            pvh_entry = pvh_entry or _find_pvh_entry(notes)
        elif memory_size:
            if file_size > memory_size or address + memory_size > 1 << 52:
                raise _refusal(name, f"its segment {index} has impossible sizes")
            segments.append(LoadSegment(address, memory_size, offset, file_size))
    if not segments:
        raise _refusal(name, "it is an ELF file with nothing to load")
    image = KernelImage(
        name,
        layout.kind,
        view,
        segments=tuple(segments),
        entry=entry,
        pvh_entry=pvh_entry,
    )
    if not image.has_linux_entry and pvh_entry is None:
        raise _refusal(name, f"its entry point {entry:#x} is not in it and it has no PVH note")
    return image


def _find_pvh_entry(notes: memoryview) -> int | None:
    """The address in the Xen PHYS32_ENTRY note; it is 4 or 8 bytes, by kernel."""
    offset = 0
    while offset + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, offset)
        name_end = offset + 12 + name_size
        value = offset + 12 + (name_size + 3 & ~3)
        if value + value_size > len(notes):
            return None
        is_xen = bytes(notes[offset + 12 : name_end]) == b"Xen\0"
        if is_xen and kind == XEN_ELFNOTE_PHYS32_ENTRY and value_size in (4, 8):
            entry = int.from_bytes(notes[value : value + value_size], "little")
            return entry if entry < 1 << 32 else None
        offset = value + (value_size + 3 & ~3)
    return None
