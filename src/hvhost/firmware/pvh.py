"""The PVH entry: an ELF kernel started in 32-bit protected mode at the address in its Xen note.

EBX points to ``struct hvm_start_info`` version 1 with the memory map, the RSDP, the command line
and, for Linux, the initrd as the only module. Everything lies in the first MiB. FreeBSD's kernel
takes its command line for loader variables split at spaces and commas, and modules for loader
metadata: give it no initrd. Source: Xen ``docs/misc/pvh.pandoc``, ``arch-x86/hvm/start_info.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain

from hvhost.errors import HvHostError
from hvhost.firmware import layout
from hvhost.firmware.boot_state import BootState, CpuMode
from hvhost.firmware.content import Content
from hvhost.firmware.image import KernelImage
from hvhost.firmware.layout import E820Entry
from hvhost.firmware.linux import load_segments, place_initrd, write_command_line
from hvhost.partition.memory import GuestMemory

START_INFO_MAGIC = 0x336EC578
START_INFO_VERSION = 1
# magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap_entries, reserved
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MODULE_LIST_OFFSET = 0x40
_MEMORY_MAP_OFFSET = 0x80
# Up to the zero page's place, though PVH has none.
_MEMORY_MAP_MAXIMUM = (layout.ZERO_PAGE_ADDRESS - layout.START_INFO_ADDRESS - 0x80) // 24
_COMMAND_LINE_SIZE = 4096
_INITRD_ADDRESS_MAX = 0x7FFFFFFF


def load_pvh(
    memory: GuestMemory,
    image: KernelImage,
    *,
    command_line: str,
    initrd: Content | None,
    e820: Sequence[E820Entry],
    rsdp_address: int,
) -> BootState:
    """Put *image* and its start info into *memory*; arguments and errors as for Linux."""
    entry = image.pvh_entry
    if entry is None:
        raise HvHostError(
            f"{image.name} has no PVH entry point; build it with CONFIG_PVH or give a bzImage."
        )
    inside = any(s.address <= entry < s.address + s.file_size for s in image.segments)
    if not inside:
        raise HvHostError(
            f"{image.name} has its PVH entry point {entry:#x} outside its segments; get it anew."
        )
    if len(e820) > _MEMORY_MAP_MAXIMUM:
        raise HvHostError(
            f"the memory map has {len(e820)} entries and there is room for "
            f"{_MEMORY_MAP_MAXIMUM}; use fewer memory regions."
        )
    load_segments(memory, image, image.segments)
    write_command_line(memory, command_line, _COMMAND_LINE_SIZE)
    base = layout.START_INFO_ADDRESS
    modules = 0
    if initrd is not None and len(initrd):
        end = max(segment.address + segment.memory_size for segment in image.segments)
        address = place_initrd(memory, initrd, kernel_end=end, limit=_INITRD_ADDRESS_MAX + 1)
        memory.write(base + _MODULE_LIST_OFFSET, _MODULE.pack(address, len(initrd), 0, 0))
        modules = 1
    flat = chain.from_iterable((entry.address, entry.size, entry.type, 0) for entry in e820)
    memory.write(base + _MEMORY_MAP_OFFSET, struct.pack("<" + "QQII" * len(e820), *flat))
    start_info = _START_INFO.pack(
        START_INFO_MAGIC,
        START_INFO_VERSION,
        0,
        modules,
        base + _MODULE_LIST_OFFSET if modules else 0,
        layout.COMMAND_LINE_ADDRESS,
        rsdp_address,
        base + _MEMORY_MAP_OFFSET,
        len(e820),
        0,
    )
    memory.write(base, start_info)
    state = BootState(mode=CpuMode.PROTECTED32, rip=entry, rbx=base)
    memory.write(state.gdt_address, state.gdt())
    return state
