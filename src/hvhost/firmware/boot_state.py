"""The registers a virtual processor starts with; pure data, whatever KVM calls them."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from hvhost.firmware.layout import GDT_ADDRESS


class CpuMode(StrEnum):
    """How the boot VP starts; every other VP waits for its start-up IPI."""

    LONG64 = "long64"
    PROTECTED32 = "protected32"


CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10

CODE_SELECTOR, DATA_SELECTOR, TASK_SELECTOR = 0x10, 0x18, 0x20


class Segment(NamedTuple):
    """One segment register with its hidden part ([Intel SDM] 3.4.5); *limit* in bytes.

    *type* is the descriptor type, *s* tells code and data (1) from system segments (0), *db* and
    *l* the operand size, *g* that the limit was given in pages.
    """

    selector: int
    type: int
    base: int = 0
    limit: int = 0xFFFFFFFF
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 # its name in the manual
    g: int = 1

    def descriptor(self) -> int:
        """The segment as an 8-byte GDT entry (of a system segment, the lower 8)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.l << 1 | self.db << 2 | self.g << 3
        return (
            limit & 0xFFFF
            | (self.base & 0xFFFFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


_CODE64 = Segment(CODE_SELECTOR, type=0xB, l=1)
_CODE32 = Segment(CODE_SELECTOR, type=0xB, db=1)
_DATA = Segment(DATA_SELECTOR, type=0x3, db=1)
_TASK = Segment(TASK_SELECTOR, type=0xB, limit=0x67, s=0, g=0)


class BootState(NamedTuple):
    """The boot VP's first state. Registers not named here are 0, interrupts are off.

    The GDT at *gdt_address* was written by the loader and matches the segments; *cr3* is 0 in
    protected mode, where paging is off. ES, FS, GS and SS are as DS (*data*).
    """

    mode: CpuMode
    rip: int
    rsp: int = 0
    rsi: int = 0
    rbx: int = 0
    cr3: int = 0
    gdt_address: int = GDT_ADDRESS
    rflags: int = 2

    @property
    def page_table_address(self) -> int:
        """Guest address of the PML4 (the same as *cr3*); 0 without paging."""
        return self.cr3

    @property
    def cr0(self) -> int:
        return CR0_PE | CR0_ET | (CR0_PG if self.mode is CpuMode.LONG64 else 0)

    @property
    def cr4(self) -> int:
        return CR4_PAE if self.mode is CpuMode.LONG64 else 0

    @property
    def efer(self) -> int:
        return EFER_LME | EFER_LMA if self.mode is CpuMode.LONG64 else 0

    @property
    def code(self) -> Segment:
        return _CODE64 if self.mode is CpuMode.LONG64 else _CODE32

    @property
    def data(self) -> Segment:
        return _DATA

    @property
    def task(self) -> Segment:
        return _TASK

    @property
    def gdt_limit(self) -> int:
        """Size of the GDT less one, as the register wants it."""
        return len(self.gdt()) - 1

    def gdt(self) -> bytes:
        """The GDT the loaders write to *gdt_address*; the task segment takes two entries."""
        entries = (0, 0, self.code, self.data, self.task, 0)
        return b"".join(
            (entry.descriptor() if isinstance(entry, Segment) else entry).to_bytes(8, "little")
            for entry in entries
        )
