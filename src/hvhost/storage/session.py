"""What a controller shares with its channels, and the time a channel is open."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from hvhost.partition.memory import GuestMemory
from hvhost.storage.unit import UnitState
from hvhost.storage.worker import Request, UnitWorker
from hvhost.vmbus.channel import Channel

#: Requests of one channel that may be under way; more stay in the guest's ring.
MAXIMUM_OUTSTANDING: Final = 512


class Phase(IntEnum):
    """How far the guest's initialization came."""

    CLOSED = 0
    BEGUN = 1
    NEGOTIATED = 2
    READY = 3
    #: It sent a command: not before that is it able to take a notice.
    IN_USE = 4


@dataclass(slots=True)
class ControllerState:
    """Everything needed to resume a controller: ``units`` by LUN, ``version`` of VSTOR, 0: none.

    ``leaving`` are LUNs of units that were removed, and of which the guest does not know it yet.
    """

    phase: Phase = Phase.CLOSED
    version: int = 0
    sub_channels: int = 0
    leaving: set[int] = field(default_factory=set)
    units: dict[int, UnitState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Surface:
    """What a controller needs of its machine.

    *add_sub_channels* puts so many on the bus, *remove_sub_channels* takes all off again;
    *memory_written* is told of the guest's memory that was read into, and may take its time.
    """

    memory: GuestMemory
    lock: threading.RLock
    processors: int
    add_sub_channels: Callable[[int], None]
    remove_sub_channels: Callable[[], None]
    memory_written: Callable[[Sequence[memoryview]], None] = lambda views: None


class ChannelSession:
    """The time a channel is open; see :class:`hvhost.storage.worker.Session`.

    Requests gather for their workers until what came was looked at: a thread is woken once for all.
    """

    def __init__(self, channel: Channel, surface: Surface) -> None:
        self.alive = True
        self.memory_written = surface.memory_written
        self.outstanding = 0
        self.channel = channel
        self._gathered: dict[UnitWorker, list[Request]] = {}
        self._workers: set[UnitWorker] = set()
        self._lock = surface.lock
        self._answers: deque[bytes] = deque()
        channel.settle = self._settle

    def submit(self, worker: UnitWorker, request: Request) -> None:
        """Have a request executed."""
        self.outstanding += 1
        if self.outstanding >= MAXIMUM_OUTSTANDING:
            self.channel.paused = True
        self._gathered.setdefault(worker, []).append(request)

    def waits(self, worker: UnitWorker) -> bool:
        """Whether requests for it were gathered and not handed over yet."""
        return worker in self._gathered

    def hand_over(self) -> None:
        """Give the workers what was gathered for them."""
        gathered, self._gathered = self._gathered, {}
        for worker, requests in gathered.items():
            self._workers.add(worker)
            worker.submit(requests)

    def end(self) -> None:
        """The channel closed: drop what has not begun, and wait for what has."""
        self.alive = False
        self._gathered.clear()
        for worker in self._workers:
            with worker.running:
                pass

    def answer(self, packet: bytes) -> None:
        self._answers.append(packet)

    def deliver(self) -> None:
        with self._lock:
            while self.alive and (self.channel.process() or self._resumed()):
                pass

    def _settle(self) -> None:
        """At the end of each look into the ring, so that one interrupt is for all answers."""
        if self._gathered:
            self.hand_over()
        count = len(self._answers)
        if count:
            self.outstanding -= count
            self.channel.send_encoded([self._answers.popleft() for _ in range(count)])

    def _resumed(self) -> bool:
        if not self.channel.paused or self.outstanding > MAXIMUM_OUTSTANDING // 2:
            return False
        self.channel.paused = False
        return True
