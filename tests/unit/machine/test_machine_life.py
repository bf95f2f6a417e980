"""A whole machine over a KVM in memory, from the reset vector to power-off."""

from __future__ import annotations

import errno
import gc
import logging
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fake_transport import (
    Fails,
    FakeTransport,
    Halt,
    Hypercall,
    In,
    Other,
    Out,
    ReadMsr,
    Script,
    SynicWrite,
    WriteMsr,
)
from kernel_files import Elf, Segment, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.image import KernelImage, parse_kernel
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Exit
from hvhost.machine import machine as machine_module
from hvhost.machine.computer import FIRST_SYNIC_GSI
from hvhost.machine.loop import Loop
from hvhost.machine.machine import Machine
from hvhost.machine.model import MachineConfig, MachineState, ShutdownAction
from hvhost.partition.crash import HV_X64_MSR_CRASH_CTL, HV_X64_MSR_CRASH_P0
from hvhost.vmbus.protocol import InitiateContact, encode

MIB = 1 << 20
MEMORY = 16 * MIB
S5 = Out(0x604, 2, struct.pack("<H", 5 << 10 | 1 << 13))
Guest = Callable[[FakeTransport], Script]


def kernel() -> KernelImage:
    segments = [Segment(b"kernel text" * 100, 0x200000), pvh_note(0x200000)]
    return parse_kernel(Elf(segments, 0x200000).build(), "kernel")


class Life:
    """A machine whose boots follow one script each, its loop on a thread of its own."""

    def __init__(self, *boots: tuple[Guest, ...], cpus: int = 1, serial_ports: int = 2) -> None:
        self.config = MachineConfig(
            "test", "/kernel", cpus=cpus, memory=MEMORY, serial_ports=serial_ports
        )
        self.boots = list(boots)
        self.transports: list[FakeTransport] = []
        self.output = [bytearray() for _ in range(serial_ports)]
        self.loop = Loop()
        self.fail_connect: Exception | None = None
        self.states: list[MachineState] = []
        """The machine's at each start, while its computer is built."""
        self.machine = Machine(
            self.config,
            kernel(),
            self.connect,
            self.loop,
            [output.extend for output in self.output],
        )
        self.thread = threading.Thread(target=self.loop.run)

    def connect(self) -> FakeTransport:
        self.states.append(self.machine.info().state)
        with pytest.raises(HvHostError, match="just being started; try again"):
            self.machine.nmi()
        if self.fail_connect is not None:
            raise self.fail_connect
        scripts = self.boots.pop(0) if self.boots else ()
        transport = FakeTransport(MEMORY, *scripts)
        self.transports.append(transport)
        return transport

    def start(self) -> None:
        self.machine.power_on()
        self.thread.start()

    def ended(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive(), "the machine did not stop"

    def kinds(self) -> list[tuple[str, str]]:
        return [(event.kind, event.detail) for event in self.machine.events(0, 0)]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)

    @property
    def readers(self) -> int:
        """Descriptors in the loop besides its own."""
        return len(self.loop._callbacks) - 1


@contextmanager
def life(*boots: tuple[Guest, ...], cpus: int = 1, serial_ports: int = 2) -> Iterator[Life]:
    """A started machine; at the end nothing of it is left."""
    before = set(threading.enumerate())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    one = Life(*boots, cpus=cpus, serial_ports=serial_ports)
    try:
        one.start()
        yield one
    finally:
        one.machine.force_stop()
        one.ended()
        one.machine.close()
        assert one.readers == 0
        assert all(transport.closed == 1 for transport in one.transports)
        one.loop.close()
        left = [each for each in threading.enumerate() if each not in before]
        assert not left, f"threads are left: {left}"
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def says(port: int, text: bytes) -> Script:
    for character in text:
        yield Out(port, 1, bytes([character]))


def test_from_power_on_to_power_off() -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield from says(0x3F8, b"hello\n")
        yield from says(0x2F8, b"com2")
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert [bytes(output) for output in one.output] == [b"hello\n", b"com2"]
        info = one.machine.info()
        assert info.state is MachineState.STOPPED
        assert info.last_stop == "the guest powered off"
        assert info.error is None
        assert one.kinds() == [
            ("started", "boot 1"),
            ("sleep", "S5"),
            ("stopped", "the guest powered off"),
        ]


def test_what_a_computer_is_built_of() -> None:
    with life((), cpus=3) as one:
        (transport,) = one.transports
        assert transport.slots == {0: (0, MEMORY, 0)}
        assert transport.filtered == (HV_X64_MSR_CRASH_P0, 6)
        assert transport.coalesced_ports == [0x70, *range(0xCF8, 0xCFC), 0x3F8, 0x2F8]
        sints = [route for route in transport.routes if route[1] == k.KVM_IRQ_ROUTING_HV_SINT]
        assert [(gsi, vp, sint) for gsi, _, _, _, vp, sint in sints] == [
            (FIRST_SYNIC_GSI + n, n // 2, 2) for n in range(6)
        ]
        assert sorted(transport.irqs) == [3, 4, *range(FIRST_SYNIC_GSI, FIRST_SYNIC_GSI + 6)]
        assert sorted(transport.resamples) == [FIRST_SYNIC_GSI + n for n in (1, 3, 5)]
        for index, state in transport.vcpus.items():
            assert state.enabled == [k.Capability.HYPERV_SYNIC2]
            (leaf,) = [entry for entry in state.cpuid if entry.function == 1]
            assert leaf.ebx >> 24 == index
        boot = struct.unpack("<18Q", transport.vcpus[0].regs)
        assert boot[16] == 0x200000, "PVH entry"
        assert transport.vcpus[0].sregs[8 * 24 + 32] & 1, "protected mode"
        assert transport.vcpus[1].regs == bytes(144), "the others wait for their start-up"
        assert bytes(transport.memory[0x200000:0x20000B]) == b"kernel text"
        tables = bytes(transport.memory[0xE0000:0x100000])
        assert b"RSD PTR " in tables
        assert b"_S5_" in tables and b"_S4_" not in tables, "Linux would take and give no memory"


def test_memory_comes_and_goes() -> None:
    """Added memory is a slot of KVM and RAM to the host; what is discarded reads as zero."""
    with life(()) as one:
        transport = one.transports[0]
        computer = one.machine._computer
        assert computer is not None
        start = computer.hot_add.start
        with pytest.raises(HvHostError, match="is not RAM"):
            computer.memory.view(start, 1)
        transport.memory = memoryview(bytearray(MEMORY + 4 * MIB))
        with computer.lock:
            computer.plug_memory(start + 2 * MIB)
            computer.plug_memory(start + 2 * MIB)  # it is there
            computer.plug_memory(start + 4 * MIB)
        assert [slot[:2] for slot in list(transport.slots.values())[-2:]] == [
            (start, 2 * MIB),
            (start + 2 * MIB, 2 * MIB),
        ]
        computer.memory.write(start + 2 * MIB, b"hello")
        assert bytes(transport.memory[MEMORY + 2 * MIB : MEMORY + 2 * MIB + 5]) == b"hello"
        with computer.lock:
            computer.discard_memory(start + 2 * MIB, 4096)
        assert computer.memory.read(start + 2 * MIB, 5) == bytes(5)
        assert transport.discarded == [(MEMORY + 2 * MIB, 4096)]
        assert computer.resident_memory() == MEMORY + 4 * MIB - 4096


def test_coalesced_output_keeps_its_place() -> None:
    def guest(kvm: FakeTransport) -> Script:
        kvm.coalesce(0x3F8, b"a")
        kvm.coalesce(0x3F8, b"b")
        yield Out(0x3F8, 1, b"c")
        kvm.coalesce(0x3F8, b"d")
        status = yield In(0x3FD)
        assert status == b"\x60"
        kvm.coalesce(0x3F8, b"e")
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert bytes(one.output[0]) == b"abcde"


@pytest.mark.parametrize(
    "end", [Other(Exit.SHUTDOWN), Other(Exit.INTERNAL_ERROR, 1), Halt()], ids=lambda s: repr(s)
)
def test_the_last_words_come_out_however_it_ends(end: object) -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield Out(0x3F8, 1, b"l")
        kvm.coalesce(0x3F8, b"a")
        kvm.coalesce(0x3F8, b"s")
        kvm.coalesce(0x3F8, b"t")
        yield end  # type: ignore[misc]

    with life((guest,)) as one:
        if isinstance(end, Halt):
            one.wait_for(lambda: one.transports[0].ring[4])
            one.machine.force_stop()
        one.wait_for(lambda: len(one.kinds()) > 1)
        one.wait_for(lambda: bytes(one.output[0]) == b"last")


def test_a_triple_fault_is_a_reset_and_a_new_computer() -> None:
    def first(kvm: FakeTransport) -> Script:
        kvm.memory[0x300000] = 0x77
        yield Other(Exit.SHUTDOWN)

    def second(kvm: FakeTransport) -> Script:
        assert kvm.memory[0x300000] == 0
        yield from says(0x3F8, b"again\n")
        yield S5

    with life((first,), (second,)) as one:
        one.ended()
        assert bytes(one.output[0]) == b"again\n"
        assert one.kinds() == [
            ("started", "boot 1"),
            ("reset", "triple fault"),
            ("started", "boot 2"),
            ("sleep", "S5"),
            ("stopped", "the guest powered off"),
        ]
        assert one.machine.info().boots == 2


@pytest.mark.parametrize("how", [Out(0xCF9, 1, b"\x06"), Out(0x64, 1, b"\xfe")])
def test_the_ways_a_guest_resets(how: Out) -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield how
        yield how

    with life((guest,)) as one:
        one.wait_for(lambda: len(one.kinds()) == 3)
        assert one.kinds() == [
            ("started", "boot 1"),
            ("reset", "reset register"),
            ("started", "boot 2"),
        ]


def test_processors_that_fault_at_once_reset_once() -> None:
    together = threading.Barrier(3)

    def guest(kvm: FakeTransport) -> Script:
        together.wait(10)
        yield Other(Exit.SHUTDOWN)

    with life((guest, guest, guest), cpus=3) as one:
        one.wait_for(lambda: one.machine.info().boots == 2)
        time.sleep(0.1)
        assert [kind for kind, _ in one.kinds()] == ["started", "reset", "started"]


def test_a_reset_leaves_nothing_of_the_old_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "INTERVAL", 0.02)
    with life() as one:
        one.wait_for(lambda: one.machine.info().boots == 1)
        readers, threads = one.readers, threading.active_count()
        old = one.machine._computer
        assert old is not None
        known = weakref.ref(old)
        del old
        for boot in range(2, 8):
            one.machine.reset()
            one.wait_for(lambda boot=boot: one.machine.info().boots == boot)  # type: ignore[misc]
        assert one.readers == readers
        assert threading.active_count() == threads
        assert [transport.closed for transport in one.transports] == [1] * 6 + [0]
        # Its memory is large: nobody may keep it for longer than a tick.
        one.wait_for(lambda: gc.collect() >= 0 and known() is None)


def test_internal_errors_are_a_failure_with_a_sentence() -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest,)) as one:
        one.ended()
        info = one.machine.info()
        assert info.state is MachineState.FAILED
        assert info.error == info.last_stop
        assert info.error == "KVM stopped virtual processor 0 with INTERNAL_ERROR (detail 0x1)."
        assert one.kinds()[-1] == ("stopped", info.error)


def test_interruptions_cost_nothing() -> None:
    def guest(kvm: FakeTransport) -> Script:
        for number in (errno.EINTR, errno.EAGAIN) * 10:
            yield Fails(number)
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert one.machine.info().last_stop == "the guest powered off"


# --- the hypervisor's own -----------------------------------------------------------------------

MESSAGE_PAGE, EVENT_PAGE, INPUT_PAGE = 0x400000, 0x401000, 0x402000
SLOT = MESSAGE_PAGE + 2 * 256


def contact(kvm: FakeTransport, target_vp: int = 0) -> Hypercall:
    """HvPostMessage of INITIATE_CONTACT for version 5.3."""
    payload = encode(InitiateContact(0x50003, target_vp, 2, 0, 0))
    message = struct.pack("<IIII", 4, 0, 1, len(payload)) + payload
    kvm.memory[INPUT_PAGE : INPUT_PAGE + len(message)] = message
    return Hypercall(0x5C, INPUT_PAGE)


def test_the_bus_answers_through_the_message_page() -> None:
    results: list[object] = []

    def guest(kvm: FakeTransport) -> Script:
        yield SynicWrite(1, EVENT_PAGE | 1, MESSAGE_PAGE | 1)
        call = contact(kvm)
        results.append((yield call))
        yield Halt()

    with life((guest,)) as one:
        one.wait_for(lambda: one.machine.info().vmbus_version)
        assert one.machine.info().vmbus_version == "5.3"
        assert ("bus", "5.3") in one.kinds()
        (transport,) = one.transports
        one.wait_for(lambda: results)
        assert results == [0]
        message_type, size = struct.unpack_from("<IB", transport.memory, SLOT)
        kind, _, supported = struct.unpack_from("<IIB", transport.memory, SLOT + 16)
        assert (message_type, kind, supported) == (1, 15, 1)
        assert size >= 16
        assert transport.irqs[FIRST_SYNIC_GSI + 1].raised == 1
        assert transport.irqs[FIRST_SYNIC_GSI].raised == 0


def test_a_message_waits_for_the_end_of_the_last_one() -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield SynicWrite(1, EVENT_PAGE | 1, MESSAGE_PAGE | 1)
        for _ in range(2):
            call = contact(kvm)
            yield call
        yield Halt()

    with life((guest,)) as one:
        (transport,) = one.transports
        line = transport.irqs[FIRST_SYNIC_GSI + 1]
        one.wait_for(lambda: transport.memory[SLOT + 5] == 1)
        assert line.raised == 1
        struct.pack_into("<I", transport.memory, SLOT, 0)
        transport.raise_event(transport.resamples[FIRST_SYNIC_GSI + 1])
        one.wait_for(lambda: line.raised == 2)
        assert transport.memory[SLOT] == 1


def test_a_message_to_another_processor() -> None:
    def first(kvm: FakeTransport) -> Script:
        call = contact(kvm, target_vp=1)
        yield call
        yield Halt()

    def second(kvm: FakeTransport) -> Script:
        yield SynicWrite(1, EVENT_PAGE | 1, MESSAGE_PAGE | 1)
        yield Halt()

    with life((first, second), cpus=2) as one:
        (transport,) = one.transports
        one.wait_for(lambda: transport.irqs[FIRST_SYNIC_GSI + 3].raised)
        assert transport.irqs[FIRST_SYNIC_GSI + 1].raised == 0
        assert transport.memory[SLOT] == 1


def test_signals_of_a_connection_nobody_has() -> None:
    answers: list[object] = []

    def guest(kvm: FakeTransport) -> Script:
        answers.append((yield Hypercall(0x5D | 1 << 16, 99)))
        answers.append((yield Hypercall(0x1234, 0)))
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert answers == [0x12, 0x02]


def test_a_crash_is_reported_with_its_text() -> None:
    text = b"Kernel panic - not syncing: because\n"

    def guest(kvm: FakeTransport) -> Script:
        kvm.memory[0x500000 : 0x500000 + len(text)] = text
        notify = yield ReadMsr(HV_X64_MSR_CRASH_CTL)
        assert notify == 3 << 62
        for index, value in enumerate((10, 11, 12, 0x500000, len(text))):
            taken = yield WriteMsr(HV_X64_MSR_CRASH_P0 + index, value)
            assert taken
        yield WriteMsr(HV_X64_MSR_CRASH_CTL, 3 << 62)
        yield Halt()

    with life((guest,), ()) as one:
        one.wait_for(lambda: one.machine.info().crash)
        info = one.machine.info()
        assert info.state is MachineState.CRASHED
        assert info.crash is not None
        assert info.crash.text == text.decode()
        assert info.crash.parameters == (10, 11, 12, 0x500000, len(text))
        assert info.heartbeat == "crashed"
        assert ("crash", text.decode()) in one.kinds()
        one.machine.reset()
        one.wait_for(lambda: one.machine.info().boots == 2)
        info = one.machine.info()
        assert (info.state, info.crash) == (MachineState.RUNNING, None)
        assert one.states == 2 * [MachineState.STARTING], "while it starts it has not crashed"


def test_a_guest_that_crashes_at_random_places() -> None:
    """Text nowhere, and MSRs that are not there: answers, and the machine goes on."""
    answers: list[object] = []

    def guest(kvm: FakeTransport) -> Script:
        yield WriteMsr(HV_X64_MSR_CRASH_P0 + 3, 2**64 - 1)
        yield WriteMsr(HV_X64_MSR_CRASH_P0 + 4, 2**64 - 1)
        yield WriteMsr(HV_X64_MSR_CRASH_CTL, 2**64 - 1)
        answers.append((yield ReadMsr(0x40000106)))
        answers.append((yield WriteMsr(0x40000106, 1)))
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert answers == [None, False]
        assert ("crash", "") in one.kinds()
        assert one.machine.info().last_stop == "the guest powered off"


# --- people -------------------------------------------------------------------------------------


def test_input_reaches_the_guest() -> None:
    typed = bytearray()

    def guest(kvm: FakeTransport) -> Script:
        yield Out(0x3F9, 1, b"\x01")  # received data available
        yield Out(0x3FC, 1, b"\x08")  # OUT2
        yield Halt()
        while len(typed) < 3:
            status = yield In(0x3FD)
            if status[0] & 1:
                typed.extend((yield In(0x3F8)))
        yield S5

    with life((guest,)) as one:
        (transport,) = one.transports
        one.wait_for(lambda: isinstance(transport._processors[0].step, Halt))
        one.machine.serial_input(0, b"abc")
        one.machine.serial_input(7, b"nobody")
        assert transport.irqs[4].raised == 1
        transport.wake(0)
        one.ended()
        assert typed == b"abc"
        one.machine.serial_input(0, b"too late")


def test_a_non_maskable_interrupt() -> None:
    with life() as one:
        one.machine.nmi()
        one.machine.nmi()
        assert one.transports[0].vcpus[0].nmis == 2


def test_the_guests_os_is_read_until_it_is_known() -> None:
    with life() as one:
        assert one.machine.info().guest_os_id == 0
        one.transports[0].vcpus[0].msrs[0x40000000] = 0x8100_0006_0100_0000
        assert one.machine.info().guest_os_id == 0x8100_0006_0100_0000
        reads = len(one.transports[0].requests(k.KVM_GET_MSRS))
        assert one.machine.info().guest_os_id == 0x8100_0006_0100_0000
        assert len(one.transports[0].requests(k.KVM_GET_MSRS)) == reads, "known once is enough"
        one.machine.reset()
        one.wait_for(lambda: one.machine.info().boots == 2)
        assert one.machine.info().guest_os_id == 0


def test_exits_are_counted_over_all_processors() -> None:
    def guest(kvm: FakeTransport) -> Script:
        for _ in range(5):
            yield In(0x71)
        yield Halt()

    with life((guest, guest), cpus=2) as one:
        one.wait_for(lambda: one.machine.info().exits.get("in 0x71") == 10)


def test_exits_are_counted_while_new_ones_come() -> None:
    """A guest that makes up ports all the time does not trip over who counts."""
    stop = threading.Event()

    def guest(kvm: FakeTransport) -> Script:
        port = 0x1000
        while not stop.is_set():
            yield In(port)
            port = 0x1000 + (port + 1) % 0x8000

    with life((guest, guest), cpus=2) as one:
        for _ in range(200):
            one.machine.info()
        stop.set()


def test_information_is_given_at_any_time() -> None:
    """While the machine is reset over and over, whoever asks gets an answer, never an error."""
    with life() as one:
        failures: list[BaseException] = []
        stop = threading.Event()

        def ask() -> None:
            try:
                while not stop.is_set():
                    info = one.machine.info()
                    assert info.state in (MachineState.STARTING, MachineState.RUNNING)
            except BaseException as error:
                failures.append(error)

        askers = [threading.Thread(target=ask) for _ in range(3)]
        for asker in askers:
            asker.start()
        for boot in range(2, 30):
            one.machine.reset()
            one.wait_for(lambda boot=boot: one.machine._boots == boot)  # type: ignore[misc]
        stop.set()
        for asker in askers:
            asker.join(10)
        assert not failures


def test_a_reset_that_comes_too_late_is_not_done() -> None:
    """Asked for in the last boot, when another reset was on its way already."""
    with life() as one:
        loop_is_busy = threading.Event()
        one.loop.call_soon_threadsafe(lambda: loop_is_busy.wait(10))
        one.machine.reset()
        one.machine.reset()
        loop_is_busy.set()
        one.wait_for(lambda: one.machine.info().boots == 2)
        time.sleep(0.05)
        assert one.machine.info().boots == 2


def test_a_failure_of_the_last_boot_does_not_end_this_one() -> None:
    waiting = threading.Event()

    def guest(kvm: FakeTransport) -> Script:
        waiting.wait(10)
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest,)) as one:
        loop_is_busy = threading.Event()
        one.loop.call_soon_threadsafe(lambda: loop_is_busy.wait(10))
        one.machine.reset()
        waiting.set()
        computer = one.machine._computer
        assert computer is not None
        one.wait_for(lambda: computer._over)
        loop_is_busy.set()
        one.wait_for(lambda: one.machine.info().boots == 2)
        time.sleep(0.05)
        assert one.machine.info().state is MachineState.RUNNING


def test_processors_that_fail_at_once_tell_once() -> None:
    together = threading.Barrier(4)
    told: list[str] = []

    def guest(kvm: FakeTransport) -> Script:
        together.wait(10)
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest, guest, guest), cpus=3) as one:
        computer = one.machine._computer
        assert computer is not None
        computer._notices = replace(computer._notices, failed=told.append)
        together.wait(10)
        for processor in computer.processors:
            processor._thread.join(10)
        assert len(told) == 1


def test_stops_that_come_together_are_one() -> None:
    with life() as one:
        loop_is_busy = threading.Event()
        one.loop.call_soon_threadsafe(lambda: loop_is_busy.wait(10))
        for _ in range(3):
            one.machine.force_stop()
        loop_is_busy.set()
        one.ended()
        assert [kind for kind, _ in one.kinds()].count("stopped") == 1


def test_after_the_end_there_is_nothing_to_ask() -> None:
    with life() as one:
        one.machine.force_stop()
        one.ended()
        machine = one.machine
        for call in (
            machine.nmi,
            machine.hang,
            machine.processors,
            machine.reset,
            lambda: machine.shut_down(ShutdownAction.REBOOT),
            lambda: machine.heartbeat_round_trips(1),
        ):
            with pytest.raises(HvHostError, match="'test' is not running; start it again"):
                call()
        info = machine.info()
        assert info.last_stop == "powered off by force"
        assert info.state is MachineState.STOPPED
        machine.force_stop()


def test_events_are_waited_for() -> None:
    with life() as one:
        mark = one.machine.events(0, 0)[-1].sequence
        started = time.monotonic()
        assert one.machine.events(mark, 0.1) == []
        assert time.monotonic() - started >= 0.1
        threading.Timer(0.05, one.machine.reset).start()
        (event, *_) = one.machine.events(mark, 10)
        assert (event.sequence, event.kind) == (mark + 1, "reset")


def test_old_events_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "MAXIMUM_EVENTS", 5)
    with life() as one:
        for _ in range(10):
            one.machine.record("fault", "x")
        events = one.machine.events(0, 0)
        assert len(events) == 5
        assert [event.sequence for event in events] == [7, 8, 9, 10, 11]


def test_a_heartbeat_measurement_ends_with_the_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_LOOK_SECONDS", 0.01)
    with life() as one:
        monkeypatch.setattr(one.machine._heartbeat, "measure", lambda count, done: None)
        threading.Timer(0.1, one.machine.reset).start()
        with pytest.raises(HvHostError, match="stopped answering heartbeats"):
            one.machine.heartbeat_round_trips(1)


def test_the_tick_brings_output_that_caused_no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "INTERVAL", 0.02)

    def guest(kvm: FakeTransport) -> Script:
        kvm.waiting += [(0x3F8, b"h"), (0x3F8, b"i")]
        yield Halt()

    with life((guest,)) as one:
        one.wait_for(lambda: bytes(one.output[0]) == b"hi")


def test_a_tick_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine_module, "INTERVAL", 0.01)
    with life() as one:
        ticks: list[int] = []
        computer = one.machine._computer
        assert computer is not None

        def tick() -> None:
            ticks.append(1)
            raise RuntimeError("a bug")

        monkeypatch.setattr(computer, "tick", tick)
        one.wait_for(lambda: len(ticks) > 3)


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_rig_that_dies_is_one_clean_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every processor and the loop's own calls see it; people are told once."""
    monkeypatch.setattr(machine_module, "INTERVAL", 0.01)
    reason = "the rig's QEMU died: it printed nothing"
    with caplog.at_level(logging.DEBUG), life((), cpus=4) as one:
        time.sleep(0.05)
        one.transports[0].die(reason)
        one.ended()
        info = one.machine.info()
        assert info.state is MachineState.FAILED
        assert info.error == reason
        assert [event for event in one.kinds() if event[0] == "stopped"] == [("stopped", reason)]
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
    assert len([each for each in caplog.records if each.levelno >= logging.ERROR]) == 1


def test_a_kvm_that_cannot_be_reached() -> None:
    one = Life()
    one.fail_connect = HvHostError("no KVM; run `hvhost doctor`.")
    with pytest.raises(HvHostError, match="no KVM"):
        one.machine.power_on()
    one.fail_connect = OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(HvHostError, match=r"'test' could not be built .*Cannot allocate memory"):
        one.machine.power_on()
    assert one.machine.info().state is MachineState.STARTING
    one.loop.close()


@pytest.mark.parametrize(
    "request_number",
    [
        k.KVM_CREATE_VM,
        k.KVM_CREATE_IRQCHIP,
        k.KVM_SET_USER_MEMORY_REGION,
        k.KVM_IRQFD,
        k.KVM_CREATE_VCPU,
        k.KVM_SET_CPUID2,
        k.KVM_SET_GSI_ROUTING,
        k.KVM_X86_SET_MSR_FILTER,
        k.KVM_SET_SREGS,
    ],
)
def test_a_machine_that_cannot_be_built_leaves_nothing(request_number: int) -> None:
    one = Life()
    connect = one.connect

    def failing() -> FakeTransport:
        transport = connect()
        transport.failures[request_number] = errno.EBUSY
        return transport

    one.machine._connect = failing
    with pytest.raises(HvHostError):
        one.machine.power_on()
    assert one.transports[0].closed == 1
    assert one.readers == 0
    assert one.machine._computer is None
    one.loop.close()


def test_a_reset_that_fails_is_a_failure() -> None:
    with life() as one:
        one.fail_connect = HvHostError("the rig has no room.")
        one.machine.reset()
        one.ended()
        info = one.machine.info()
        assert info.error == "the machine could not be reset: the rig has no room."
        assert info.state is MachineState.FAILED
        assert one.kinds()[-1] == ("stopped", info.error)


def test_an_initrd_that_is_gone_at_the_next_boot(tmp_path: Path) -> None:
    one = Life()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"files")
    one.machine._config = MachineConfig("test", "/kernel", initrd=str(initrd), memory=MEMORY)
    one.start()
    initrd.unlink()
    one.machine.reset()
    one.ended()
    error = one.machine.info().error
    assert error is not None
    assert error.startswith("the machine could not be reset: machine 'test' could not be built")
    assert "No such file" in error
    one.loop.close()


def test_a_computer_that_does_not_close_does_not_keep_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Life()
    one.start()
    computer = one.machine._computer
    assert computer is not None
    close = computer.close

    def failing() -> None:
        close()
        raise OSError(errno.EIO, "a bug")

    computer.close = failing  # type: ignore[method-assign]
    one.machine.force_stop()
    one.ended()
    assert one.machine.info().state is MachineState.STOPPED
    one.loop.close()


def runs_on(kvm: FakeTransport) -> Script:
    while True:
        yield Out(0x80, 1, b"x")


def ports_written(one: Life) -> int:
    return one.machine.info().exits.get("out 0x80", 0)


def test_a_paused_machine_stands_still_and_goes_on_where_it_was() -> None:
    with life((runs_on, runs_on), cpus=2) as one:
        machine, (transport,) = one.machine, one.transports
        machine.pause()
        info = machine.info()
        assert (info.state, info.heartbeat) == (MachineState.PAUSED, "paused")
        written = ports_written(one)
        time.sleep(0.02)
        assert ports_written(one) == written
        transport.clock += 10**9  # KVM's goes on
        for call in (
            machine.pause,
            machine.hang,
            machine.time_sync,
            lambda: machine.shut_down(ShutdownAction.REBOOT),
            lambda: machine.heartbeat_round_trips(1),
            lambda: machine.kvp_list(None),
            lambda: machine.copy_start("/f", "/f", create_path=False, overwrite=False),
        ):
            with pytest.raises(HvHostError, match="'test' is paused; `hvhost resume test`"):
                call()
        machine.nmi()
        assert len(machine.processors()) == 2
        machine.resume()
        assert transport.clock == 123456789
        assert machine.info().state is MachineState.RUNNING
        one.wait_for(lambda: ports_written(one) > written)
        with pytest.raises(HvHostError, match="is not paused; it runs"):
            machine.resume()
        kinds = [kind for kind, _ in one.kinds()]
        assert kinds == ["started", "heartbeat", "paused", "resumed", "heartbeat"]


def test_no_time_passes_for_the_services_of_a_paused_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with life((runs_on,)) as one:
        machine, computer = one.machine, one.machine._computer
        assert computer is not None
        ticks: list[float] = []
        monkeypatch.setattr(machine._kvp, "tick", ticks.append)
        machine.pause()
        machine._tick(computer)
        assert not ticks
        machine.resume()
        machine._tick(computer)
        assert ticks


def test_a_resumed_guest_is_told_the_time_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with life((runs_on,)) as one:
        machine, transport = one.machine, one.transports[0]
        told: list[tuple[bool, int]] = []
        running = transport._processors[0]
        monkeypatch.setattr(type(machine._timesync), "ready", True)
        monkeypatch.setattr(
            machine._timesync, "sync", lambda: told.append((running.running, transport.clock))
        )
        machine.pause()
        assert not told
        transport.clock += 10**9
        machine.resume()
        assert told == [(False, 123456789)]


def test_a_paused_machine_is_reset_and_stopped() -> None:
    with life((runs_on,), (runs_on,)) as one:
        one.machine.pause()
        one.machine.reset()
        one.wait_for(lambda: one.machine.info().boots == 2)
        assert one.machine.info().state is MachineState.RUNNING
        one.machine.pause()
        one.machine.force_stop()
        one.ended()
        assert one.machine.info().state is MachineState.STOPPED


def switched_on(one: Life) -> list[str]:
    return [each.name for each in one.machine.services() if each.enabled]


def on_the_bus(one: Life) -> list[str]:
    gone = ("rescinded", "released")
    return [each.name for each in one.machine.info().channels if each.state not in gone]


def test_each_service_is_switched_off_and_on_and_stays_so_over_a_reset() -> None:
    names = ["heartbeat", "shutdown", "timesync", "kvp", "file-copy", "vss"]
    with life((runs_on,), (runs_on,)) as one:
        machine = one.machine
        assert switched_on(one) == names and set(names) <= set(on_the_bus(one))
        for number, name in enumerate(names):
            for _ in range(2):  # off is off
                machine.set_service(name, False)
            assert switched_on(one) == names[number + 1 :]
            assert not set(on_the_bus(one)) & set(names[: number + 1])
        for _ in range(2):  # and not offered twice
            machine.set_service("kvp", True)
        assert on_the_bus(one).count("kvp") == 1
        machine.reset()
        one.wait_for(lambda: machine.info().boots == 2)
        assert switched_on(one) == ["kvp"] and set(on_the_bus(one)) & set(names) == {"kvp"}
        machine.set_service("vss", True)
        assert switched_on(one) == ["kvp", "vss"]
        with pytest.raises(HvHostError, match="no service 'clock'; there are heartbeat, shutdown,"):
            machine.set_service("clock", False)


def test_a_time_that_is_not_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with life((runs_on,)) as one:
        machine = one.machine
        with pytest.raises(HvHostError, match="no time synchronization driver"):
            machine.time_sync()
        monkeypatch.setattr(machine._timesync, "sync", lambda done: done(True))
        assert 0 <= machine.time_sync() < 1
        monkeypatch.setattr(machine._timesync, "sync", lambda done: done(False))
        with pytest.raises(HvHostError, match="refused the time"):
            machine.time_sync()
        monkeypatch.setattr(machine_module, "_TIME_SYNC_SECONDS", 0.01)
        monkeypatch.setattr(machine._timesync, "sync", lambda done: None)
        with pytest.raises(HvHostError, match=r"did not take the time within 0\.01 seconds"):
            machine.time_sync()
