"""A thread for each logical unit: requests run there in their order, outside the bus's lock.

Locks: ``running`` is held while a command touches guest memory and the medium, and never while the
bus's lock is taken; so whoever holds the bus's lock may wait for it, as a channel does that closes.
Answers are collected and handed over under the bus's lock, many at once when there are many.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Final, Protocol, TypeVar

from hvhost.errors import HvHostError
from hvhost.storage.buffers import total
from hvhost.storage.limits import Limiter
from hvhost.storage.protocol import SrbStatus, complete_request
from hvhost.storage.scsi import (
    INTERNAL_TARGET_FAILURE,
    CheckCondition,
    OpCode,
    ScsiStatus,
    Sense,
    is_out_of_space,
    sense_of_error,
)
from hvhost.storage.unit import LogicalUnit
from hvhost.vmbus.ring import PacketType, encode_packet

log = logging.getLogger(__name__)

#: Answers wait at most so long for others to go with them.
BATCH_SECONDS: Final = 0.0005
FULL_RETRY_SECONDS: Final = 1.0
COMPLAINT_SECONDS: Final = 60.0
_READS = frozenset({OpCode.READ_6, OpCode.READ_10, OpCode.READ_12, OpCode.READ_16})
#: An error of the host in these is one of reading.
_LOOKS = _READS | {OpCode.VERIFY, OpCode.VERIFY_12, OpCode.VERIFY_16}
Result = TypeVar("Result")


class Session(Protocol):
    """The time during which a channel is open; requests belong to it and die with it."""

    alive: bool
    memory_written: Callable[[Sequence[memoryview]], None]

    def answer(self, packet: bytes) -> None:
        """Take an answer to be sent; any thread."""

    def deliver(self) -> None:
        """Send all answers that were taken; takes the bus's lock."""


def check_condition(payload: bytes, sense: Sense) -> bytes:
    """The answer to the command in *payload*, which ended with *sense*."""
    return complete_request(payload, SrbStatus.ERROR, ScsiStatus.CHECK_CONDITION, 0, sense.pack())


class Request:
    """One command on its way: *payload* is its packet, *data* the guest's buffers."""

    __slots__ = ("cdb", "data", "payload", "session", "transaction_id")

    def __init__(
        self,
        session: Session,
        transaction_id: int,
        payload: bytes,
        cdb: bytes,
        data: Sequence[memoryview],
    ) -> None:
        self.session, self.transaction_id, self.payload = session, transaction_id, payload
        self.cdb, self.data = cdb, data

    def succeeded(self, transferred: int) -> bytes:
        """The packet for a command that did what it was asked."""
        answer = complete_request(self.payload, SrbStatus.SUCCESS, ScsiStatus.GOOD, transferred)
        return encode_packet(PacketType.COMP, 0, self.transaction_id, answer)

    def failure(self, sense: Sense) -> bytes:
        """The answer to a command that ended with *sense*."""
        return check_condition(self.payload, sense)

    def failed(self, sense: Sense) -> bytes:
        """The packet for a command that ended with *sense*."""
        return encode_packet(PacketType.COMP, 0, self.transaction_id, self.failure(sense))


class UnitWorker:
    """Runs the commands of *unit*; its thread starts with the first one.

    *event* is told, kind and detail, what an administrator should know. ``pause_when_full``: where
    the host has no room left, wait for it instead of failing the guest's write.
    """

    def __init__(
        self,
        name: str,
        unit: LogicalUnit,
        event: Callable[[str, str], None],
        *,
        pause_when_full: bool = False,
    ) -> None:
        self.name, self.unit = name, unit
        self.running = threading.Lock()
        self.limiter: Limiter | None = None
        self.pause_when_full = pause_when_full
        self.full = False
        self._event = event
        self._queue: SimpleQueue[list[Request] | None] = SimpleQueue()
        self._submitted = self._executed = 0
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._gate = threading.Lock()  # no job comes in behind the end
        self._thread: threading.Thread | None = None
        self._complained = -COMPLAINT_SECONDS

    def submit(self, requests: list[Request]) -> None:
        """Have commands of one session executed, in order; with the bus's lock held."""
        self._submitted += len(requests)
        self._queue.put(requests)
        if self._thread is None:
            self._start()

    def try_enter(self) -> bool:
        """Whether the caller, who holds the bus's lock, may use the unit until :meth:`leave`.

        Not while commands wait or jobs do, nor where requests are limited.
        """
        return (
            self._submitted == self._executed
            and self.limiter is None
            and not self._jobs
            and self.running.acquire(blocking=False)
        )

    def leave(self) -> None:
        """Undo :meth:`try_enter`."""
        self.running.release()

    def call(self, function: Callable[[], Result]) -> Result:
        """Run *function* between two commands, and return what it does; not with the bus's lock.

        It goes before the commands that wait. :class:`HvHostError` once the unit is to stop.
        """
        done = threading.Event()
        results: list[Result] = []
        errors: list[BaseException] = []

        def job() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            done.set()

        with self._gate:
            if self._stopping:
                raise HvHostError(
                    f"{self.name} was detached, so nothing can be done with it any more; attach "
                    "it again first."
                )
            if self._thread is None:
                self._start()
            self._jobs.append(job)
        self._wake.set()
        self._queue.put(None)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def stop(self) -> None:
        """Execute what waits, without its limits, and end; then close the unit."""
        with self._gate:
            self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        with self.running:
            self._submitted = -1  # nobody enters any more
            self.unit.close()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        answered: dict[Session, None] = {}
        while True:
            if self._jobs:
                self._work()
            if answered and self._queue.empty():
                self._deliver(answered)
            requests = self._queue.get()
            if requests is None:
                if self._stopping and self._queue.empty() and not self._jobs:
                    break
                continue
            session = requests[0].session
            self._serve(requests, session, answered)
            self._executed += len(requests)
        self._deliver(answered)

    @staticmethod
    def _deliver(answered: dict[Session, None]) -> None:
        for session in answered:
            session.deliver()
        answered.clear()

    def _serve(
        self, requests: list[Request], session: Session, answered: dict[Session, None]
    ) -> None:
        """Execute commands that came together, until the channel is closed."""
        done, limited = 0, -1
        while done < len(requests):
            if self._jobs:
                self._work()
            if self.limiter is not None and limited < done:
                limited, size = done, total(requests[done].data)
                self._wait(session, self.limiter.delay(time.monotonic(), size))
            with self.running:
                if not session.alive:
                    return
                some = self._execute_some(requests, done, session)
            if some:
                done += some
                answered[session] = None
                if done < len(requests):
                    self._deliver(answered)
            else:
                self._wait(session, FULL_RETRY_SECONDS)

    def _execute_some(self, requests: list[Request], first: int, session: Session) -> int:
        """Execute commands for a short time; how many: none if the first waits for room."""
        written: list[memoryview] = []
        done = first
        until = time.monotonic() + BATCH_SECONDS
        while True:
            request = requests[done]
            answer = self._execute(request)
            if answer is None:
                break
            session.answer(answer)
            done += 1
            if request.cdb[0] in _READS:
                written += request.data
            if (
                done == len(requests)
                or time.monotonic() > until
                or not session.alive
                or self._jobs
                or self.limiter is not None
            ):
                break
        if written:
            session.memory_written(written)
        return done - first

    def _execute(self, request: Request) -> bytes | None:
        """The answer, or ``None`` if it is to be tried again when there is room."""
        try:
            transferred = self.unit.execute(request.cdb, request.data)
            self.full = False
            return request.succeeded(transferred)
        except CheckCondition as condition:
            return request.failed(condition.sense)
        except OSError as error:
            if is_out_of_space(error) and self.pause_when_full and not self._stopping:
                self._say_full()
                return None
            self.full = False
            self._complain(error)
            return request.failed(sense_of_error(error, writing=request.cdb[0] not in _LOOKS))
        except HvHostError as error:
            self._complain(error)
            return request.failed(INTERNAL_TARGET_FAILURE)
        except Exception as error:  # a bug of ours must not end the thread
            log.exception("%s: command %#x", self.name, request.cdb[0])
            self._complain(error)
            return request.failed(INTERNAL_TARGET_FAILURE)

    def _work(self) -> None:
        self._wake.clear()
        while self._jobs:
            with self.running:  # nobody enters before a job that waits for this
                self._jobs.popleft()()

    def _wait(self, session: Session, seconds: float) -> None:
        """Let time pass, doing what else is asked meanwhile."""
        deadline = time.monotonic() + seconds
        while not self._stopping and session.alive:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if self._wake.wait(left):
                self._work()

    def _say_full(self) -> None:
        if not self.full:
            self._event("disk-full", f"{self.name} waits for room on the host")
        self.full = True

    def _complain(self, error: Exception) -> None:
        """One line a minute: a guest must not fill the log by reading a bad sector."""
        now = time.monotonic()
        if now - self._complained >= COMPLAINT_SECONDS:
            self._complained = now
            self._event("disk-error", f"{self.name}: {error}")
