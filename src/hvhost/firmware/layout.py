"""Where things lie in guest physical memory.

RAM is contiguous from 0 up to the MMIO gap below 4 GiB and goes on at 4 GiB, so none is lost. The
low gap holds, from its start, the window VMBus may hand out, then the I/O APIC, KVM's own pages
and the local APIC; the high window lies where Hyper-V puts it, below 64 GiB, or higher when RAM
reaches there. Memory that is added while the machine runs lies between RAM and the high window,
always above 4 GiB.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from hvhost.errors import HvHostError
from hvhost.memory.settings import HIGH_MMIO_DEFAULT, LOW_MMIO_DEFAULT
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import GIB, MIB, format_size

# What the loaders put into the first MiB; a kernel treats all of it as free once it has read it.
GDT_ADDRESS = 0x500
START_INFO_ADDRESS = 0x1000  # PVH
ZERO_PAGE_ADDRESS = 0x7000
BOOT_STACK_ADDRESS = 0x8FF0
PAGE_TABLE_ADDRESS = 0x9000
COMMAND_LINE_ADDRESS = 0x20000
LOW_RAM_END = 0x9FC00  # the extended BIOS data area starts here
ACPI_ADDRESS = 0xE0000
ACPI_SIZE = 0x20000
HIGH_MEMORY_ADDRESS = 0x100000
FOUR_GIB = 4 * GIB

# The VMBus window ends where the I/O APIC's page begins.
LOW_MMIO_END = 0xFEC00000
# KVM_SET_IDENTITY_MAP_ADDR's page and KVM_SET_TSS_ADDR's three pages behind it.
KVM_IDENTITY_MAP_ADDRESS = 0xFFFBC000
KVM_TSS_ADDRESS = 0xFFFBD000
KVM_RESERVED_END = 0xFFFC0000

MINIMUM_MEMORY = 16 * MIB
LOW_MMIO_MINIMUM, LOW_MMIO_MAXIMUM = 128 * MIB, 3584 * MIB
HIGH_MMIO_MAXIMUM = 1024 * GIB
_HIGH_MMIO_END = 64 * GIB
# No guest adds memory in larger blocks: those of Linux have 128 MiB, up to this with 64 GiB of RAM.
_HOT_ADD_ALIGNMENT = 2 * GIB


class E820Type(IntEnum):
    """Kinds of memory in the BIOS map (ACPI specification 6.5, table 15.6)."""

    RAM = 1
    RESERVED = 2


class E820Entry(NamedTuple):
    """One line of the guest's memory map, in bytes."""

    address: int
    size: int
    type: E820Type


class RamRegion(NamedTuple):
    """One KVM memory slot to be: guest address, size and offset in the backing memory, in bytes."""

    guest_address: int
    size: int
    backing_offset: int


class MemoryLayout(NamedTuple):
    """A machine's map; windows as ranges of byte addresses, possibly empty.

    *hot_add* is where memory may be added later; its backing lies behind that of the regions.
    """

    regions: tuple[RamRegion, ...]
    e820: tuple[E820Entry, ...]
    low_mmio: range
    high_mmio: range
    hot_add: range = range(0)

    def check_address_width(self, bits: int) -> None:
        """:class:`HvHostError` if processors with *bits* of physical address do not reach it."""
        end = max(self.high_mmio.stop, self.hot_add.stop, *(e.address + e.size for e in self.e820))
        if end > 1 << bits:
            raise HvHostError(
                f"the machine's memory map ends at {format_size(end)}, but its processors address "
                f"{format_size(1 << bits)}; give it less memory or a smaller high MMIO gap."
            )


def memory_layout(
    memory_bytes: int,
    *,
    low_mmio_bytes: int = LOW_MMIO_DEFAULT,
    high_mmio_bytes: int = HIGH_MMIO_DEFAULT,
    hot_add_bytes: int = 0,
) -> MemoryLayout:
    """Lay out *memory_bytes* of RAM around a gap of *low_mmio_bytes* that ends at 4 GiB.

    *hot_add_bytes* of address space are kept for memory to be added.

    :class:`HvHostError` for sizes no machine can have: RAM below 16 MiB or not whole pages, a gap
    outside 128 MiB to 3.5 GiB or not whole MiB, a high window above 1 TiB or not whole MiB.
    """
    if memory_bytes < MINIMUM_MEMORY or memory_bytes % PAGE_SIZE:
        raise HvHostError(
            f"a machine cannot have {memory_bytes} bytes of memory; "
            f"give it at least {format_size(MINIMUM_MEMORY)}, in whole MiB."
        )
    if not LOW_MMIO_MINIMUM <= low_mmio_bytes <= LOW_MMIO_MAXIMUM or low_mmio_bytes % MIB:
        raise HvHostError(
            f"the low MMIO gap cannot be {format_size(low_mmio_bytes)}; "
            f"choose {format_size(LOW_MMIO_MINIMUM)} to {format_size(LOW_MMIO_MAXIMUM)}, in whole "
            "MiB."
        )
    if not 0 <= high_mmio_bytes <= HIGH_MMIO_MAXIMUM or high_mmio_bytes % MIB:
        raise HvHostError(
            f"the high MMIO gap cannot be {format_size(high_mmio_bytes)}; "
            f"choose up to {format_size(HIGH_MMIO_MAXIMUM)}, in whole MiB."
        )
    gap = FOUR_GIB - low_mmio_bytes
    low = min(memory_bytes, gap)
    high = memory_bytes - low
    regions = [RamRegion(0, low, 0)]
    e820 = [
        E820Entry(0, LOW_RAM_END, E820Type.RAM),
        E820Entry(LOW_RAM_END, 0xA0000 - LOW_RAM_END, E820Type.RESERVED),
        E820Entry(ACPI_ADDRESS, ACPI_SIZE, E820Type.RESERVED),
        E820Entry(HIGH_MEMORY_ADDRESS, low - HIGH_MEMORY_ADDRESS, E820Type.RAM),
        E820Entry(
            KVM_IDENTITY_MAP_ADDRESS,
            KVM_RESERVED_END - KVM_IDENTITY_MAP_ADDRESS,
            E820Type.RESERVED,
        ),
    ]
    if high:
        regions.append(RamRegion(FOUR_GIB, high, low))
        e820.append(E820Entry(FOUR_GIB, high, E820Type.RAM))
    hot_add_start = -(-(FOUR_GIB + high) // _HOT_ADD_ALIGNMENT) * _HOT_ADD_ALIGNMENT
    hot_add = range(hot_add_start, hot_add_start + hot_add_bytes)
    high_end = _HIGH_MMIO_END
    while high_end - high_mmio_bytes < max(FOUR_GIB + high, hot_add.stop):
        high_end *= 2
    return MemoryLayout(
        regions=tuple(regions),
        e820=tuple(e820),
        low_mmio=range(gap, LOW_MMIO_END),
        high_mmio=range(high_end - high_mmio_bytes, high_end),
        hot_add=hot_add,
    )
