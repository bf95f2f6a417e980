from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_files import MIB, BzImage, Elf, Segment, guest_memory, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.boot import load_kernel
from hvhost.firmware.boot_state import BootState, CpuMode
from hvhost.firmware.image import KernelImage, parse_kernel
from hvhost.firmware.layout import E820Entry, E820Type, memory_layout
from hvhost.firmware.linux import load_linux
from hvhost.partition.memory import GuestMemory
from hvhost.wire import Buffer

ZERO_PAGE = 0x7000
E820 = memory_layout(32 * MIB).e820


def load(
    memory: GuestMemory,
    data: bytes,
    *,
    command_line: str = "console=ttyS0",
    initrd: Buffer | None = None,
    e820: tuple[E820Entry, ...] = E820,
) -> BootState:
    image = parse_kernel(data, "vmlinuz")
    return load_linux(
        memory,
        image,
        command_line=command_line,
        initrd=initrd,
        e820=e820,
        rsdp_address=0xE0000,
    )


def field(memory: GuestMemory, offset: int, layout: str) -> int:
    data = memory.read(ZERO_PAGE + offset, struct.calcsize("<" + layout))
    value: int = struct.unpack("<" + layout, data)[0]
    return value


def test_bzimage() -> None:
    memory = guest_memory()
    data = BzImage(protected_mode=bytes(range(256)) * 4).build()
    state = load(memory, data)
    assert state.mode is CpuMode.LONG64
    assert state.rip == 0x1000200
    assert state.rsi == ZERO_PAGE
    assert memory.read(0x1000000, 1024) == bytes(range(256)) * 4
    assert memory.read(ZERO_PAGE + 0x1F1, 0x210 - 0x1F1) == data[0x1F1:0x210]
    assert memory.read(ZERO_PAGE + 0x230, 0x26C - 0x230) == data[0x230:0x26C]
    assert memory.read(ZERO_PAGE + 0x26C, 0x2D0 - 0x26C) == bytes(0x64)
    assert field(memory, 0x210, "B") == 0xFF
    assert field(memory, 0x211, "B") & 1


def test_vmlinux_gets_a_header_of_our_own() -> None:
    memory = guest_memory()
    memory.write(0x1000000, b"\xff" * 4096)
    state = load(memory, Elf([Segment(b"start", memory_size=3000)], 0x1000002).build())
    assert (state.mode, state.rip) == (CpuMode.LONG64, 0x1000002)
    # What an earlier boot left in .bss is gone, what lies behind the kernel is not its business.
    assert memory.read(0x1000000, 3000) == b"start" + bytes(2995)
    assert memory.read(0x1000000 + 3000, 2) == b"\xff\xff"
    assert field(memory, 0x1FE, "H") == 0xAA55
    assert memory.read(ZERO_PAGE + 0x202, 4) == b"HdrS"
    assert field(memory, 0x206, "H") >= 0x20C
    assert field(memory, 0x210, "B") == 0xFF
    assert field(memory, 0x238, "I") == 2047


def test_long_zeros_behind_a_segment() -> None:
    memory = guest_memory()
    size = 3 * MIB + 5
    memory.view(0x1000000, size)[:] = b"\xff" * size
    load(memory, Elf([Segment(b"text" * 30, memory_size=size - 1)]).build())
    assert memory.read(0x1000000 + 120, size - 121) == bytes(size - 121)
    assert memory.read(0x1000000 + size - 1, 1) == b"\xff"


def test_zero_page_points_everywhere() -> None:
    memory = guest_memory()
    memory.write(ZERO_PAGE, b"\xff" * 4096)
    load(memory, BzImage().build(), command_line="a=1 b=ü", initrd=b"initrd" * 1000)
    command_line = field(memory, 0x228, "I")
    assert memory.read(command_line, 9) == b"a=1 b=\xc3\xbc\0"
    address, size = field(memory, 0x218, "I"), field(memory, 0x21C, "I")
    assert size == 6000
    assert memory.read(address, size) == b"initrd" * 1000
    assert field(memory, 0x70, "Q") == 0xE0000
    assert field(memory, 0x1E8, "B") == len(E820)
    table = memory.read(ZERO_PAGE + 0x2D0, 20 * len(E820))
    assert [E820Entry(a, s, E820Type(t)) for a, s, t in struct.iter_unpack("<QQI", table)] == list(
        E820
    )
    assert memory.read(ZERO_PAGE, 0x70) == bytes(0x70)


def test_memory_map_has_128_entries_at_most() -> None:
    entry = E820[0]
    load(guest_memory(), BzImage().build(), e820=(entry,) * 128)
    with pytest.raises(HvHostError, match="129 entries"):
        load(guest_memory(), BzImage().build(), e820=(entry,) * 129)


def test_32_bit_kernel_starts_in_protected_mode() -> None:
    memory = guest_memory()
    state = load(memory, BzImage(xloadflags=0).build())
    assert (state.mode, state.rip, state.rsi) == (CpuMode.PROTECTED32, 0x1000000, ZERO_PAGE)
    assert (state.cr3, state.cr4, state.efer) == (0, 0, 0)
    assert state.cr0 == 0x11
    assert memory.read(0x9000, 8) == bytes(8)


def test_32_bit_vmlinux_starts_at_its_entry() -> None:
    memory = guest_memory()
    state = load(memory, Elf.of_32_bits([Segment(b"start" * 9)], 0x1000002).build())
    assert (state.mode, state.rip, state.rsi) == (CpuMode.PROTECTED32, 0x1000002, ZERO_PAGE)
    assert (state.cr0, state.cr3, state.rbx) == (0x11, 0, 0)
    assert memory.read(0x1000000, 5) == b"start"


@pytest.mark.parametrize(("xloadflags", "end"), [(0, 768 * MIB), (1, 800 * MIB)])
def test_initrd_of_a_32_bit_kernel_lies_where_it_is_mapped(xloadflags: int, end: int) -> None:
    memory = guest_memory(800 * MIB)
    load(memory, BzImage(xloadflags=xloadflags).build(), initrd=b"initrd" * 100)
    assert field(memory, 0x218, "I") == end - 4096


def test_registers_of_long_mode() -> None:
    state = load(guest_memory(), BzImage().build())
    assert (state.cr0, state.cr4, state.efer) == (0x80000011, 0x20, 0x500)
    assert state.page_table_address == state.cr3 == 0x9000
    assert state.rflags == 2
    assert (state.code.selector, state.data.selector) == (0x10, 0x18)  # __BOOT_CS, __BOOT_DS
    assert (state.code.l, state.code.db) == (1, 0)


def test_gdt_in_memory_matches_the_segments() -> None:
    memory = guest_memory()
    state = load(memory, BzImage().build())
    gdt = struct.unpack("<6Q", memory.read(state.gdt_address, state.gdt_limit + 1))
    assert gdt == (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067, 0)
    protected = state._replace(mode=CpuMode.PROTECTED32)
    assert struct.unpack_from("<Q", protected.gdt(), 16)[0] == 0x00CF9B000000FFFF


def walk(memory: GuestMemory, root: int, address: int) -> int | None:
    """What a processor makes of *address*: 4-level paging, large pages only at level 2."""
    table = root
    for shift in (39, 30, 21):
        entry = memory.load64(table + 8 * (address >> shift & 0x1FF))
        if not entry & 1:
            return None
        assert entry & 2
        if shift == 21:
            assert entry & 0x80
            return entry & ~0x1FFFFF | address & 0x1FFFFF
        table = entry & ~0xFFF
    return None


LOADED = guest_memory()
ROOT = load(LOADED, BzImage().build()).cr3


@given(st.integers(0, (1 << 32) - 1))
def test_page_tables_map_4_gib_to_themselves(address: int) -> None:
    assert walk(LOADED, ROOT, address) == address


@given(st.integers(1 << 32, (1 << 48) - 1))
def test_page_tables_map_nothing_else(address: int) -> None:
    assert walk(LOADED, ROOT, address) is None


def test_command_line_limit_is_the_kernels() -> None:
    data = BzImage(command_line_size=20).build()
    load(guest_memory(), data, command_line="x" * 20)
    with pytest.raises(HvHostError, match="has 21 bytes and this kernel takes 20"):
        load(guest_memory(), data, command_line="x" * 21)


def test_command_line_limit_is_ours_too() -> None:
    data = BzImage(command_line_size=0xFFFFFFFF).build()
    room = 0x9FC00 - 0x20000 - 1
    load(guest_memory(), data, command_line="x" * room)
    with pytest.raises(HvHostError, match=f"takes {room}"):
        load(guest_memory(), data, command_line="x" * (room + 1))


def test_command_line_without_nul() -> None:
    with pytest.raises(HvHostError, match="NUL"):
        load(guest_memory(), BzImage().build(), command_line="a\0b")


def test_kernel_that_does_not_fit() -> None:
    fitting = BzImage(init_size=16 * MIB).build()
    load(guest_memory(32 * MIB), fitting)
    with pytest.raises(HvHostError, match="needs memory up to 32 MiB, the machine has 31 MiB"):
        load(guest_memory(31 * MIB), fitting)


@pytest.mark.parametrize("address", [32 * MIB - 5, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_bzimage_that_wants_to_be_elsewhere(address: int) -> None:
    with pytest.raises(HvHostError, match="give it more memory"):
        load(guest_memory(), BzImage(load_address=address).build())


def test_vmlinux_that_does_not_fit() -> None:
    size = 16 * MIB
    load(guest_memory(32 * MIB), Elf([Segment(b"x", memory_size=size)]).build())
    with pytest.raises(HvHostError, match="give it more memory"):
        load(guest_memory(32 * MIB), Elf([Segment(b"x", memory_size=size + 1)]).build())


def test_nothing_is_loaded_over_the_boot_data() -> None:
    load(guest_memory(), Elf([Segment(b"text", 0x100000)], 0x100000).build())
    with pytest.raises(HvHostError, match="below 1 MiB"):
        load(guest_memory(), Elf([Segment(b"text", 0xFFFFF)], 0xFFFFF).build())
    with pytest.raises(HvHostError, match="below 1 MiB"):
        load(guest_memory(), BzImage(load_address=0x7000).build())


def test_initrd_stays_below_the_kernels_limit() -> None:
    memory = guest_memory()
    data = BzImage(initrd_address_max=0x1400FFF, init_size=MIB).build()
    load(memory, data, initrd=b"x" * 5000)
    assert field(memory, 0x218, "I") == 0x1401000 - 8192


def test_initrd_and_kernel_do_not_meet() -> None:
    data = BzImage(init_size=8 * MIB).build()
    memory = guest_memory()
    load(memory, data, initrd=bytes(8 * MIB))
    assert field(memory, 0x218, "I") == 24 * MIB
    with pytest.raises(HvHostError, match="does not fit between the kernel"):
        load(guest_memory(), data, initrd=bytes(8 * MIB + 1))


def test_extracted_vmlinux_keeps_the_room_its_header_asks_for() -> None:
    setup = parse_kernel(BzImage(init_size=8 * MIB).build(), "vmlinuz").setup
    image = parse_kernel(Elf().build(), "vmlinux")._replace(setup=setup)

    def start(initrd: bytes) -> None:
        load_linux(guest_memory(), image, command_line="", initrd=initrd, e820=E820, rsdp_address=0)

    start(bytes(8 * MIB))
    with pytest.raises(HvHostError, match="does not fit"):
        start(bytes(8 * MIB + 1))


@given(st.integers(1, 200_000), st.integers(20 * MIB, 40 * MIB))
@settings(max_examples=20)
def test_initrd_is_high_and_aligned(size: int, memory_size: int) -> None:
    memory = guest_memory(memory_size)
    load(memory, BzImage().build(), initrd=memoryview(b"\xa5" * size))
    address = field(memory, 0x218, "I")
    assert address % 4096 == 0
    assert 0 <= memory_size - (address + size) < 4096
    assert memory.read(address, size) == b"\xa5" * size


def test_memory_above_4_gib_is_not_used_for_loading() -> None:
    memory = guest_memory(32 * MIB, high=16 * MIB)
    load(memory, BzImage().build(), initrd=b"x" * 100)
    assert field(memory, 0x218, "I") == 32 * MIB - 4096
    assert memory.read(1 << 32, MIB) == bytes(MIB)


def test_memory_that_does_not_start_at_0() -> None:
    region = guest_memory().regions[0]
    memory = GuestMemory([region._replace(guest_address=1 << 32)])
    with pytest.raises(HvHostError, match="more memory"):
        load(memory, BzImage().build())


def test_other_systems_are_sent_to_pvh() -> None:
    data = Elf([Segment(b"btext", 0x200000), pvh_note(0x200000)], 1 << 63).build()
    with pytest.raises(HvHostError, match="PVH"):
        load(guest_memory(), data)


def start_any(image: KernelImage) -> BootState:
    return load_kernel(
        guest_memory(), image, command_line="", initrd=None, e820=E820, rsdp_address=0xE0000
    )


def test_linux_is_preferred_and_pvh_is_for_the_others() -> None:
    linux = parse_kernel(Elf([Segment(b"x" * 64), pvh_note(0x1000008)]).build(), "vmlinux")
    assert start_any(linux).mode is CpuMode.LONG64
    data = Elf([Segment(b"btext", 0x200000), pvh_note(0x200000)], 1 << 63).build()
    state = start_any(parse_kernel(data, "kernel"))
    assert (state.mode, state.rip) == (CpuMode.PROTECTED32, 0x200000)
