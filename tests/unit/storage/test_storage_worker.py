"""A unit's thread by itself: order, jobs between commands, a full host, limits, its end."""

from __future__ import annotations

import errno
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import pytest

from hvhost.errors import HvHostError
from hvhost.storage import worker as module
from hvhost.storage.limits import Limiter
from hvhost.storage.protocol import PACKET_SIZE
from hvhost.storage.scsi import (
    INTERNAL_TARGET_FAILURE,
    CheckCondition,
    Sense,
    SenseKey,
    sense_of_error,
)
from hvhost.storage.worker import Request, UnitWorker

READ, WRITE = 0x28, 0x2A
NO_SPACE = OSError(errno.ENOSPC, "as told")


class Unit:
    """Does what it is told, command by command; a command is known by its block address."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.threads: set[int] = set()
        self.gates: dict[int, threading.Event] = {}
        self.entered = threading.Event()
        self.errors: dict[int, list[Exception]] = {}
        self.closed = 0

    def execute(self, cdb: bytes, data: Sequence[memoryview]) -> int:
        number: int = struct.unpack_from(">I", cdb, 2)[0]
        self.threads.add(threading.get_ident())
        if number in self.gates:
            self.entered.set()
            assert self.gates[number].wait(60)
        if self.errors.get(number):
            raise self.errors[number].pop(0)
        self.done.append(number)
        return number

    def close(self) -> None:
        self.closed += 1


class Channel:
    """A session that remembers; *delivered* is what a guest has heard of."""

    def __init__(self) -> None:
        self.alive = True
        self.taken: list[bytes] = []
        self.delivered: list[bytes] = []
        self.read: list[memoryview] = []
        self.changed = threading.Condition()
        self.memory_written: Callable[[Sequence[memoryview]], None] = self.read.extend

    def answer(self, packet: bytes) -> None:
        self.taken.append(packet)

    def deliver(self) -> None:
        with self.changed:
            self.delivered += self.taken
            self.taken.clear()
            self.changed.notify_all()

    def hears(self, count: int) -> list[bytes]:
        """The first *count* answers, once they are there."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.delivered) >= count, 60)
            return self.delivered[:count]

    def request(self, number: int, opcode: int = READ, size: int = 512) -> Request:
        payload = struct.pack("<III", 3, 1, 0).ljust(PACKET_SIZE, b"\0")
        cdb = struct.pack(">BBIBHB", opcode, 0, number, 0, 1, 0).ljust(16, b"\0")
        return Request(self, number, payload, cdb, [memoryview(bytearray(size))])


class Bench:
    def __init__(self) -> None:
        self.unit, self.channel = Unit(), Channel()
        self.events: list[tuple[str, str]] = []
        self.worker = UnitWorker("disk0", self.unit, self._event)  # type: ignore[arg-type] # as one

    def _event(self, kind: str, detail: str) -> None:
        self.events.append((kind, detail))

    def submit(self, *numbers: int, opcode: int = READ) -> list[Request]:
        requests = [self.channel.request(number, opcode) for number in numbers]
        self.worker.submit(requests)
        return requests

    def gate(self, number: int) -> threading.Event:
        """Commands of that number wait until it is set."""
        return self.unit.gates.setdefault(number, threading.Event())


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for gate in made.unit.gates.values():
        gate.set()
    if not made.unit.closed:
        made.worker.stop()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_all_is_done_in_order_by_one_thread(bench: Bench) -> None:
    requests = [
        request for start in (0, 10, 20) for request in bench.submit(*range(start, start + 10))
    ]
    assert bench.channel.hears(30) == [each.succeeded(each.transaction_id) for each in requests]
    assert bench.unit.done == list(range(30)) and len(bench.unit.threads) == 1
    assert threading.get_ident() not in bench.unit.threads


def test_reads_are_told_to_whoever_runs_guest_code_and_writes_are_not(bench: Bench) -> None:
    (read,) = bench.submit(1)
    bench.submit(2, opcode=WRITE)
    bench.channel.hears(2)
    assert bench.channel.read == [*read.data]


def test_nobody_enters_while_commands_wait(bench: Bench) -> None:
    assert bench.worker.try_enter()
    assert not bench.worker.try_enter(), "it is one at a time"
    bench.worker.leave()
    gate = bench.gate(1)
    bench.submit(1)
    bench.submit(2)
    assert not bench.worker.try_enter()
    gate.set()
    bench.channel.hears(2)
    until(bench.worker.try_enter)
    bench.worker.leave()
    bench.worker.limiter = Limiter.of(1000, 0)
    assert not bench.worker.try_enter()


# Jobs.


def test_a_job_runs_before_there_was_a_command_and_raises_as_it_does(bench: Bench) -> None:
    assert bench.worker.call(lambda: 7) == 7

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.worker.call(fails)
    bench.submit(1)
    bench.channel.hears(1)
    assert bench.worker.call(lambda: [*bench.unit.done]) == [1]
    assert bench.worker.call(threading.get_ident) in bench.unit.threads


def test_a_job_goes_before_the_commands_that_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 3600.0)
    gate = bench.gate(1)
    seen: list[list[int]] = []
    bench.submit(1, 2)
    bench.submit(3)
    assert bench.unit.entered.wait(60)
    caller = in_thread(lambda: seen.append(bench.worker.call(lambda: [*bench.unit.done])))
    until(lambda: bench.worker._jobs)
    gate.set()
    caller.join(60)
    bench.channel.hears(3)
    assert seen == [[1]]


def test_a_job_finds_nobody_at_the_unit(bench: Bench) -> None:
    assert bench.worker.call(bench.worker.running.locked)
    assert not bench.worker.running.locked()


def test_a_job_does_not_wait_for_a_limit(bench: Bench) -> None:
    bench.worker.limiter = Limiter.of(0, 1)  # a byte a second
    bench.submit(1, 2)
    assert bench.worker.call(lambda: 5) == 5
    bench.channel.alive = False


def test_nobody_enters_before_a_job_that_waits_for_the_unit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that always reads, and enters again and again, would keep a job waiting for good."""
    wanted, turn = threading.Event(), threading.Event()

    class Lock:
        """One that others get first."""

        def __enter__(self) -> None:
            wanted.set()
            assert turn.wait(60)

        def __exit__(self, *_: object) -> None:
            pass

        def acquire(self, *, blocking: bool) -> bool:
            return not blocking

    monkeypatch.setattr(bench.worker, "running", Lock())
    caller = in_thread(lambda: bench.worker.call(lambda: None))
    assert wanted.wait(60)
    entered = bench.worker.try_enter()
    turn.set()
    caller.join(60)
    assert not entered and bench.worker.try_enter()


def test_answers_do_not_wait_for_slow_commands(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", -1.0)  # all are slow
    bench.gate(2)
    requests = bench.submit(1, 2)
    assert bench.channel.hears(1) == [requests[0].succeeded(1)]


# What goes wrong.


def test_a_condition_is_the_guest_s_and_other_errors_are_told_once_a_minute(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [OSError(errno.EIO, "bad"), HvHostError("worse."), ValueError("a bug")]
    bench.unit.errors = {
        2: [CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0))],
        3: [broken[0]],
        4: [broken[0]],
    }
    bench.unit.errors |= {5: [broken[1]], 6: [broken[2]]}
    requests = bench.submit(1, 2, 3) + bench.submit(4, opcode=WRITE) + bench.submit(5, 6, 7)
    assert bench.channel.hears(7) == [
        requests[0].succeeded(1),
        requests[1].failed(Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0)),
        requests[2].failed(sense_of_error(broken[0], writing=False)),  # type: ignore[arg-type]
        requests[3].failed(sense_of_error(broken[0], writing=True)),  # type: ignore[arg-type]
        requests[4].failed(INTERNAL_TARGET_FAILURE),
        requests[5].failed(INTERNAL_TARGET_FAILURE),
        requests[6].succeeded(7),
    ]
    assert bench.events == [("disk-error", f"disk0: {broken[0]}")]
    monkeypatch.setattr(module, "COMPLAINT_SECONDS", 0.0)
    bench.unit.errors = {1: [broken[1]], 2: [broken[2]]}
    bench.submit(1, 2)
    bench.channel.hears(9)
    assert bench.events[1:] == [("disk-error", "disk0: worse."), ("disk-error", "disk0: a bug")]


def test_a_full_host_is_waited_for_told_once_and_what_came_before_is_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "BATCH_SECONDS", 3600.0)
    bench.worker.pause_when_full = True
    bench.unit.errors = {2: [NO_SPACE] * 5, 4: [NO_SPACE] * 2}
    seen: list[int] = []
    wait = bench.worker._wait

    def watched(session: module.Session, seconds: float) -> None:
        seen.append(len(bench.channel.delivered))
        assert bench.worker.full
        wait(session, seconds)

    monkeypatch.setattr(bench.worker, "_wait", watched)
    requests = bench.submit(1, 2, 3, 4, opcode=WRITE)
    assert bench.channel.hears(4) == [each.succeeded(each.transaction_id) for each in requests]
    # Tried again at once with what came before answered, and then every while.
    assert seen == [1] * 4 + [3] and bench.unit.done == [1, 2, 3, 4]
    assert bench.events == [("disk-full", "disk0 waits for room on the host")] * 2
    assert not bench.worker.full


def test_a_wait_ends_with_another_error_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a flush failed for want of room: what was lost then does not come back."""
    monkeypatch.setattr(module, "FULL_RETRY_SECONDS", 0.001)
    bench.worker.pause_when_full = True
    lost = OSError(errno.EIO, "an earlier flush failed")
    bench.unit.errors = {1: [NO_SPACE, lost]}
    (request,) = bench.submit(1, opcode=WRITE)
    assert bench.channel.hears(1) == [request.failed(sense_of_error(lost, writing=True))]
    assert [kind for kind, _ in bench.events] == ["disk-full", "disk-error"]
    assert not bench.worker.full


def test_without_waiting_a_full_host_fails_the_write(bench: Bench) -> None:
    bench.unit.errors = {1: [NO_SPACE]}
    (request,) = bench.submit(1, opcode=WRITE)
    assert bench.channel.hears(1) == [request.failed(sense_of_error(NO_SPACE, writing=True))]
    assert [kind for kind, _ in bench.events] == ["disk-error"]


def test_other_errors_are_not_waited_for(bench: Bench) -> None:
    bench.worker.pause_when_full = True
    error = OSError(errno.EIO, "bad")
    bench.unit.errors = {1: [error]}
    (request,) = bench.submit(1, opcode=WRITE)
    assert bench.channel.hears(1) == [request.failed(sense_of_error(error, writing=True))]


# Limits.


def test_each_command_waits_for_its_turn_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    waited: list[float] = []

    class Told:
        def delay(self, now: float, size: int) -> float:
            asked.append(size)
            return float(size)

    bench.worker.limiter = Told()  # type: ignore[assignment] # as one
    bench.worker.pause_when_full = True
    bench.unit.errors = {2: [NO_SPACE] * 2}
    monkeypatch.setattr(bench.worker, "_wait", lambda session, seconds: waited.append(seconds))
    bench.worker.submit([bench.channel.request(n, WRITE, 512 * n) for n in (1, 2, 3)])
    bench.channel.hears(3)
    assert asked == [512, 1024, 1536]
    retry = module.FULL_RETRY_SECONDS
    assert waited == [512.0, 1024.0, retry, retry, 1536.0]


# The end of channels and of the worker.


def test_a_closed_channel_s_commands_are_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 3600.0)
    gate, other = bench.gate(1), Channel()
    bench.submit(1, 2)
    bench.submit(3)
    bench.worker.submit([other.request(4)])
    assert bench.unit.entered.wait(60)
    bench.channel.alive = False
    gate.set()
    other.hears(1)
    assert bench.unit.done == [1, 4]


def test_a_channel_that_closes_ends_its_wait(bench: Bench) -> None:
    bench.worker.limiter = Limiter.of(0, 1)
    bench.submit(1, 2)
    bench.channel.alive = False
    bench.worker.call(lambda: None)  # wakes it
    bench.worker.limiter = None
    other = Channel()
    bench.worker.submit([other.request(3)])
    other.hears(1)
    assert 2 not in bench.unit.done


def test_the_end_comes_after_what_waits_and_without_limits(bench: Bench) -> None:
    bench.worker.limiter = Limiter.of(0, 1)
    requests = bench.submit(1, 2, 3) + bench.submit(4)
    bench.worker.stop()
    assert bench.channel.delivered == [each.succeeded(each.transaction_id) for each in requests]
    assert bench.unit.closed == 1 and not bench.worker.try_enter()


def test_the_end_does_not_wait_for_room(bench: Bench) -> None:
    bench.worker.pause_when_full = True
    bench.unit.errors = {1: [NO_SPACE] * 1000}
    (request,) = bench.submit(1, opcode=WRITE)
    until(lambda: bench.worker.full)
    bench.worker.stop()
    assert bench.channel.delivered == [request.failed(sense_of_error(NO_SPACE, writing=True))]


def test_the_end_of_a_worker_that_never_worked(bench: Bench) -> None:
    bench.worker.stop()
    assert bench.unit.closed == 1 and not bench.unit.threads
    assert not bench.worker.try_enter()


@pytest.mark.parametrize("worked", [False, True])
def test_a_job_after_the_end_is_refused_in_a_sentence(bench: Bench, worked: bool) -> None:
    if worked:
        bench.worker.call(lambda: None)
    bench.worker.stop()
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(HvHostError) as error:
            bench.worker.call(lambda: None)
        refused.append(str(error.value))

    in_thread(ask).join(60)  # not here: without the check it would wait for ever
    assert [each.startswith("disk0 was detached, so nothing can be done") for each in refused] == [
        True
    ]
    assert not bench.worker._jobs


def test_a_job_that_came_just_before_the_end_is_done(bench: Bench) -> None:
    stopping, callers = threading.Event(), list[threading.Thread]()

    class Late(SimpleQueue[list[Request] | None]):
        """What the caller puts into it comes behind the end."""

        def put(self, item: list[Request] | None, *_: object) -> None:
            if threading.current_thread() in callers:
                assert stopping.wait(60)
            super().put(item)

    bench.worker._queue = Late()
    bench.submit(1)
    bench.channel.hears(1)
    done: list[int] = []
    callers.append(threading.Thread(target=lambda: done.append(bench.worker.call(lambda: 5))))
    callers[0].daemon = True
    callers[0].start()
    until(lambda: bench.worker._jobs)
    stopper = in_thread(bench.worker.stop)
    until(lambda: not bench.worker._jobs or not stopper.is_alive())
    stopping.set()
    callers[0].join(60)
    stopper.join(60)
    assert done == [5] and bench.unit.closed == 1


def test_a_job_before_the_end_does_not_end_it_early(bench: Bench) -> None:
    gate = bench.gate(1)
    bench.submit(1)
    assert bench.unit.entered.wait(60)
    caller = in_thread(lambda: bench.worker.call(lambda: None))
    until(lambda: bench.worker._queue.qsize() == 1)
    bench.submit(2)
    stopper = in_thread(bench.worker.stop)
    until(lambda: bench.worker._queue.qsize() == 3)
    gate.set()
    stopper.join(60)
    caller.join(60)
    assert bench.unit.done == [1, 2] and len(bench.channel.delivered) == 2
