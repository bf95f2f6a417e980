from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable

import pytest
from fake_transport import Fails, FakeTransport, Halt, In, Script

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.vcpu import Vcpu
from hvhost.partition import hang as module
from hvhost.partition.hang import (
    CR4_LA57,
    CR4_PAE,
    EFER_LMA,
    MSR_IA32_SYSENTER_EIP,
    MSR_LSTAR,
    RFLAGS_IF,
    find_self_jump,
    hang,
)
from hvhost.partition.memory import GuestMemory, MemoryRegion
from hvhost.partition.processor import Handlers, Processor

TEXT = 0xFFFFFFFF81000000
ENTRY = TEXT + 0x800
JUMP = b"\xeb\xfe"
TABLES = 0x80000
NO_EXECUTE = 1 << 63


class Ports:
    def read(self, port: int, size: int) -> int:
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        """Nobody there."""

    hypercall = read


class NoMsrs:
    def read(self, msr: int) -> int | None:
        return None

    def write(self, msr: int, value: int) -> bool:
        return False


class Guest:
    """Kernel text at TEXT, *processors* of which all but the first have not started."""

    def __init__(
        self,
        processors: int = 1,
        script: Callable[[FakeTransport], Script] | None = None,
        memory: int = 1 << 20,
    ):
        self.transport = FakeTransport(memory, *([script] * processors if script else []))
        vm = self.transport.ioctl_handle(self.transport.open_kvm(), k.KVM_CREATE_VM)
        self.memory = GuestMemory([MemoryRegion(0, self.transport.memory)])
        self.vcpus = [Vcpu(self.transport, vm, index) for index in range(processors)]
        for state in self.transport.vcpus.values():
            state.msrs[MSR_LSTAR] = ENTRY
        self.stops: list[str] = []
        handlers = Handlers(
            threading.RLock(),
            Ports(),
            NoMsrs(),
            lambda value, parameter, output: 0,
            lambda *values: None,
            lambda: None,
            self.stops.append,
        )
        self.processors = [Processor(vcpu, handlers) for vcpu in self.vcpus]
        self.next_table = TABLES + 0x1000
        self.set_control(TABLES)

    def set_control(self, cr3: int, cr4: int = 0, efer: int = EFER_LMA) -> None:
        for vcpu in self.vcpus:
            special = vcpu.special_registers()
            vcpu.set_special_registers(special._replace(cr3=cr3, cr4=cr4, efer=efer))

    def map(
        self,
        linear: int,
        physical: int,
        content: bytes = b"",
        *,
        levels: int = 4,
        size: int = 0x1000,
        no_execute_at: int | None = None,
    ) -> None:
        """Enter *linear* into the page tables, which grow as needed; fill the page."""
        table = TABLES
        for shift in range(12 + 9 * (levels - 1), 11, -9):
            place = table + 8 * (linear >> shift & 511)
            no_execute = NO_EXECUTE if shift == no_execute_at else 0
            if 1 << shift == size:
                large = 0x80 if size > 0x1000 else 0
                self.write_entry(place, physical | 0x63 | large | no_execute)
                break
            if not self.entry(place):
                self.write_entry(place, self.next_table | 0x67)
                self.next_table += 0x1000
            self.write_entry(place, self.entry(place) | no_execute)
            table = self.entry(place) & 0xFFFFFFFFFF000
        if content:
            self.memory.write(physical, content)

    def entry(self, place: int) -> int:
        return int.from_bytes(self.memory.read(place, 8), "little")

    def write_entry(self, place: int, entry: int) -> None:
        self.memory.write(place, entry.to_bytes(8, "little"))

    def set_ring(self, ring: int, index: int = 0) -> None:
        vcpu = self.vcpus[index]
        special = vcpu.special_registers()
        code = special.segment("cs")
        fields = code._asdict()
        fields["selector"] = 0x10 | ring
        vcpu.set_special_registers(special.with_segments(cs=type(code)(**fields)))


def test_a_jump_after_the_entry() -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000)
    guest.map(TEXT + 0x1000, 0x20000, b"\x90" * 9 + JUMP)
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT + 0x1009


def test_a_jump_before_the_entry() -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000)
    guest.map(TEXT - 0x1000, 0x20000, b"\x90" * 5 + JUMP)
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT - 0x1000 + 5


def test_large_pages_and_five_levels() -> None:
    for size, levels in ((2 << 20, 4), (1 << 30, 4), (2 << 20, 5)):
        guest = Guest(memory=32 << 20)
        guest.set_control(TABLES, CR4_LA57 if levels == 5 else 0)
        guest.map(TEXT & -size, 0, levels=levels, size=size)
        guest.memory.write((TEXT & size - 1) + 0x1234, JUMP)
        assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT + 0x1234


def pae_guest(entry: int = 0xC1000800) -> Guest:
    """A 32-bit kernel at 0xC1000000, whose four top entries stand in a page with other things."""
    guest = Guest(memory=32 << 20)
    guest.set_control(TABLES | 0x18, CR4_PAE, 0)  # PWT and PCD are not part of the address
    for state in guest.transport.vcpus.values():
        state.msrs[MSR_LSTAR] = 0
        state.msrs[MSR_IA32_SYSENTER_EIP] = entry
    return guest


@pytest.mark.parametrize("size", [0x1000, 2 << 20])
def test_a_32_bit_kernel(size: int) -> None:
    guest = pae_guest()
    guest.map(0xC1000000, 0x800000, levels=3, size=size)
    guest.memory.write(0x800000 + 0x234, JUMP)
    assert find_self_jump(guest.vcpus[0], guest.memory) == 0xC1000234


def test_a_32_bit_kernel_that_is_not_known_or_has_no_pae() -> None:
    for guest in (pae_guest(entry=0x400000), pae_guest()):
        guest.map(0x400000, 0x800000, JUMP, levels=3)
        guest.map(0xC1000000, 0x800000, JUMP, levels=3)
    assert find_self_jump(guest.vcpus[0], guest.memory) == 0xC1000000
    guest.set_control(TABLES, 0, 0)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None
    assert find_self_jump(pae_guest(entry=0x400000).vcpus[0], guest.memory) is None


@pytest.mark.parametrize("physical", [0x100000, 1 << 40])
def test_text_that_is_not_in_memory(physical: int) -> None:
    guest = Guest()
    guest.map(TEXT, physical)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None


def test_tables_that_are_not_in_memory() -> None:
    guest = Guest()
    guest.set_control(1 << 40)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None


def test_data_behind_the_text_is_not_taken_for_code() -> None:
    """The system call entry may be at the very end of the text."""
    guest = Guest()
    guest.map(TEXT - 0x1000, 0x10000, b"\x90" * 7 + JUMP)
    guest.map(TEXT, 0x11000, b"\x90")
    guest.map(TEXT + 0x1000, 0x12000, JUMP, no_execute_at=12)
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT - 0x1000 + 7


@pytest.mark.parametrize("level", [12, 21, 30, 39])
def test_every_level_may_forbid_execution(level: int) -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT
    guest.map(TEXT, 0x10000, no_execute_at=level)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None


@pytest.mark.parametrize("level", [12, 39])
def test_only_two_levels_may_name_a_large_page(level: int) -> None:
    """In the last one that bit is of the page's caching, in the first one reserved."""
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    table = TABLES
    for shift in (39, 30, 21, 12):
        place = table + 8 * (TEXT >> shift & 511)
        table = guest.entry(place) & 0xFFFFFFFFFF000
        if shift == level:
            guest.write_entry(place, guest.entry(place) | 0x80)
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT


def test_an_entry_that_is_not_present_names_no_page() -> None:
    """The rest of it is the guest's own: where it swapped the page to, say."""
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    table = TABLES
    for shift in (39, 30, 21, 12):
        place = table + 8 * (TEXT >> shift & 511)
        entry = guest.entry(place)
        guest.write_entry(place, entry & ~1)
        assert find_self_jump(guest.vcpus[0], guest.memory) is None, shift
        guest.write_entry(place, entry)
        table = entry & 0xFFFFFFFFFF000
    assert find_self_jump(guest.vcpus[0], guest.memory) == TEXT


def test_no_jump_and_no_kernel() -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None
    guest.transport.vcpus[0].msrs[MSR_LSTAR] = 0
    assert find_self_jump(guest.vcpus[0], guest.memory) is None


def test_a_search_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest()
    looked: list[int] = []

    def page(special: object, memory: object, address: int) -> int:
        looked.append(address)
        return 0x10000

    monkeypatch.setattr(module, "executable_page", page)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None
    assert len(looked) == 2 * 1024


def test_every_started_processor_spins_with_interrupts_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.0)
    guest = Guest(processors=3)
    guest.map(TEXT, 0x10000, JUMP)
    guest.transport.vcpus[1].mp_state = k.KVM_MP_STATE_HALTED
    for state in guest.transport.vcpus.values():
        state.regs = struct.pack("<18Q", *range(16), 0x1000, 0x246 | RFLAGS_IF)
    for processor in guest.processors:
        processor.start()
    try:
        targets = hang(guest.processors, guest.memory)
    finally:
        for processor in guest.processors:
            processor.stop()
    assert targets == [TEXT, TEXT, 0], "the third was never started"
    for vcpu in guest.vcpus[:2]:
        registers = vcpu.registers()
        assert registers.rip == TEXT
        assert registers.rflags == 0x246 & ~RFLAGS_IF
        assert registers.r15 == 15, "the others are as they were"
        assert vcpu.mp_state() == k.KVM_MP_STATE_RUNNABLE
    assert guest.vcpus[2].registers().rip == 0x1000


def test_a_kernel_without_a_jump_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processor is asked a few times, and left where it was."""
    monkeypatch.setattr(module, "_ATTEMPTS", 3)
    monkeypatch.setattr(module, "_RING_SECONDS", 0.0)
    guest = Guest()
    guest.map(TEXT, 0x10000)
    before = guest.vcpus[0].registers()
    guest.processors[0].start()
    try:
        with pytest.raises(HvHostError, match=r"processor 0 was never caught .* try again"):
            hang(guest.processors, guest.memory)
    finally:
        guest.processors[0].stop()
    assert guest.vcpus[0].registers() == before


def test_a_processor_is_caught_when_it_comes_into_the_kernel() -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    guest.set_ring(3)
    guest.processors[0].start()
    threading.Timer(0.05, lambda: guest.set_ring(0)).start()
    try:
        assert hang(guest.processors, guest.memory) == [TEXT]
    finally:
        guest.processors[0].stop()


@pytest.mark.parametrize("offset", [0, 3, 8, 12, 13])
def test_a_processor_with_an_event_on_its_way_in_is_let_go(offset: int) -> None:
    """Its handler would run whatever the interrupt flag says."""
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    state = guest.transport.vcpus[0]
    events = bytearray(len(state.events))
    events[offset] = 1
    state.events = bytes(events)
    guest.processors[0].start()
    seen: list[int] = []

    def deliver() -> None:
        seen.append(guest.vcpus[0].registers().rip)
        state.events = bytes(len(events))

    threading.Timer(0.05, deliver).start()
    try:
        assert hang(guest.processors, guest.memory) == [TEXT]
    finally:
        guest.processors[0].stop()
    assert seen == [0], "not while the event is on its way"


def test_a_processor_that_is_never_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ATTEMPTS", 3)
    guest = Guest()
    guest.map(TEXT, 0x10000, JUMP)
    guest.set_ring(3)
    guest.processors[0].start()
    try:
        with pytest.raises(HvHostError, match="virtual processor 0 was never caught"):
            hang(guest.processors, guest.memory)
    finally:
        guest.processors[0].stop()
    assert guest.vcpus[0].registers().rip == 0


@pytest.mark.parametrize("flags", [0, RFLAGS_IF])
def test_a_processor_that_leaves_its_jump(flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hung is only who stays where he was put, with interrupts off."""
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.2)
    rip = TEXT + 0x40 if not flags else TEXT

    def script(transport: FakeTransport) -> Script:
        while struct.unpack("<18Q", transport.vcpus[0].regs)[16] != TEXT:
            yield In(0x71)
            time.sleep(0.001)
        transport.vcpus[0].regs = struct.pack("<18Q", *range(16), rip, 2 | flags)
        yield Fails(4)
        yield Halt()

    guest = Guest(script=script)
    guest.map(TEXT, 0x10000, JUMP)
    guest.processors[0].start()
    try:
        with pytest.raises(HvHostError, match=f"left its jump at {TEXT:#x} for {rip:#x}"):
            hang(guest.processors, guest.memory)
    finally:
        guest.processors[0].stop()
