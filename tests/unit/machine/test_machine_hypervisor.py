"""What a whole machine answers in the hypervisor's place: messages, signals, crashes."""

from __future__ import annotations

import errno
import struct

from fake_transport import (
    Fails,
    FakeTransport,
    Halt,
    Hypercall,
    ReadMsr,
    Script,
    SynicWrite,
    WriteMsr,
)
from machine_life import S5, life

from hvhost.machine.computer import FIRST_SYNIC_GSI
from hvhost.machine.model import MachineState
from hvhost.partition.crash import HV_X64_MSR_CRASH_CTL, HV_X64_MSR_CRASH_P0
from hvhost.vmbus.protocol import InitiateContact, encode

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


def test_interruptions_cost_nothing() -> None:
    def guest(kvm: FakeTransport) -> Script:
        for number in (errno.EINTR, errno.EAGAIN) * 10:
            yield Fails(number)
        yield S5

    with life((guest,)) as one:
        one.ended()
        assert one.machine.info().last_stop == "the guest powered off"
