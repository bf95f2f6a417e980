"""The loop of a virtual processor over a KVM in memory."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from fake_transport import (
    Fails,
    FakeTransport,
    Halt,
    Hypercall,
    In,
    Mmio,
    Other,
    Out,
    ReadMsr,
    Script,
    Step,
    SynicWrite,
    WriteMsr,
)

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Exit
from hvhost.kvm.vcpu import Vcpu
from hvhost.partition import processor as module
from hvhost.partition.processor import Handlers, Processor


@dataclass
class Machine:
    """What exits end in."""

    events: list[tuple[object, ...]] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def handlers(self) -> Handlers:
        return Handlers(
            lock=self.lock,
            ports=self,
            msrs=Msrs(),
            hypercall=self.hypercall,
            synic=lambda *values: self.events.append(("synic", *values)),
            before_port=lambda: self.events.append(("drain",)),
            stopped=self.stopped,
        )

    def read(self, port: int, size: int) -> int:
        self.events.append(("in", port, size))
        return 0x1122334455 + len(self.events)

    def write(self, port: int, size: int, value: int) -> None:
        self.events.append(("out", port, size, value))
        if port == 0xBAD:
            raise RuntimeError("a bug")

    def hypercall(self, value: int, parameter: int, output: int) -> int:
        self.events.append(("hypercall", value, parameter))
        return 0x12

    def stopped(self, reason: str) -> None:
        self.stops.append(reason)
        self.ended.set()


class Msrs:
    def read(self, msr: int) -> int | None:
        return 0x1234567890ABCDEF if msr == 0x40000100 else None

    def write(self, msr: int, value: int) -> bool:
        return msr == 0x40000100


def build(script: Callable[[FakeTransport], Script]) -> tuple[FakeTransport, Processor, Machine]:
    transport = FakeTransport(1 << 20, script)
    vm = transport.ioctl_handle(transport.open_kvm(), k.KVM_CREATE_VM)
    machine = Machine()
    return transport, Processor(Vcpu(transport, vm, 0), machine.handlers()), machine


def halted(transport: FakeTransport) -> Script:
    yield Halt()


@contextmanager
def running(*steps: Step) -> Iterator[tuple[FakeTransport, Processor, Machine, list[object]]]:
    """A processor that has taken *steps* and halts; the last is the list of answers."""
    answers: list[object] = []
    done = threading.Event()

    def script(transport: FakeTransport) -> Script:
        for step in steps:
            answer = yield step
            answers.append(answer)
        done.set()
        yield Halt()

    transport, processor, machine = build(script)
    processor.start()
    deadline = time.monotonic() + 10
    while not done.wait(0.01) and not machine.ended.is_set():
        assert time.monotonic() < deadline
    try:
        yield transport, processor, machine, answers
    finally:
        processor.stop()
        assert not processor._thread.is_alive()


def test_port_writes_of_every_size() -> None:
    with running(
        Out(0x3F8, 1, b"A"), Out(0xCFC, 4, b"\x01\x02\x03\x04"), Out(0x80, 2, b"\xff\xee")
    ) as (_, _, machine, _):
        assert [event for event in machine.events if event != ("drain",)] == [
            ("out", 0x3F8, 1, 0x41),
            ("out", 0xCFC, 4, 0x04030201),
            ("out", 0x80, 2, 0xEEFF),
        ]


def test_a_string_write_is_one_exit_and_many_writes() -> None:
    with running(Out(0x3F8, 1, b"hello"), Out(0x10, 2, b"abcdef")) as (_, processor, machine, _):
        assert machine.events == [
            ("drain",),
            *(("out", 0x3F8, 1, character) for character in b"hello"),
            ("drain",),
            *(("out", 0x10, 2, int.from_bytes(pair, "little")) for pair in (b"ab", b"cd", b"ef")),
        ]
        assert processor.exits["out 0x3f8"] == 1
        assert processor.exits["out 0x10"] == 1


def test_port_reads_get_their_size_and_no_more() -> None:
    with running(In(0x71), In(0x72, 2), In(0x73, 4), In(0x60, 1, 3), In(0x60, 4, 2)) as (
        _,
        _,
        machine,
        answers,
    ):
        reads = [event for event in machine.events if event[0] == "in"]
        sizes = [1, 2, 4, 1, 1, 1, 4, 4]
        assert [event[2] for event in reads] == sizes
        values = [0x1122334455 + machine.events.index(event) + 1 for event in reads[:3]]
        assert answers[:3] == [
            (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            for value, size in zip(values, sizes, strict=False)
        ]
        assert [len(answer) for answer in answers] == [1, 2, 4, 3, 8]  # type: ignore[arg-type]


def test_coalesced_writes_come_before_the_exit() -> None:
    with running(In(0x3FD)) as (_, _, machine, _):
        assert [event[0] for event in machine.events] == ["drain", "in"]


def test_memory_nobody_has() -> None:
    with running(Mmio(0xFED00004), Mmio(0xFED00010, 8), Mmio(0xFED00020, 4, True)) as (
        _,
        processor,
        machine,
        answers,
    ):
        assert answers == [b"\xff" * 4, b"\xff" * 8, bytes(4)]
        assert processor.exits["mmio 0xfed00000"] == 3
        assert not machine.events


def test_the_machine_is_locked_while_an_exit_is_answered() -> None:
    seen: list[tuple[str, bool]] = []
    lock = threading.RLock()

    def free() -> bool:
        taken: list[bool] = []
        thread = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        return taken[0]

    class Watching:
        """Ports and MSRs at once: a name and whether somebody else could have the lock."""

        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *_: seen.append((name, free())) or 1  # type: ignore[func-returns-value]

    steps = [
        *(Out(0x80, 1, b"x"), In(0x71), ReadMsr(0x40000100), WriteMsr(0x40000100, 5)),
        *(Hypercall(0x5C, 0, 0), SynicWrite(1, 2, 3)),
    ]

    def script(transport: FakeTransport) -> Script:
        for step in steps:
            _ = yield step
        yield Other(Exit.SHUTDOWN)

    transport = FakeTransport(1 << 20, script)
    vm = transport.ioctl_handle(transport.open_kvm(), k.KVM_CREATE_VM)
    watching, ended = Watching(), threading.Event()
    processor = Processor(
        Vcpu(transport, vm, 0),
        Handlers(
            lock, watching, watching, watching.hypercall, watching.synic,  # type: ignore[arg-type]
            watching.before_port, lambda reason: ended.set(),  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    processor.start()
    assert ended.wait(60)
    processor.stop()
    names = ["before_port", "write", "before_port", "read", "read", "write", "hypercall", "synic"]
    assert seen == [(name, False) for name in names]


def test_a_hypercall_gets_its_result() -> None:
    with running(Hypercall(0x5C, 0x1000, 7)) as (_, processor, machine, answers):
        assert answers == [0x12]
        assert machine.events == [("hypercall", 0x5C, 0x1000)]
        assert processor.exits["hypercall 0x5c"] == 1


def test_synic_registers_come_with_their_processor() -> None:
    with running(SynicWrite(1, 0x2001, 0x3001)) as (_, processor, machine, _):
        assert machine.events == [("synic", 0, 1, 0x2001, 0x3001)]
        assert processor.exits["synic"] == 1


def test_a_syndbg_exit_is_nobodys() -> None:
    with running(Other(Exit.HYPERV, k.KVM_EXIT_HYPERV_SYNDBG)) as (_, _, machine, _):
        assert not machine.events
        assert not machine.stops


def test_msrs() -> None:
    with running(
        ReadMsr(0x40000100), ReadMsr(0x123), WriteMsr(0x40000100, 5), WriteMsr(0x123, 5)
    ) as (_, processor, _, answers):
        assert answers == [0x1234567890ABCDEF, None, True, False]
        assert processor.exits == {
            "rdmsr 0x40000100": 1,
            "rdmsr 0x123": 1,
            "wrmsr 0x40000100": 1,
            "wrmsr 0x123": 1,
            **(
                {"interrupted": processor.exits["interrupted"]}
                if processor.exits["interrupted"]
                else {}
            ),
        }


def test_interruptions_and_exits_that_mean_nothing() -> None:
    steps = [
        Fails(errno.EINTR),
        Fails(errno.EAGAIN),
        Other(Exit.INTR),
        Other(Exit.IRQ_WINDOW_OPEN),
        Other(Exit.HLT),
        Other(Exit.SYSTEM_EVENT, k.KVM_SYSTEM_EVENT_CRASH),
    ]
    with running(*steps) as (_, processor, machine, answers):
        assert len(answers) == len(steps)
        assert not machine.stops
        assert processor.exits["interrupted"] == 2
        assert processor.exits["hlt"] == processor.exits["system_event"] == 1


@pytest.mark.parametrize(
    "step", [Other(Exit.SHUTDOWN), Other(Exit.SYSTEM_EVENT, k.KVM_SYSTEM_EVENT_RESET)]
)
def test_a_reset_ends_the_loop(step: Step) -> None:
    with running(step) as (_, processor, machine, _):
        processor._thread.join(5)
        assert machine.stops == ["reset"]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            Other(Exit.INTERNAL_ERROR, 1),
            "KVM stopped virtual processor 0 with INTERNAL_ERROR (detail 0x1).",
        ),
        (
            Other(Exit.FAIL_ENTRY, 0x80000021),
            "KVM stopped virtual processor 0 with FAIL_ENTRY (detail 0x80000021).",
        ),
        (Other(Exit.UNKNOWN, 7), "KVM stopped virtual processor 0 with UNKNOWN (detail 0x7)."),
        (Other(77, 7), "KVM stopped virtual processor 0 with 77 (detail 0x7)."),
        (
            Other(Exit.SYSTEM_EVENT, 1),
            "KVM stopped virtual processor 0 with SYSTEM_EVENT (detail 0x1).",
        ),
        *(
            (
                Other(Exit.INTERNAL_ERROR, kind),
                f"KVM stopped virtual processor 0 with INTERNAL_ERROR (detail {kind:#x}).",
            )
            for kind in (k.KVM_SYSTEM_EVENT_CRASH, k.KVM_SYSTEM_EVENT_RESET)
        ),
        (Fails(errno.EFAULT), "KVM cannot run virtual processor 0: EFAULT."),
        (Fails(9999), "KVM cannot run virtual processor 0: 9999."),
    ],
)
def test_what_a_processor_cannot_go_on_with(step: Step, sentence: str) -> None:
    with running(step) as (_, processor, machine, _):
        processor._thread.join(5)
        assert machine.stops == [sentence]


def test_a_bug_in_a_device_is_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with running(Out(0xBAD, 1, b"!")) as (_, processor, machine, _):
        processor._thread.join(5)
        (reason,) = machine.stops
        assert reason.startswith("virtual processor 0 met a bug of hvhost (RuntimeError('a bug'))")
        assert machine.lock.acquire(timeout=1), "the lock was given back"
        machine.lock.release()


def test_a_guest_that_makes_up_reasons() -> None:
    steps = [Mmio(page << 12) for page in range(3000)]
    with running(*steps) as (_, processor, _, _):
        assert len(processor.exits) <= module._MAXIMUM_REASONS + 1
        assert processor.exits["other"] == 3000 - module._MAXIMUM_REASONS
        assert sum(processor.exits.values()) - processor.exits["interrupted"] == 3000


# --- calls from other threads ------------------------------------------------------------------


def test_a_call_runs_on_the_processors_thread() -> None:
    with running() as (_, processor, _, _):
        assert processor.call(threading.current_thread) is processor._thread
        assert processor.call(lambda: processor.call(lambda: 7)) == 7, "also from there"


def test_what_a_call_raises_is_the_callers() -> None:
    def fails() -> None:
        raise OSError(errno.EINVAL, "no")

    def slow() -> None:
        raise TimeoutError("its own")

    with running() as (_, processor, machine, _):
        with pytest.raises(OSError, match="no"):
            processor.call(fails)
        with pytest.raises(TimeoutError, match="its own"):
            processor.call(slow)
        assert processor.call(lambda: 1) == 1
        assert not machine.stops


def test_calls_from_many_threads() -> None:
    with running() as (_, processor, _, _):
        results: list[int] = []

        def fifty(first: int) -> None:
            results.extend(processor.call(lambda n=n: n) for n in range(first, first + 50))  # type: ignore[misc]

        threads = [threading.Thread(target=fifty, args=(100 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(results) == [n * 100 + i for n in range(4) for i in range(50)]


def test_a_call_before_the_start() -> None:
    _, processor, _ = build(halted)
    with pytest.raises(HvHostError, match="virtual processor 0 does not run"):
        processor.call(lambda: 1)
    processor.stop()


def test_a_call_after_the_end() -> None:
    with running(Other(Exit.SHUTDOWN)) as (_, processor, _, _):
        processor._thread.join(5)
        with pytest.raises(HvHostError, match="virtual processor 0 does not run"):
            processor.call(lambda: 1)


def test_calls_that_wait_when_the_processor_stops_are_told() -> None:
    """Between the end of the guest and that of the thread, and not twenty seconds later."""
    waiting = threading.Event()
    failures: list[Exception] = []

    def script(transport: FakeTransport) -> Script:
        waiting.wait(10)
        yield Other(Exit.SHUTDOWN)

    _, processor, machine = build(script)

    def call() -> None:
        try:
            processor.call(lambda: 1)
        except HvHostError as error:
            failures.append(error)

    processor.start()
    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    while len(processor._requests) < 3:
        time.sleep(0.001)
    started = time.monotonic()
    waiting.set()
    for caller in callers:
        caller.join(10)
    assert time.monotonic() - started < 5
    assert [str(error) for error in failures] == [
        "virtual processor 0 does not run (any more); start the machine again."
    ] * 3
    assert machine.stops == ["reset"]


def test_a_processor_that_does_not_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALL_SECONDS", 0.05)
    free = threading.Event()
    ran: list[int] = []

    def script(transport: FakeTransport) -> Script:
        free.wait(10)
        yield Halt()

    _, processor, _ = build(script)
    processor.start()
    with pytest.raises(HvHostError, match="virtual processor 0 did not answer"):
        processor.call(lambda: ran.append(1))
    free.set()
    monkeypatch.setattr(module, "_CALL_SECONDS", 10.0)
    assert processor.call(lambda: 2) == 2
    assert not ran, "what nobody waits for any more is not done"
    processor.stop()


def test_who_gave_up_does_not_keep_the_end_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two callers wait when the guest ends, and one of them no longer does."""
    free = threading.Event()
    told: list[str] = []

    def script(transport: FakeTransport) -> Script:
        free.wait(60)
        yield Other(Exit.SHUTDOWN)

    _, processor, machine = build(script)
    processor.start()
    monkeypatch.setattr(module, "_CALL_SECONDS", 0.01)
    with pytest.raises(HvHostError, match="did not answer"):
        processor.call(lambda: 1)
    monkeypatch.setattr(module, "_CALL_SECONDS", 60.0)

    def call() -> None:
        try:
            processor.call(lambda: 2)
        except HvHostError as error:
            told.append(str(error))

    caller = threading.Thread(target=call)
    caller.start()
    while len(processor._requests) < 2:
        time.sleep(0.001)
    free.set()
    caller.join(30)
    assert told == ["virtual processor 0 does not run (any more); start the machine again."]
    assert machine.stops == ["reset"]


def test_a_processor_may_be_stopped_by_its_own_thread() -> None:
    with running() as (_, processor, machine, _):
        processor.call(processor.stop)
        processor._thread.join(30)
        assert not processor._thread.is_alive() and not machine.stops


def test_a_paused_processor_that_is_stopped_runs_nothing_more() -> None:
    _, processor, machine = build(counting)
    processor.start()
    processor.pause()
    before = counts(machine)
    processor.stop()
    assert counts(machine) == before and not machine.stops


def test_kicks_without_a_reason() -> None:
    with running(In(0x71)) as (_, processor, machine, _):
        for _ in range(100):
            processor.vcpu.kick()
        assert processor.call(lambda: 3) == 3
        assert not machine.stops


def test_stop_waits_for_the_lock_the_processor_waits_for() -> None:
    released = threading.Event()

    def script(transport: FakeTransport) -> Script:
        yield In(0x71)

    _, processor, machine = build(script)
    with machine.lock:
        processor.start()
        timer = threading.Timer(0.1, released.set)
        timer.start()
        stopper = threading.Thread(target=processor.stop)
        stopper.start()
        assert released.wait(5)
        assert processor._thread.is_alive()
    stopper.join(10)
    assert not stopper.is_alive()
    assert not processor._thread.is_alive()


def test_stop_twice_and_before_the_start() -> None:
    _, processor, _ = build(halted)
    processor.stop()
    with running() as (_, processor, _, _):
        processor.stop()
        processor.stop()


def test_a_rig_that_is_gone() -> None:
    with running() as (transport, processor, machine, _):
        transport.die("the rig is gone.")
        assert machine.ended.wait(5)
        assert machine.stops == ["the rig is gone."]
        started = time.monotonic()
        processor.stop()
        assert time.monotonic() - started < 3
        assert not processor._thread.is_alive()


def test_stop_waits_for_the_thread_although_nobody_can_be_kicked() -> None:
    """It may be on its way: whoever closes the transport next must not pull it from under it."""
    free = threading.Event()

    def script(transport: FakeTransport) -> Script:
        free.wait(10)
        yield Halt()

    transport, processor, machine = build(script)
    processor.start()
    transport.die("the rig is gone.")
    threading.Timer(0.2, free.set).start()
    processor.stop()
    assert not processor._thread.is_alive()
    assert machine.stops == ["the rig is gone."]


def counting(transport: FakeTransport) -> Script:
    while True:
        yield Out(0x80, 1, b"x")


def counts(machine: Machine) -> int:
    return sum(event[0] == "out" for event in machine.events)


def test_a_paused_processor_runs_nothing_and_still_serves_calls() -> None:
    _, processor, machine = build(counting)
    processor.start()
    try:
        for _ in range(20):
            processor.pause()
            before = counts(machine)
            assert processor.call(lambda: 5) == 5
            time.sleep(0.005)
            assert counts(machine) == before
            processor.resume()
            deadline = time.monotonic() + 10
            while counts(machine) == before:
                assert time.monotonic() < deadline
                time.sleep(0.001)
    finally:
        processor.stop()
    assert not processor._thread.is_alive()


def test_a_halted_processor_is_paused_and_stopped() -> None:
    transport, processor, _ = build(halted)
    processor.start()
    processor.pause()
    assert not transport._processors[0].running
    processor.stop()
    assert not processor._thread.is_alive()


def test_a_processor_that_ended_cannot_be_paused() -> None:
    def ends(transport: FakeTransport) -> Script:
        yield Other(Exit.SHUTDOWN)

    _, processor, machine = build(ends)
    processor.start()
    assert machine.ended.wait(10)
    processor._thread.join(10)
    with pytest.raises(HvHostError, match="does not run"):
        processor.pause()
    assert not processor._pausing
