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
from hvhost.partition.hang import MSR_LSTAR, RFLAGS_IF, find_self_jump, hang
from hvhost.partition.memory import GuestMemory, MemoryRegion
from hvhost.partition.processor import Handlers, Processor

TEXT = 0xFFFFFFFF81000000
ENTRY = TEXT + 0x800
JUMP = b"\xeb\xfe"


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
        self, processors: int = 1, script: Callable[[FakeTransport], Script] | None = None
    ):
        self.transport = FakeTransport(1 << 20, *([script] * processors if script else []))
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
            lambda value, parameter: 0,
            lambda *values: None,
            lambda: None,
            self.stops.append,
        )
        self.processors = [Processor(vcpu, handlers) for vcpu in self.vcpus]

    def map(self, linear: int, physical: int, content: bytes = b"") -> None:
        self.transport.tables[linear] = physical
        self.memory.write(physical, content)

    def set_ring(self, ring: int, index: int = 0) -> None:
        vcpu = self.vcpus[index]
        special = vcpu.special_registers()
        code = special.segment("cs")
        fields = {name: getattr(code, name) for name in type(code).__slots__}
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


@pytest.mark.parametrize("physical", [0x100000, 1 << 40])
def test_text_that_is_not_in_memory(physical: int) -> None:
    guest = Guest()
    guest.transport.tables[TEXT] = physical
    assert find_self_jump(guest.vcpus[0], guest.memory) is None


def test_no_jump_and_no_kernel() -> None:
    guest = Guest()
    guest.map(TEXT, 0x10000)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None
    guest.transport.vcpus[0].msrs[MSR_LSTAR] = 0x400000
    guest.map(0x400000, 0x20000, JUMP)
    assert find_self_jump(guest.vcpus[0], guest.memory) is None, "a program's text is no kernel's"


def test_a_search_that_ends() -> None:
    guest = Guest()

    class Endless(dict[int, int]):
        def get(self, key: int, default: object = None) -> int:
            return 0x10000

    guest.transport.tables = Endless()
    assert find_self_jump(guest.vcpus[0], guest.memory) is None
    assert len(guest.transport.requests(k.KVM_TRANSLATE)) == 2 * 1024


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
