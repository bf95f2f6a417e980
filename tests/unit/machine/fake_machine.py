"""A live machine without a guest, and a loop for its serial ports."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import cast

from fake_memory import FakeMemory

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.machine.model import (
    ChannelInfo,
    ClockSample,
    CopyProgress,
    CopyState,
    Family,
    HeartbeatStatus,
    IpSettings,
    KvpPool,
    KvpRecord,
    MachineConfig,
    MachineEvent,
    MachineInfo,
    MachineState,
    ProcessorInfo,
    ProcessorState,
    ServiceInfo,
    ShutdownAction,
)
from hvhost.machine.peripheral import Surroundings
from hvhost.memory.peripheral import MemoryPeripheral
from hvhost.storage.backup import Backup
from hvhost.storage.controller import Storage


class FakeMachine:
    """Behaves as its command line says: ``no-shutdown``, ``stubborn``, ``no-heartbeat``."""

    def __init__(self, config: MachineConfig) -> None:
        self._config = config
        self._words = config.command_line.split()
        self._log: list[MachineEvent] = []
        self._changed = threading.Condition()
        self._started = time.monotonic()
        self.state = MachineState.RUNNING
        self.boots = 1
        self.heartbeat = HeartbeatStatus.OK
        self.calls: list[str] = []
        self.items: dict[tuple[KvpPool, str], str] = {}
        self.copied: CopyProgress | None = None
        self.switched_off: set[str] = set()
        self.memory = FakeMemory(config)
        around = Surroundings(config, Loop(), Path(), self.post)
        self.storage = Storage(around)
        self.backup = Backup(around, self.storage)
        self.storage_elsewhere: Callable[[str, str], str] | None = None
        self.stopped = threading.Event()
        self.post("started")

    @property
    def config(self) -> MachineConfig:
        return self._config

    def post(self, kind: str, detail: str = "") -> None:
        with self._changed:
            seconds = time.monotonic() - self._started
            self._log.append(MachineEvent(len(self._log) + 1, seconds, kind, detail))
            self._changed.notify_all()

    def peripheral(self, kind: type[Family]) -> Family:
        if kind is MemoryPeripheral:
            return cast("Family", self.memory)
        if kind is Backup:
            return cast("Family", self.backup)
        if kind is Storage:
            return cast("Family", self.storage)
        raise HvHostError(f"there is no {kind.__name__}.")

    def elsewhere(self, family: str) -> Callable[[str, str], str] | None:
        return self.storage_elsewhere if family == "storage" else None

    def info(self) -> MachineInfo:
        return MachineInfo(
            name=self._config.name,
            pid=os.getpid(),
            state=self.state,
            seconds=time.monotonic() - self._started,
            cpus=self._config.cpus,
            memory=self._config.memory,
            kernel=self._config.kernel,
            command_line=self._config.command_line,
            transport="local",
            boots=self.boots,
            guest_os_id=0x8100_0006_0100_0000,
            vmbus_version="5.3",
            heartbeat=self.heartbeat,
            heartbeat_round_trip_microseconds=12.5,
            shutdown_ready="no-shutdown" not in self._words,
            channels=(
                ChannelInfo(
                    1,
                    "heartbeat",
                    "57164f39-9115-4e78-ab55-382f3bd5422d",
                    "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0",
                    "open",
                    0,
                ),
            ),
            exits={"io": 12345, "hypercall": 6},
        )

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._log) > after, timeout)
            return self._log[after:]

    def shut_down(self, action: ShutdownAction) -> None:
        self.calls.append(f"shut_down {action}")
        if "stubborn" in self._words:
            return
        if action is ShutdownAction.REBOOT:
            self.reset()
        else:
            self.end("power-off")

    def force_stop(self) -> None:
        self.calls.append("force_stop")
        self.end("force")

    def end(self, why: str) -> None:
        self.state = MachineState.STOPPED
        self.post("stopped", why)
        self.stopped.set()

    def reset(self) -> None:
        self.calls.append("reset")
        self.boots += 1
        self.post("reset")

    def pause(self) -> None:
        if self.state is MachineState.PAUSED:
            raise HvHostError(f"machine {self._config.name!r} is paused.")
        self.calls.append("pause")
        self.state, self.heartbeat = MachineState.PAUSED, HeartbeatStatus.PAUSED

    def resume(self) -> None:
        self.calls.append("resume")
        self.state, self.heartbeat = MachineState.RUNNING, HeartbeatStatus.OK

    def nmi(self) -> None:
        self.calls.append("nmi")

    def hang(self) -> list[ProcessorInfo]:
        self.calls.append("hang")
        self.heartbeat = HeartbeatStatus.NO_CONTACT
        self.post("heartbeat", self.heartbeat)
        return self.processors()

    def processors(self) -> list[ProcessorInfo]:
        return [ProcessorInfo(0, ProcessorState.RUNNING, 0xFFFF_FFFF_8123_4567, 0x46, 0)]

    def heartbeat_round_trips(self, count: int) -> list[float]:
        if "no-heartbeat" in self._words:
            raise HvHostError("the guest has no heartbeat service; load hv_utils in it.")
        return [0.001] * count

    def time_sync(self) -> float:
        self.calls.append("time_sync")
        return 0.0005

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        return [ClockSample(1000, 1000 + address, 5)] * count

    def kvp_list(self, pool: KvpPool | None) -> list[KvpRecord]:
        return [
            KvpRecord(where, key, value)
            for (where, key), value in self.items.items()
            if pool in (None, where)
        ]

    def kvp_get(self, pool: KvpPool | None, key: str) -> KvpRecord:
        for record in self.kvp_list(pool):
            if record.key == key:
                return record
        raise HvHostError(f"The guest has no item {key!r}; list what it has.")

    def kvp_set(self, pool: KvpPool, key: str, value: str) -> None:
        self.items[pool, key] = value

    def kvp_delete(self, pool: KvpPool, key: str) -> None:
        del self.items[pool, key]

    def ip_settings(self, adapter: str) -> IpSettings:
        return IpSettings(adapter, 1, False, "192.0.2.7")

    def set_ip(self, settings: IpSettings) -> None:
        raise HvHostError(f"The guest did not configure adapter {settings.adapter}.")

    def copy_start(
        self, source: str, destination: str, *, create_path: bool, overwrite: bool
    ) -> CopyProgress:
        self.calls.append(f"copy {source} {destination} {create_path} {overwrite}")
        if "no-copy" in self._words:
            raise HvHostError("The guest takes no files; install hyperv-daemons in it.")
        state = CopyState.COPYING if "slow-copy" in self._words else CopyState.DONE
        error = "The guest's disk became full." if "full" in self._words else None
        self.copied = CopyProgress(source, destination, 1000, 600, 2.0, state)
        if state is CopyState.DONE:
            self.copied = CopyProgress(
                source, destination, 1000, 1000, 2.0, CopyState.FAILED if error else state, error
            )
        return self.copied

    def copy_progress(self, timeout: float) -> CopyProgress:
        if self.copied is None:
            raise HvHostError("Nothing has been copied into this guest yet; copy a file first.")
        return self.copied

    def copy_cancel(self) -> None:
        self.calls.append("copy_cancel")
        if self.copied is None:
            return
        self.copied = CopyProgress(
            self.copied.source,
            self.copied.destination,
            1000,
            600,
            2.0,
            CopyState.FAILED,
            "The copy was cancelled after 600 of 1000 bytes.",
        )

    def services(self) -> list[ServiceInfo]:
        names = ("heartbeat", "file-copy", "sockets")
        return [
            ServiceInfo(
                name,
                name not in self.switched_off,
                None if name == "sockets" or name in self.switched_off else "open",
                name not in self.switched_off,
            )
            for name in names
        ]

    def set_service(self, name: str, enabled: bool) -> None:
        if name not in ("heartbeat", "file-copy", "sockets"):
            raise HvHostError(f"There is no service {name!r}; there are heartbeat, file-copy.")
        (self.switched_off.discard if enabled else self.switched_off.add)(name)


class SmallLoop:
    """A loop with the methods a serial port needs; :meth:`run_once` drives it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._soon: deque[Callable[[], object]] = deque()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        self.add_reader(self._wake_reader, lambda: os.read(self._wake_reader, 4096))

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
        self._epoll.register(fd, select.EPOLLOUT)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)
        del self._callbacks[fd]

    def call_soon_threadsafe(self, callback: Callable[[], object]) -> None:
        self._soon.append(callback)
        os.write(self._wake_writer, b"\0")

    def run_once(self, timeout: float = 0.0) -> int:
        """Callbacks run; 0 means that nothing happened within *timeout* seconds."""
        ran = 0
        for fd, _ in self._epoll.poll(timeout):
            if callback := self._callbacks.get(fd):
                callback()
                ran += 1
        while self._soon:
            self._soon.popleft()()
            ran += 1
        return ran

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)
