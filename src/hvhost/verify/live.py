"""The real guest, machine and probe, fitted to what the rows ask for (:mod:`verify.guest`)."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hvhost.errors import HvHostError
from hvhost.guests.apt import NATIVE
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.guests.catalog import DEFAULT_GUEST, check_guest, recipe
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
from hvhost.manager.definition import define
from hvhost.manager.directory import MachineDirectory
from hvhost.manager.launcher import Worker, launch
from hvhost.manager.memory import MemoryClient
from hvhost.manager.network import NetworkClient
from hvhost.manager.storage import DriveClient
from hvhost.paths import runtime_dir
from hvhost.sockets.protocol import Service, listen_name, service_id
from hvhost.units import KIB
from hvhost.verify.guest import ANY_SHAPE, Machine, Modules, Probe, Shape
from hvhost.verify.live_probe import best_probe
from hvhost.verify.options import VerifyOptions
from hvhost.verify.services import Services
from hvhost.verify.session import patience

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A guest that panics stays where it is, so that the host is the one to notice.
COMMAND_LINE = "console=ttyS0 panic=0"
EVENT_WAIT = 5.0
_CONSOLE_CONNECT_SECONDS = 5.0
_DRIVER_SECONDS = 20.0
_ENDING_SECONDS = 3.0
_TIMES = (13, 14)  # utime and stime
_GUEST_TIME = 42
_RIG_MEMORY, _BLOCK = "/memfd:hvhost-rig", 512
_UCRED = struct.Struct("=iII")


class ConsoleLog:
    """All that a machine's console said, collected in a thread."""

    def __init__(self, path: Path) -> None:
        self._data = bytearray()
        self._lock = threading.Lock()
        self._socket = _connect(path)
        self._thread = threading.Thread(target=self._collect, name="console", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with self._socket:
            try:
                while data := self._socket.recv(1 << 16):
                    with self._lock:
                        self._data += data
            except OSError as error:
                log.debug("the console ended: %s", error)

    def text(self) -> str:
        with self._lock:
            return self._data.decode("utf-8", "replace")

    def finish(self, timeout: float) -> None:
        """Wait for the last words of a machine that has ended."""
        self._thread.join(timeout)


class EventLog:
    """A machine's events, collected in a thread, so that its last ones outlive its worker."""

    def __init__(self, fetch: Callable[[int, float], list[MachineEvent]]) -> None:
        self._fetch = fetch
        self._events: list[MachineEvent] = []
        self._over = False
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._collect, name="events", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        seen = 0
        while True:
            try:
                fresh = self._fetch(seen, EVENT_WAIT)
            except HvHostError as error:
                log.debug("no more events: %s", error)
                with self._arrived:
                    self._over = True
                    self._arrived.notify_all()
                return
            with self._arrived:
                self._events += fresh
                self._arrived.notify_all()
            seen = max([seen, *(event.sequence for event in fresh)])

    def after(self, sequence: int, timeout: float) -> list[MachineEvent] | None:
        """Events above *sequence*; waits up to *timeout* seconds for the first.

        ``None`` when there are none and none will come.
        """

        def newer() -> list[MachineEvent]:
            return [event for event in self._events if event.sequence > sequence]

        with self._arrived:
            self._arrived.wait_for(lambda: self._over or newer(), timeout)
            return newer() or (None if self._over else [])


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + _CONSOLE_CONNECT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise HvHostError(
                    f"the machine's serial port {path.name} cannot be reached: {error.strerror}."
                ) from error
            time.sleep(0.02)
        else:
            return connection


def _cpu_seconds(process: Path, *fields: int) -> float:
    """The sum of *fields* of ``/proc/PID/stat``, counted from 0, which are in 1/100 s."""
    # The command in parentheses may hold spaces; fields are counted after it.
    values = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(int(values[field - 2]) for field in fields) / 100


def emulator_seconds(rig: Path) -> float | None:
    """CPU seconds of the emulator behind the socket *rig*: its VPs' and what else it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(rig))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    keeper = _UCRED.unpack(credentials)[0]
    try:
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return sum(_cpu_seconds(Path("/proc", child), *_TIMES) for child in children)
    except FileNotFoundError:
        return None  # just gone, or this kernel does not list children


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
        process = Path(f"/proc/{self._worker.process.pid}")
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()).startswith(_RIG_MEMORY):
                    return link.stat().st_blocks * _BLOCK
        status = (process / "status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * KIB

    def vp_seconds(self) -> float | None:
        if self.info().transport != Transport.LOCAL:
            return emulator_seconds(runtime_dir("rig") / "rig.sock")
        tasks = Path(f"/proc/{self._worker.process.pid}/task")
        return sum(_cpu_seconds(task, _GUEST_TIME) for task in tasks.iterdir())

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
            self._pending = ProbeClient(_connect(self._directory.serial_socket(2)))
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


@dataclass(frozen=True, slots=True)
class LiveGuest:
    """:class:`hvhost.verify.guest.PreparedGuest` of images on disk."""

    images: GuestImages
    options: VerifyOptions
    progress: Callable[[str], None] = lambda text: None

    @property
    def os_name(self) -> str:
        return self.images.title

    @property
    def release(self) -> str:
        return self.images.release

    @property
    def modules(self) -> Modules | None:
        return self.images.modules

    @property
    def daemons(self) -> frozenset[str]:
        return frozenset(self.images.daemons)

    @property
    def daemons_of(self) -> str:
        return self.images.daemons_of

    @property
    def is_64_bit(self) -> bool:
        return self.images.architecture == NATIVE

    def pae_sibling(self) -> LiveGuest | None:
        if not self.is_64_bit:
            return self
        if self.options.kernel is not None or self.options.debs:
            return None
        name = recipe(self.options.guest or DEFAULT_GUEST).pae
        if name is None:
            return None
        options = replace(self.options, guest=name)
        return LiveGuest(prepare_guest(name, progress=self.progress), options, self.progress)

    def start(self, *, verbose: bool, shape: Shape = ANY_SHAPE) -> Machine:
        return LiveMachine(
            shape.apply(
                define(
                    kernel=self.images.kernel,
                    initrd=self.images.initrd,
                    command_line=" ".join(
                        filter(
                            None,
                            (
                                COMMAND_LINE,
                                self.images.command_line,
                                "" if verbose else "quiet",
                                self.options.append,
                            ),
                        )
                    ),
                    cpus=self.options.cpus,
                    memory=self.options.memory,
                    transport=self.options.transport,
                )
            ),
            self.progress,
        )


def prepare(options: VerifyOptions, progress: Callable[[str], None]) -> LiveGuest:
    """The guest that *options* names, downloaded and built; *progress* hears what is being done."""
    if options.guest is not None:
        check_guest(options.guest, "give a kernel with --kernel or --deb")
    images = prepare_guest(
        options.guest,
        kernel=options.kernel,
        modules=options.modules,
        debs=options.debs,
        daemons=options.daemons,
        progress=progress,
    )
    return LiveGuest(images, options, progress)
