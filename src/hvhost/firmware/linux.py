"""The Linux x86 boot protocol: a kernel in guest memory and the state its entry point wants.

64-bit kernels are entered in long mode with paging on, at offset 0x200 of a bzImage's
protected-mode code or at a vmlinux's own entry; 32-bit ones (686-pae) in protected mode without
paging, at the start of that code or at their own entry. Source: Linux
``Documentation/x86/boot.rst`` and ``zero-page.rst``.

A vmlinux is loaded where it was linked. The code that relocates a kernel and randomizes its
address (KASLR) is in the bzImage's decompressor, so a guest started from a vmlinux, which is what
:func:`hvhost.firmware.extract.open_for_boot` gives, runs at its link address.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

from hvhost.errors import HvHostError
from hvhost.firmware import layout
from hvhost.firmware.boot_state import BootState, CpuMode
from hvhost.firmware.content import Content, copy
from hvhost.firmware.image import (
    SETUP_HEADER_OFFSET,
    ImageKind,
    KernelImage,
    LoadSegment,
    SetupHeader,
)
from hvhost.firmware.layout import E820Entry
from hvhost.partition.memory import PAGE_SIZE, GuestMemory
from hvhost.units import MIB, format_size

ENTRY_64_OFFSET = 0x200

# struct boot_params
_ACPI_RSDP_ADDRESS, _E820_COUNT, _E820_TABLE, _E820_MAXIMUM = 0x070, 0x1E8, 0x2D0, 128
_E820_ENTRY = struct.Struct("<QQI")
# struct setup_header, offsets in the zero page
_BOOT_FLAG, _HEADER_MAGIC, _VERSION, _TYPE_OF_LOADER, _LOADFLAGS = 0x1FE, 0x202, 0x206, 0x210, 0x211
_RAMDISK, _COMMAND_LINE, _INITRD_ADDRESS_MAX, _KERNEL_ALIGNMENT = 0x218, 0x228, 0x22C, 0x230
_COMMAND_LINE_SIZE = 0x238
_LOADER_UNDEFINED = 0xFF
_LOADED_HIGH = 1 << 0
# What a kernel of our time has in the header that its vmlinux lacks.
_VMLINUX_COMMAND_LINE_SIZE = 2047
_VMLINUX_INITRD_ADDRESS_MAX = 0x7FFFFFFF
# A 32-bit kernel maps only so much at once; it would copy an initrd that lies above.
_LOW_MEMORY_32 = 0x2FFFFFFF

_PRESENT_WRITABLE, _LARGE_PAGE = 0x3, 0x80
_LARGE_PAGE_SIZE = 2 * MIB


def load_linux(
    memory: GuestMemory,
    image: KernelImage,
    *,
    command_line: str,
    initrd: Content | None,
    e820: Sequence[E820Entry],
    rsdp_address: int,
) -> BootState:
    """Put *image*, *initrd*, command line, zero page, GDT and page tables into *memory*.

    *initrd* and the kernel are copied once. Whatever lies in memory from an
    earlier boot is overwritten where the kernel could mistake it. :class:`HvHostError` if something
    does not fit, with the numbers, or if the kernel has no Linux entry point.
    """
    setup, long_mode = image.setup, image.is_64_bit
    if not image.has_linux_entry:
        raise HvHostError(
            f"{image.name} does not start by the Linux boot protocol; start it through PVH."
        )
    if image.kind is ImageKind.BZIMAGE and setup is not None:
        kernel = _bzimage_segment(setup)
        entry = kernel.address + (ENTRY_64_OFFSET if long_mode else 0)
        reserved_end = kernel.address + max(kernel.memory_size, setup.init_size)
        load_segments(memory, image, (kernel,))
    else:
        entry = image.entry
        # init_size counts from the address the kernel was linked at, which is its load address.
        reserved_end = setup.load_address + setup.init_size if setup is not None else 0
        load_segments(memory, image, image.segments)
    kernel_end = max(reserved_end, *(s.address + s.memory_size for s in image.segments), 0)
    limit = setup.initrd_address_max if setup is not None else _VMLINUX_INITRD_ADDRESS_MAX
    if not long_mode:
        limit = min(limit, _LOW_MEMORY_32)
    low_ram = low_ram_end(memory)
    if kernel_end > low_ram:
        raise HvHostError(
            f"{image.name} needs memory up to {format_size(kernel_end)}, the machine has "
            f"{format_size(low_ram)} there; give it more memory."
        )
    ramdisk, ramdisk_size = 0, 0
    if initrd is not None and len(initrd):
        ramdisk = place_initrd(memory, initrd, kernel_end=kernel_end, limit=limit + 1)
        ramdisk_size = len(initrd)

    size_limit = setup.command_line_size if setup is not None else _VMLINUX_COMMAND_LINE_SIZE
    write_command_line(memory, command_line, size_limit)
    zero_page = _zero_page(setup, e820, rsdp_address)
    struct.pack_into("<II", zero_page, _RAMDISK, ramdisk, ramdisk_size)
    memory.write(layout.ZERO_PAGE_ADDRESS, zero_page)

    state = BootState(
        mode=CpuMode.LONG64 if long_mode else CpuMode.PROTECTED32,
        rip=entry,
        rsp=layout.BOOT_STACK_ADDRESS,
        rsi=layout.ZERO_PAGE_ADDRESS,
        cr3=layout.PAGE_TABLE_ADDRESS if long_mode else 0,
    )
    memory.write(state.gdt_address, state.gdt())
    if long_mode:
        write_page_tables(memory, layout.PAGE_TABLE_ADDRESS)
    return state


def low_ram_end(memory: GuestMemory) -> int:
    """Where the RAM that starts at address 0 ends."""
    region = memory.regions[0]
    return region.size if region.guest_address == 0 else 0


def load_segments(memory: GuestMemory, image: KernelImage, segments: Sequence[LoadSegment]) -> None:
    """Copy *segments* of *image* to their guest addresses, and zeros behind them.

    The first MiB belongs to the loader; a segment may not lie there, nor outside low RAM.
    """
    ram = low_ram_end(memory)
    for segment in segments:
        end = segment.address + segment.memory_size
        if segment.address < layout.HIGH_MEMORY_ADDRESS:
            raise HvHostError(
                f"{image.name} wants to be loaded at {segment.address:#x}, below 1 MiB, "
                "where the boot data lies; it cannot be started."
            )
        if end > ram:
            raise HvHostError(
                f"{image.name} needs memory up to {format_size(end)}, the machine has "
                f"{format_size(ram)} there; give it more memory."
            )
        view = memory.view(segment.address, segment.memory_size)
        copy(image.content, view[: segment.file_size], segment.offset)
        _clear(view[segment.file_size :])


def _clear(view: memoryview) -> None:
    zeros = bytes(min(len(view), MIB))
    for offset in range(0, len(view), MIB):
        piece = view[offset : offset + MIB]
        piece[:] = zeros[: len(piece)]


def _bzimage_segment(setup: SetupHeader) -> LoadSegment:
    size = setup.protected_mode_size
    return LoadSegment(setup.load_address, size, setup.protected_mode_offset, size)


def place_initrd(memory: GuestMemory, initrd: Content, *, kernel_end: int, limit: int) -> int:
    """Copy *initrd* as high as it may lie, below *limit* and in low RAM; returns its address."""
    top = min(low_ram_end(memory), limit)
    address = (top - len(initrd)) & ~(PAGE_SIZE - 1)
    if address < kernel_end:
        raise HvHostError(
            f"the initrd of {format_size(len(initrd))} does not fit between the kernel, which "
            f"ends at {format_size(kernel_end)}, and {format_size(top)}; "
            "give the machine more memory."
        )
    copy(initrd, memory.view(address, len(initrd)))
    return address


def write_command_line(memory: GuestMemory, command_line: str, size_limit: int) -> None:
    """Write the NUL-terminated command line; *size_limit* is the longest the kernel takes."""
    encoded = command_line.encode("utf-8", "surrogateescape")
    room = layout.LOW_RAM_END - layout.COMMAND_LINE_ADDRESS - 1
    if b"\0" in encoded:
        raise HvHostError("the kernel command line contains a NUL character; remove it.")
    if len(encoded) > min(size_limit, room):
        raise HvHostError(
            f"the kernel command line has {len(encoded)} bytes and this kernel takes "
            f"{min(size_limit, room)}; shorten it."
        )
    memory.write(layout.COMMAND_LINE_ADDRESS, encoded + b"\0")


def _zero_page(
    setup: SetupHeader | None, e820: Sequence[E820Entry], rsdp_address: int
) -> bytearray:
    """``struct boot_params``, but for the ramdisk."""
    page = bytearray(PAGE_SIZE)
    if setup is not None:
        page[SETUP_HEADER_OFFSET : SETUP_HEADER_OFFSET + len(setup.raw)] = setup.raw
    else:
        struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
        struct.pack_into("<4sH", page, _HEADER_MAGIC, b"HdrS", 0x20F)
        struct.pack_into("<I", page, _INITRD_ADDRESS_MAX, _VMLINUX_INITRD_ADDRESS_MAX)
        struct.pack_into("<I", page, _KERNEL_ALIGNMENT, _LARGE_PAGE_SIZE)
        struct.pack_into("<I", page, _COMMAND_LINE_SIZE, _VMLINUX_COMMAND_LINE_SIZE)
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    page[_LOADFLAGS] |= _LOADED_HIGH
    struct.pack_into("<I", page, _COMMAND_LINE, layout.COMMAND_LINE_ADDRESS)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDRESS, rsdp_address)
    if len(e820) > _E820_MAXIMUM:
        raise HvHostError(
            f"the memory map has {len(e820)} entries and the boot protocol takes "
            f"{_E820_MAXIMUM}; use fewer memory regions."
        )
    page[_E820_COUNT] = len(e820)
    for index, entry in enumerate(e820):
        offset = _E820_TABLE + index * _E820_ENTRY.size
        _E820_ENTRY.pack_into(page, offset, entry.address, entry.size, entry.type)
    return page


def write_page_tables(memory: GuestMemory, address: int) -> None:
    """Map the first 4 GiB to themselves with 2 MiB pages; six pages of tables at *address*."""
    directory_pointers = address + PAGE_SIZE
    directories = directory_pointers + PAGE_SIZE
    tables = array("Q", bytes(2 * PAGE_SIZE))
    tables[0] = directory_pointers | _PRESENT_WRITABLE
    for index in range(4):
        tables[512 + index] = directories + index * PAGE_SIZE | _PRESENT_WRITABLE
    flags = _PRESENT_WRITABLE | _LARGE_PAGE
    tables.extend(range(flags, layout.FOUR_GIB + flags, _LARGE_PAGE_SIZE))
    memory.write(address, tables.tobytes())
