"""A machine's storage in a process of its own: ``python -m hvhost.storage.process DESCRIPTOR``.

The devices, their threads and the disks are those of any machine. What surrounds them stands here:
a bus whose rings are read and written in this process while the offers are made by the worker
(:mod:`hvhost.storage.elsewhere`), which this process knows by the link at DESCRIPTOR only.

Locks are this process's own; none is held while the worker is waited for, except a unit's
``running``, while it tells of what was written.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hvhost.errors import HvHostError
from hvhost.kvm.residence import Residence
from hvhost.machine.config_file import load_config
from hvhost.machine.link import Link, Received
from hvhost.machine.loop import Loop
from hvhost.machine.model import LiveMachine, MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.partition.memory import GuestMemory, MemoryRegion
from hvhost.process import die_with, log_to_stderr
from hvhost.services.vss import Done, VssAnswer
from hvhost.services.vss_protocol import VssOperation
from hvhost.storage import messages
from hvhost.storage.backup import Backup
from hvhost.storage.confine import confine
from hvhost.storage.controller import Storage
from hvhost.storage.process_bus import Bus, Interrupts

if TYPE_CHECKING:
    from hvhost.machine.model import Family


class Computer:
    """Implements :class:`hvhost.storage.controller.Computer` for one boot."""

    def __init__(
        self,
        config: MachineConfig,
        link: Link,
        loop: Loop,
        attach: messages.Attach,
        files: Sequence[int],
    ) -> None:
        self.config, self.lock = config, threading.RLock()
        self._link = link
        self._map = mmap.mmap(files[0], attach.size, offset=attach.offset)
        self._view = memoryview(self._map)
        self._residence = Residence(self._map)
        self.memory = GuestMemory([])
        for region in attach.regions:
            self.plug(region)
        self.interrupts = Interrupts(self.memory, files[1], files[2:])
        self.bus = Bus(link, loop, self.lock, self.memory, self.interrupts)
        self.memory_written: Callable[[Sequence[memoryview]], None] = (
            self._tell_written if attach.notices_writes else lambda views: None
        )

    def plug(self, region: messages.Region) -> None:
        """RAM above all that there is."""
        start = region.backing_offset
        view = self._view[start : start + region.size]
        self.memory.append(MemoryRegion(region.guest_address, view, start))

    def _tell_written(self, views: Sequence[memoryview]) -> None:
        places = tuple(messages.Place(*each) for each in self._residence.places(views))
        if places:
            self._link.request(messages.Written(places))


class Guest:
    """Implements :class:`hvhost.storage.backup.Guest`: what the worker knows of the guest."""

    def __init__(self, link: Link) -> None:
        self._link = link
        #: Nobody's but the backup's: the worker is waited for while it is held.
        self.lock = threading.RLock()

    def require_running(self) -> None:
        self._link.request(messages.RequireRunning())


class Snapshots:
    """Implements :class:`hvhost.services.vss.SnapshotService` by asking the worker."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._asked: dict[int, Done] = {}
        self._numbers = 0

    @property
    def still_frozen(self) -> bool:
        return cast("messages.Result", self._link.request(messages.StillFrozen())).json == "true"

    def request(self, operation: VssOperation, done: Done) -> None:
        self._numbers += 1
        self._asked[self._numbers] = done
        self._link.send(messages.Ask(self._numbers, operation.name))

    def abandon(self, done: Done) -> None:
        for number, waiting in list(self._asked.items()):
            if waiting is done:
                del self._asked[number]
                self._link.send(messages.Abandon(number))

    def answered(self, message: messages.Answered) -> None:
        """The guest's answer, or why there is none."""
        done = self._asked.pop(message.number, None)
        if done is not None:
            done(HvHostError(message.error) if message.error else VssAnswer(message.status))


class Process:
    """The process's life, and what stands in for the machine where people ask something."""

    def __init__(self, connection: socket.socket) -> None:
        self._loop = Loop()
        self._link = Link(
            "the machine's worker",
            connection,
            messages.FROM_WORKER,
            self._received,
            self._loop.stop,
        )
        self._snapshots, self._guest = Snapshots(self._link), Guest(self._link)
        self._families: tuple[Any, ...] = ()
        self._config: MachineConfig | None = None
        self._computer: Computer | None = None

    def run(self) -> None:
        """Until the worker says so, or is gone; disks are closed then."""
        self._link.start()
        try:
            self._loop.run()
        finally:
            self._stop()
            self._link.close()

    def peripheral(self, kind: type[Family]) -> Family:
        """As :meth:`hvhost.machine.machine.Machine.peripheral`."""
        return next(each for each in self._families if isinstance(each, kind))

    # On the link's thread, which must not wait for the worker.

    def _received(self, received: Received) -> None:
        message, number = received.message, received.number
        match message:
            case messages.Answered():
                self._snapshots.answered(message)
            case messages.Plug():
                self._link.serve(number, lambda: self._plug(message.region))
            case messages.Call():
                threading.Thread(
                    target=lambda: self._link.serve(number, lambda: self._call(message)),
                    name=message.name,
                    daemon=True,
                ).start()
            case _:
                self._loop.call_soon_threadsafe(
                    lambda: (
                        self._link.serve(number, lambda: self._do(message, received.files))
                        if number
                        else self._do(message, ())
                    )
                )

    def _plug(self, region: messages.Region) -> None:
        if self._computer is not None:
            self._computer.plug(region)

    def _call(self, message: messages.Call) -> messages.Result:
        import msgspec

        from hvhost.machine import backup_api, storage_api

        for endpoint in (*storage_api.ENDPOINTS, *backup_api.ENDPOINTS):
            if endpoint.name == message.name:
                parameters: Any = msgspec.json.decode(message.parameters, type=endpoint.parameters)
                result = endpoint.call(cast("LiveMachine", self), parameters)
                return messages.Result(msgspec.json.encode(result).decode())
        raise HvHostError(f"storage has no route {message.name!r}.")

    # On the loop's thread.

    def _do(self, message: Any, files: tuple[int, ...]) -> None:
        computer = self._computer
        match message:
            case messages.Start():
                self._start(message)
            case messages.Attach():
                try:
                    self._attach(message, files)
                finally:
                    for each in files:
                        os.close(each)
            case messages.Detach():
                self._detach()
            case messages.Stop():
                self._stop()
                self._loop.stop()
            case messages.Open() if computer is not None:
                with computer.lock:
                    computer.bus.open(message, *files)
            case messages.Move() if computer is not None:
                with computer.lock:
                    computer.bus.move(message.key, message.target_vp)
            case messages.Begin() if computer is not None:
                with computer.lock:
                    computer.bus.begin(message.key)
            case messages.Close() if computer is not None:
                with computer.lock:
                    computer.bus.close(message.key)

    def _start(self, message: messages.Start) -> None:
        self._config = config = load_config(message.config)
        around = Surroundings(
            config,
            self._loop,
            Path(message.directory),
            lambda kind, detail: self._link.send(messages.Event(kind, detail)),
            self._snapshots,
        )
        storage = Storage(around)
        self._families = (Backup(around, storage), storage)  # closed in this order

    def _attach(self, message: messages.Attach, files: Sequence[int]) -> None:
        assert self._config is not None
        self._computer = Computer(self._config, self._link, self._loop, message, files)
        self.peripheral(Backup).attach(self._guest)
        self.peripheral(Storage).attach(self._computer)

    def _detach(self) -> None:
        for each in self._families:
            each.detach()
        if self._computer is not None:
            self._computer.interrupts.close()
        self._computer = None

    def _stop(self) -> None:
        families, self._families = self._families, ()
        for each in families:
            each.close()


def main() -> int:
    """The process's exit status."""
    descriptor = int(sys.argv[1])
    # The worker's end, by whatever cause, is ours: nothing is left running.
    die_with(os.getppid(), signal.SIGKILL)()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr()
    with socket.socket(fileno=descriptor) as connection:
        os.set_inheritable(descriptor, False)
        confine()
        Process(connection).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
