from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from kernel_files import MIB, Elf, Segment, guest_memory, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.boot_state import BootState, CpuMode
from hvhost.firmware.image import parse_kernel
from hvhost.firmware.layout import E820Entry, memory_layout
from hvhost.firmware.pvh import load_pvh
from hvhost.partition.memory import GuestMemory

E820 = memory_layout(32 * MIB).e820
KERNEL = Elf([Segment(b"start" * 10, memory_size=MIB), pvh_note(0x1000004)], 1 << 63).build()


def load(
    memory: GuestMemory,
    data: bytes = KERNEL,
    *,
    initrd: bytes | None = None,
    e820: tuple[E820Entry, ...] = E820,
    command_line: str = "boot_verbose=YES",
) -> BootState:
    return load_pvh(
        memory,
        parse_kernel(data, "kernel"),
        command_line=command_line,
        initrd=initrd,
        e820=e820,
        rsdp_address=0xE0000,
    )


def start_info(memory: GuestMemory, state: BootState) -> tuple[int, ...]:
    return struct.unpack("<IIIIQQQQII", memory.read(state.rbx, 56))


def test_start_info_without_modules() -> None:
    memory = guest_memory()
    state = load(memory)
    assert (state.mode, state.rip) == (CpuMode.PROTECTED32, 0x1000004)
    assert (state.cr0, state.cr4, state.cr3, state.rflags) == (0x11, 0, 0, 2)
    magic, version, flags, modules, module_list, command_line, rsdp, table, count, reserved = (
        start_info(memory, state)
    )
    assert (magic, version, flags, reserved) == (0x336EC578, 1, 0, 0)
    assert (modules, module_list) == (0, 0)
    assert memory.read(command_line, 17) == b"boot_verbose=YES\0"
    assert rsdp == 0xE0000
    entries = list(struct.iter_unpack("<QQII", memory.read(table, 24 * count)))
    assert entries == [(e.address, e.size, e.type, 0) for e in E820]
    assert max(state.rbx, command_line, table) < MIB
    assert memory.read(0x1000000, 60) == b"start" * 10 + bytes(10)


def test_initrd_is_the_only_module() -> None:
    memory = guest_memory()
    state = load(memory, initrd=b"cpio" * 2000)
    info = start_info(memory, state)
    assert info[3] == 1
    address, size, command_line, reserved = struct.unpack("<QQQQ", memory.read(info[4], 32))
    assert (size, command_line, reserved) == (8000, 0, 0)
    assert memory.read(address, size) == b"cpio" * 2000
    assert address % 4096 == 0


def test_structures_do_not_overlap() -> None:
    memory = guest_memory()
    entry = E820[0]
    state = load(memory, initrd=b"x", e820=(entry,) * 900)
    info = start_info(memory, state)
    spans = [(state.rbx, 56), (info[4], 32), (info[7], 24 * info[8]), (info[5], 17)]
    spans.append((state.gdt_address, state.gdt_limit + 1))
    for (first, size), (second, _) in pairwise(sorted(spans)):
        assert first + size <= second


def test_too_long_a_memory_map() -> None:
    limit = (0x6000 - 0x80) // 24
    load(guest_memory(), e820=(E820[0],) * limit)
    with pytest.raises(HvHostError, match=f"has {limit + 1} entries"):
        load(guest_memory(), e820=(E820[0],) * (limit + 1))


def test_command_line_limit() -> None:
    load(guest_memory(), command_line="x" * 4096)
    with pytest.raises(HvHostError, match="takes 4096"):
        load(guest_memory(), command_line="x" * 4097)


def test_no_pvh_entry() -> None:
    with pytest.raises(HvHostError, match="no PVH entry point"):
        load(guest_memory(), Elf().build())


@pytest.mark.parametrize("entry", [0xFFFFFF, 0x1000000 + 50, 0x10])
def test_entry_outside_the_kernel(entry: int) -> None:
    data = Elf([Segment(b"start" * 10, memory_size=MIB), pvh_note(entry)], 1 << 63).build()
    with pytest.raises(HvHostError, match="outside its segments"):
        load(guest_memory(), data)


def test_initrd_that_does_not_fit() -> None:
    with pytest.raises(HvHostError, match="does not fit between the kernel"):
        load(guest_memory(), initrd=bytes(15 * MIB + 1))
    load(guest_memory(), initrd=bytes(15 * MIB))
