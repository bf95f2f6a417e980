"""A whole machine over a KVM in memory, from the reset vector to power-off."""

from __future__ import annotations

import gc
import struct
import threading
import time
import weakref

import pytest
from fake_transport import (
    FakeTransport,
    Halt,
    In,
    Other,
    Out,
    Script,
)
from machine_life import MEMORY, MIB, S5, life, says

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Exit
from hvhost.machine import machine as machine_module
from hvhost.machine.computer import FIRST_SYNIC_GSI
from hvhost.machine.model import MachineState, ShutdownAction
from hvhost.partition.crash import HV_X64_MSR_CRASH_P0


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


def test_a_reset_behind_a_stop_is_not_done() -> None:
    with life() as one:
        loop_is_busy = threading.Event()
        one.loop.call_soon_threadsafe(lambda: loop_is_busy.wait(10))
        one.machine.force_stop()
        one.machine.reset()
        loop_is_busy.set()
        one.ended()
        info = one.machine.info()
        assert (info.state, info.boots) == (MachineState.STOPPED, 1)


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


def test_the_tick_brings_output_that_caused_no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "INTERVAL", 0.02)

    def guest(kvm: FakeTransport) -> Script:
        kvm.waiting += [(0x3F8, b"h"), (0x3F8, b"i")]
        yield Halt()

    with life((guest,)) as one:
        one.wait_for(lambda: bytes(one.output[0]) == b"hi")
