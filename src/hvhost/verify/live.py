"""The real machine and probe, fitted to what the rows ask for (:mod:`hvhost.verify.guest`)."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hvhost.errors import HvHostError
from hvhost.guests.probe import ProbeClient, ProbeTimeout
from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.model import (
    CopyProgress,
    MachineConfig,
    MachineEvent,
    MachineInfo,
    ProcessorInfo,
    ShutdownAction,
    Transport,
)
from hvhost.machine.serial import listen
from hvhost.manager.backup import back_up
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory
from hvhost.manager.launcher import Worker, launch
from hvhost.manager.memory import MemoryClient
from hvhost.manager.network import NetworkClient
from hvhost.manager.storage import DriveClient
from hvhost.paths import runtime_dir
from hvhost.sockets.protocol import Service, listen_name, service_id
from hvhost.verify.guest import Probe
from hvhost.verify.live_logs import ConsoleLog, EventLog, connect_serial
from hvhost.verify.live_probe import best_probe
from hvhost.verify.live_usage import emulator_seconds, guest_seconds, memory_held
from hvhost.verify.services import Services
from hvhost.verify.session import patience

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_DRIVER_SECONDS = 20.0
_ENDING_SECONDS = 3.0


def _launch(config: MachineConfig, progress: Callable[[str], None]) -> Worker:
    """Start a worker from a thread that lives as long as it does.

    A worker is told to stop when the thread that started it ends, and rows run in threads of
    their own.
    """
    answer: queue.SimpleQueue[Worker | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def keep() -> None:
        try:
            worker = launch(config, detach=False, progress=progress, abandoned=abandoned)
        except BaseException as error:
            answer.put(error)
            return
        answer.put(worker)
        worker.process.wait()

    thread = threading.Thread(target=keep, name="worker-keeper", daemon=True)
    thread.start()
    try:
        started = answer.get()
    except BaseException:  # such as Ctrl-C
        abandoned.set()
        started = answer.get()
        if isinstance(started, Worker):
            started.stop()
        MachineDirectory.of(config.name).remove()
        raise
    if isinstance(started, BaseException):
        raise started
    return started


class LiveMachine:
    """:class:`hvhost.verify.guest.Machine` over a worker process of our own."""

    def __init__(
        self, config: MachineConfig, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        """Start the machine; *progress* is told what takes time."""
        self._worker = _launch(config, progress)
        self._directory: MachineDirectory = self._worker.directory
        self._pending: ProbeClient | None = None
        self._log = ""
        try:
            self._client = MachineClient(config.name)
            self._console = ConsoleLog(self._directory.serial_socket(1))
            self._events = EventLog(self._client.events)
        except BaseException:
            self._worker.stop()
            raise

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        """What the worker answers, or why there is no worker any more."""
        try:
            return call()
        except HvHostError:
            if self._worker.process.poll() is not None:
                raise self._end() from None
            raise

    def _end(self) -> HvHostError:
        """How the worker ended, in its own words."""
        if not self.wait_stopped(_ENDING_SECONDS):
            return HvHostError("the machine's worker does not answer any more; see its log.")
        try:
            self._worker.check_ended_well()
        except HvHostError as error:
            return error
        return HvHostError("the machine stopped while something was still expected of its guest.")

    def info(self) -> MachineInfo:
        return self._ask(self._client.info)

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        events = self._events.after(after, timeout)
        if events is None:
            raise self._end()
        return events

    def shut_down(self, action: ShutdownAction) -> None:
        self._ask(lambda: self._client.shut_down(action))

    def reset(self) -> None:
        self._ask(self._client.reset)

    def nmi(self) -> None:
        self._ask(self._client.nmi)

    def pause(self) -> None:
        self._ask(self._client.pause)

    def resume(self) -> None:
        self._ask(self._client.resume)

    def hang(self) -> list[ProcessorInfo]:
        return self._ask(self._client.hang)

    def processors(self) -> list[ProcessorInfo]:
        return self._ask(self._client.processors)

    def heartbeat_round_trips(self, count: int) -> list[float]:
        return self._ask(lambda: self._client.measure_heartbeats(count))

    def connect(self, service: Service, timeout: float) -> socket.socket:
        return self._client.connect(service, timeout)

    def listen(self, service: Service) -> socket.socket:
        return listen(self._directory.path / listen_name(service_id(service)))

    def copy(
        self,
        source: Path,
        destination: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        return self._client.copy(
            source, destination, create_path=create_path, overwrite=overwrite, watch=watch
        )

    def back_up(self, options: BackupOptions) -> BackupInfo:
        return back_up(self._client, options)

    @property
    def services(self) -> Services:
        return self._client

    @property
    def drives(self) -> DriveClient:
        return DriveClient(self._client)

    @property
    def network(self) -> NetworkClient:
        return NetworkClient(self._client)

    @property
    def memory(self) -> MemoryClient:
        return MemoryClient(self._client)

    def memory_held(self) -> int:
        return memory_held(self._worker.process.pid)

    def vp_seconds(self) -> float | None:
        if self.info().transport != Transport.LOCAL:
            return emulator_seconds(runtime_dir("rig") / "rig.sock")
        return guest_seconds(self._worker.process.pid)

    def wait_stopped(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self._worker.process.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def console(self) -> str:
        if self._worker.process.poll() is not None:
            self._console.finish(1.0)
        return self._console.text()

    def connect_probe(self, timeout: float) -> Probe | None:
        if self._worker.process.poll() is not None:
            raise self._end()
        if self._pending is None:
            self._pending = ProbeClient(connect_serial(self._directory.serial_socket(2)))
        try:
            self._pending.wait_ready(timeout, drivers=False)
        except ProbeTimeout:
            return None
        try:
            self._pending.wait_ready(_DRIVER_SECONDS * patience())
        except ProbeTimeout as error:
            # A row that needs a driver which is not there yet will say so.
            log.warning("%s", error)
        serial, self._pending = self._pending, None
        return best_probe(serial, self._directory.path)

    def keep_logs(self, directory: Path) -> None:
        path = directory / "worker.log"
        number = 1
        while path.exists():
            number += 1
            path = directory / f"worker-{number}.log"
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(self._log, encoding="utf-8")

    def kill(self) -> None:
        if self._worker.process.poll() is None:
            with contextlib.suppress(HvHostError):
                self._client.force_stop()
                self.wait_stopped(3.0)
        if self._worker.process.poll() is None:
            self._worker.stop()
        with contextlib.suppress(OSError):
            self._log = self._directory.log_file.read_text(errors="replace")
        if self._pending is not None:
            self._pending.close()
        self._console.finish(1.0)
        self._directory.remove()
