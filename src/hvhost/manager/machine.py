"""The Python API: ``from hvhost import Machine``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from hvhost.errors import HvHostError
from hvhost.guests.probe import ExecResult
from hvhost.machine.model import (
    CopyProgress,
    CopyState,
    HeartbeatStatus,
    IpSettings,
    KvpPool,
    KvpRecord,
    MachineConfig,
    MachineEvent,
    MachineInfo,
    ProcessorInfo,
    ServiceInfo,
    ShutdownAction,
    Transport,
)
from hvhost.machine.storage_model import DriveInfo, DriveKind
from hvhost.manager.console import Console
from hvhost.manager.definition import define, define_guest
from hvhost.manager.directory import MachineDirectory, NameState, running_directory
from hvhost.manager.launcher import Worker, launch
from hvhost.manager.memory import SET_SECONDS
from hvhost.manager.probe import connect_probe
from hvhost.manager.storage import RESIZE_SECONDS, parse_drive, with_storage
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.sockets.protocol import Service
from hvhost.sockets.streams import Listener, Serve, open_connection
from hvhost.units import parse_size

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

KEPT_EVENTS = 10_000
"""Events a machine remembers."""

_ANSWER_SECONDS = 30.0
_KVP_SECONDS = 120.0
_COPY_LOOK_SECONDS = 0.2
_POLL_SECONDS = 0.02
_EVENT_WAIT = 60.0
_RECHECK_SECONDS = 1.0
_STOP_SECONDS = 10.0
_ENDING_SECONDS = 3.0


class Machine:
    """A running machine.

    ::

        async with await Machine.start(kernel="vmlinuz", initrd="initrd.img") as machine:
            await machine.wait_heartbeat(HeartbeatStatus.OK)
            machine.console.send_line("uname -r")
            print((await machine.console.expect(r"\\d+\\.\\d+\\S*"))[0])
            await machine.shut_down()
            await machine.wait_stopped()

    A machine from :meth:`start` is stopped when its block is left, and does not outlive this
    process, however that ends; one from :meth:`attach` goes on. All methods raise
    :class:`hvhost.errors.HvHostError` with a sentence for the user.
    """

    def __init__(
        self, directory: MachineDirectory, console: Console, worker: Worker | None
    ) -> None:
        """For :meth:`start` and :meth:`attach` only."""
        self._directory = directory
        self._worker = worker
        self._console = console
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(directory.api_socket)),
            base_url="http://machine",
            timeout=_ANSWER_SECONDS,
        )
        self._log: deque[MachineEvent] = deque(maxlen=KEPT_EVENTS)
        self._news = asyncio.Event()
        # From the first moment on, so that how it stopped is known when its worker is gone.
        self._watch = asyncio.create_task(self._watch_events())

    @classmethod
    async def start(
        cls,
        *,
        kernel: str | Path | None = None,
        guest: str | None = None,
        initrd: str | Path | None = None,
        command_line: str = "",
        cpus: int = 1,
        memory: str | int = "512M",
        name: str | None = None,
        transport: Transport | str = Transport.AUTO,
        dynamic_memory: DynamicMemory | None = None,
        disks: Sequence[str] = (),
        dvds: Sequence[str] = (),
        storage_process: bool = False,
    ) -> Self:
        """Start a machine and return as soon as its worker can be spoken to.

        Give *kernel* (a bzImage, vmlinux or PVH ELF) or *guest* (a distribution like
        ``"debian-12"``). *memory* is a size like ``"512M"`` or a number of bytes; *transport* is
        ``auto``, ``local`` (``/dev/kvm``) or ``rig`` (KVM in software). Without a *name* one is
        made up. ``console=ttyS0`` is added to a *command_line* that names no console. Memory is
        fixed, see :meth:`set_memory`, unless *dynamic_memory* says between what limits it may be.
        *disks* and *dvds* are images with options, as ``hvhost run --disk`` takes them;
        *storage_process* serves them from a process of their own.
        """
        if (kernel is None) == (guest is None) or (guest is not None and initrd is not None):
            raise HvHostError(
                "a machine starts from either a kernel (and an initrd) or a guest; give one."
            )
        config: MachineConfig
        if kernel is not None:
            config = define(
                kernel=kernel,
                initrd=initrd,
                command_line=command_line,
                cpus=cpus,
                memory=memory,
                name=name,
                transport=transport,
                dynamic_memory=dynamic_memory,
            )
        else:
            assert guest is not None
            config = await asyncio.to_thread(
                define_guest,
                guest,
                command_line=command_line,
                cpus=cpus,
                memory=memory,
                name=name,
                transport=transport,
                dynamic_memory=dynamic_memory,
            )
        config = replace(config, storage_process=storage_process)
        worker = await _launch(with_storage(config, disks, dvds))
        try:
            port = worker.directory.serial_socket(1)
            console = await Console.open(port, config.name)
        except BaseException:
            worker.process.kill()
            worker.process.wait()
            raise
        return cls(worker.directory, console, worker)

    @classmethod
    async def attach(cls, name: str) -> Self:
        """The machine *name* that runs already, from ``hvhost run`` or another program."""
        directory = running_directory(name)
        machine = cls(directory, await Console.open(directory.serial_socket(1), name), None)
        await machine._news.wait()  # it may be about to stop
        return machine

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<hvhost.Machine {self.name!r}>"

    @property
    def name(self) -> str:
        """The machine's name, as ``hvhost ps`` shows it."""
        return self._directory.name

    @property
    def log_file(self) -> Path:
        """The worker's log; removed together with a machine that ended well."""
        return self._directory.log_file

    @property
    def console(self) -> Console:
        """COM1, the guest's console."""
        return self._console

    async def info(self) -> MachineInfo:
        """The machine's account of itself."""
        return await self._ask("GET", "", MachineInfo)

    async def shut_down(self, *, reboot: bool = False) -> None:
        """Ask the guest to power off, or to reboot, through its shutdown service.

        Returns when it was asked; see :meth:`wait_stopped`.
        """
        action = ShutdownAction.REBOOT if reboot else ShutdownAction.POWER_OFF
        await self._do("shutdown", {"action": action})

    async def force_stop(self) -> None:
        """Power off at once and wait until the worker is gone."""
        if self._alive():
            try:
                await self._do("stop")
            except HvHostError:
                if self._alive():
                    raise
        await self._wait_gone()

    async def reset(self) -> None:
        """Hard reset: the guest boots again from its kernel."""
        await self._do("reset")

    async def pause(self) -> None:
        """Stop every virtual processor and the guest's clock until :meth:`resume`."""
        await self._do("pause")

    async def resume(self) -> None:
        """Let a paused machine go on; its guest is told the time."""
        await self._do("resume")

    async def nmi(self) -> None:
        """Raise a non-maskable interrupt on virtual processor 0."""
        await self._do("nmi")

    async def hang(self) -> list[ProcessorInfo]:
        """Debug: leave every virtual processor spinning in ring 0 with interrupts off; where."""
        return await self._ask("POST", "/debug/hang", list[ProcessorInfo])

    async def processors(self) -> list[ProcessorInfo]:
        """Debug: where every virtual processor is just now."""
        return await self._ask("GET", "/debug/processors", list[ProcessorInfo])

    async def measure_heartbeats(self, count: int = 100) -> list[float]:
        """Seconds of each of *count* heartbeats sent back to back."""
        answer = await self._ask(
            "POST", "/heartbeat/measure", dict[str, list[float]], {"count": count}
        )
        return answer["seconds"]

    async def time_sync(self) -> float:
        """Have the guest set its clock to the host's now; seconds until its driver took it."""
        return (await self._ask("POST", "/time/sync", dict[str, float]))["seconds"]

    async def kvp_list(self, pool: KvpPool | str | None = None) -> list[KvpRecord]:
        """All key-value pairs of *pool* (``"guest"``…), or of all pools."""
        return await self._ask("GET", "/kvp", list[KvpRecord], _given(pool=pool), _KVP_SECONDS)

    async def kvp_get(self, key: str, pool: KvpPool | str | None = None) -> str:
        """The value of *key* in *pool*, or in the first pool that has it."""
        query = _given(key=key, pool=pool)
        return (await self._ask("GET", "/kvp/item", KvpRecord, query, _KVP_SECONDS)).value

    async def kvp_set(self, key: str, value: str, pool: KvpPool | str = KvpPool.EXTERNAL) -> None:
        """Add an item or change it; one of a host's pool is given again at every boot."""
        await self._do("kvp/set", {"key": key, "value": value, "pool": pool}, _KVP_SECONDS)

    async def kvp_delete(self, key: str, pool: KvpPool | str = KvpPool.EXTERNAL) -> None:
        """Remove an item."""
        await self._do("kvp/delete", {"key": key, "pool": pool}, _KVP_SECONDS)

    async def ip_settings(self, adapter: str) -> IpSettings:
        """The addresses of the guest's adapter with this MAC address."""
        return await self._ask("GET", "/ip", IpSettings, _given(adapter=adapter), _KVP_SECONDS)

    async def set_ip(self, settings: IpSettings) -> None:
        """Have the guest's daemon configure an adapter, named by its instance GUID in braces."""
        await self._do("ip/set", asdict(settings), _KVP_SECONDS)

    async def execute(self, arguments: Sequence[str], timeout: float = 60.0) -> ExecResult:
        """Run a program in a guest that carries hvhost's probe, for at most *timeout* seconds."""

        def run() -> ExecResult:
            probe = connect_probe(self._directory)
            try:
                return probe.run([*arguments], timeout)
            finally:
                probe.close()

        return await asyncio.to_thread(run)

    async def open_connection(
        self, service: Service, timeout: float = 30.0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to *service* of the guest: a port number (AF_VSOCK) or a GUID."""
        return await open_connection(self._directory.path, service, timeout)

    async def listen(self, service: Service, serve: Serve) -> Listener:
        """Have *serve* called with reader and writer for each connection the guest makes.

        *service* is a port number or a GUID; ends with the ``async with`` block of the result.
        """
        return await Listener.start(self._directory.path, service, serve)

    async def copy(
        self,
        source: str | Path,
        destination: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        """Copy the file *source* to *destination* in the guest, a directory if it ends in ``/``.

        *watch* sees the progress now and then. Given up if this is cancelled.
        """
        body = {
            "source": str(Path(source).absolute()),
            "destination": destination,
            "create_path": create_path,
            "overwrite": overwrite,
        }
        progress = await self._ask("POST", "/copy", CopyProgress, body)
        try:
            while progress.state is CopyState.COPYING:
                watch(progress)
                progress = await self._ask(
                    "GET", "/copy", CopyProgress, {"timeout": _COPY_LOOK_SECONDS}
                )
        except BaseException:
            await asyncio.shield(self._do("copy/cancel"))
            raise
        if progress.error is not None:
            raise HvHostError(progress.error)
        return progress

    async def memory(self) -> MemoryInfo:
        """What memory the guest has, needs, and is about to have."""
        return await self._ask("GET", "/memory", MemoryInfo)

    async def set_memory(self, size: str | int, timeout: float = SET_SECONDS) -> MemoryInfo:
        """Give a machine with fixed memory *size* (``"3G"`` or bytes) of it, in *timeout* seconds.

        Raises :class:`HvHostError` with the numbers if that cannot be.
        """
        size = parse_size(size) if isinstance(size, str) else size
        body = {"size": size, "timeout": timeout}
        return await self._ask("POST", "/memory/set", MemoryInfo, body, timeout)

    async def limit_memory(
        self, *, minimum: str | int | None = None, maximum: str | int | None = None
    ) -> MemoryInfo:
        """Lower the minimum or raise the maximum of dynamic memory."""
        sizes = {"minimum": minimum, "maximum": maximum}
        body = {
            name: parse_size(size) if isinstance(size, str) else size
            for name, size in sizes.items()
        }
        return await self._ask("POST", "/memory/limits", MemoryInfo, body)

    async def services(self) -> list[ServiceInfo]:
        """The integration services, switched on or off."""
        return await self._ask("GET", "/services", list[ServiceInfo])

    async def set_service(self, name: str, enabled: bool) -> None:
        """Switch a service on or off; the guest's driver binds or unbinds."""
        await self._do("services", {"name": name, "enabled": enabled})

    async def drives(self) -> list[DriveInfo]:
        """The machine's disks and DVD drives."""
        return await self._ask("GET", "/drives", list[DriveInfo])

    async def add_drive(self, drive: str, *, dvd: bool = False) -> DriveInfo:
        """Attach an image with options, like ``"data.vhdx,lun=5"``; the guest is told at once."""
        config = parse_drive(drive, DriveKind.DVD if dvd else DriveKind.DISK)
        return await self._drive("add", **asdict(config))

    async def remove_drive(self, address: str) -> DriveInfo:
        """Detach the drive at an address like ``scsi0:5``; its image is free afterwards."""
        return await self._drive("remove", address=address)

    async def insert_medium(self, address: str, path: str | Path) -> DriveInfo:
        """Put an ISO image into a DVD drive."""
        return await self._drive("insert", address=address, path=str(Path(path).absolute()))

    async def eject_medium(self, address: str, *, force: bool = False) -> DriveInfo:
        """Take the image out of a DVD drive; by *force* while the guest holds it."""
        return await self._drive("eject", address=address, force=force)

    async def resize_drive(
        self, address: str, size: int, *, shrink: bool = False, force: bool = False
    ) -> DriveInfo:
        """Set a disk's size in bytes while the guest uses it.

        Smaller only with *shrink*; below the end of its partitions only by *force*.
        """
        return await self._drive("resize", address=address, size=size, shrink=shrink, force=force)

    async def limit_drive(self, address: str, *, iops: int = 0, bandwidth: int = 0) -> DriveInfo:
        """Limit a drive to so many requests and bytes a second; 0 is no limit."""
        return await self._drive("limit", address=address, iops=iops, bandwidth=bandwidth)

    async def _drive(self, verb: str, **body: object) -> DriveInfo:
        return await self._ask("POST", f"/drives/{verb}", DriveInfo, body, RESIZE_SECONDS)

    async def events(self, after: int = 0) -> AsyncIterator[MachineEvent]:
        """Events with a sequence above *after*, past ones first; ends when the machine stops.

        Of the past, the last 10,000 are kept, also beyond the machine's end.
        """
        while True:
            news = self._news
            for event in [each for each in self._log if each.sequence > after]:
                after = event.sequence
                yield event
            if news is self._news:
                if self._watch.done():
                    if not self._watch.cancelled():
                        self._watch.result()
                    return
                await news.wait()

    async def wait_heartbeat(self, status: HeartbeatStatus, timeout: float = 60.0) -> MachineInfo:
        """Wait until the heartbeat service says *status*, up to *timeout* seconds."""
        info: MachineInfo | None = None
        try:
            async with asyncio.timeout(timeout):
                while True:
                    news = self._news
                    info = await self.info()
                    if info.heartbeat == status:
                        return info
                    # Looks again now and then, so a missed event costs a second at most.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), _RECHECK_SECONDS)
        except TimeoutError:
            last = "unknown" if info is None else info.heartbeat
            raise HvHostError(
                f"the heartbeat of machine {self.name!r} is {last}, not {status}, after"
                f" {timeout:g} seconds; look at its console or wait longer."
            ) from None

    async def wait_stopped(self, timeout: float | None = None) -> str | None:
        """Wait until the machine has stopped and its worker is gone; why, if it was said.

        *timeout* is in seconds, ``None`` without end. Raises :class:`HvHostError` when it has
        passed, and with the worker's words when the machine failed.
        """
        why: str | None = None
        try:
            async with asyncio.timeout(timeout):
                async for event in self.events():
                    if event.kind == "stopped":
                        why = event.detail
                await self._wait_gone()
        except TimeoutError:
            raise HvHostError(
                f"machine {self.name!r} is still running after {timeout:g} seconds; wait longer or"
                " stop it by force."
            ) from None
        if self._worker is not None:
            self._worker.check_ended_well()
        return why

    async def close(self) -> None:
        """Let go of the machine: stops one from :meth:`start`, at once and whatever it does."""
        self._console.close()
        self._watch.cancel()
        await asyncio.wait([self._watch])
        if not self._watch.cancelled() and (error := self._watch.exception()) is not None:
            logger.debug("the events of %s ended: %s", self.name, error)
        try:
            if self._worker is not None:
                await self._end(self._worker)
        finally:
            await self._http.aclose()

    async def _end(self, worker: Worker) -> None:
        if worker.process.poll() is None:
            await asyncio.to_thread(worker.stop)
        if worker.process.returncode == 0:
            self._directory.remove()

    def _alive(self) -> bool:
        if self._worker is not None:
            return self._worker.process.poll() is None
        return self._directory.state() is NameState.ALIVE

    async def _wait_gone(self) -> None:
        worker = self._worker
        if worker is not None and not await asyncio.to_thread(worker.ended, _STOP_SECONDS):
            raise HvHostError(
                f"the worker of machine {self.name!r} stopped its guest but does not end;"
                f" {self.log_file} has its log."
            )
        while self._alive():
            await asyncio.sleep(_POLL_SECONDS)

    async def _watch_events(self) -> None:
        """Collect events until the machine stops."""
        after = 0
        try:
            while True:
                for event in await self._events(after, _EVENT_WAIT):
                    after = event.sequence
                    self._log.append(event)
                    if event.kind == "stopped":
                        return
                self._announce()
        except HvHostError:
            if self._alive():
                raise
        finally:
            self._announce()

    def _announce(self) -> None:
        """Wake who waits for news, and be ready for the next ones."""
        self._news.set()
        self._news = asyncio.Event()

    async def _events(self, after: int, wait: float) -> list[MachineEvent]:
        query = {"after": after, "timeout": wait}
        return await self._ask("GET", "/events", list[MachineEvent], query, wait)

    async def _do(self, verb: str, body: dict[str, Any] | None = None, wait: float = 0.0) -> None:
        await self._send("POST", f"/{verb}", body, wait)

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[Result],
        parameters: dict[str, Any] | None = None,
        wait: float = 0.0,
    ) -> Result:
        return msgspec.json.decode(await self._send(method, path, parameters, wait), type=kind)

    async def _send(
        self, method: str, path: str, parameters: dict[str, Any] | None, wait: float
    ) -> bytes:
        try:
            response = await self._http.request(
                method,
                f"/v1/machine{path}",
                params=parameters if method == "GET" else None,
                json=None if method == "GET" else parameters,
                timeout=_ANSWER_SECONDS + wait,
            )
        except httpx.TransportError as error:
            # A worker closes its API a moment before it ends.
            deadline = time.monotonic() + _ENDING_SECONDS
            while self._alive() and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_SECONDS)
            if not self._alive():
                raise HvHostError(f"machine {self.name!r} has stopped; start it anew.") from error
            raise HvHostError(
                f"machine {self.name!r} does not answer ({error!r}); {self.log_file} has its log."
            ) from error
        if response.is_error:
            try:
                sentence = str(response.json()["error"])
            except (ValueError, KeyError, TypeError):
                sentence = (
                    f"the worker answered with HTTP status {response.status_code};"
                    f" {self.log_file} says why."
                )
            raise HvHostError(sentence)
        return response.content


def _given(**parameters: str | None) -> dict[str, str]:
    """The parameters that are not ``None``."""
    return {name: value for name, value in parameters.items() if value is not None}


async def _launch(config: MachineConfig) -> Worker:
    """:func:`launch` in a thread of the loop, which ends with the loop and its machines."""
    launching = asyncio.ensure_future(asyncio.to_thread(launch, config, detach=False))
    try:
        return await asyncio.shield(launching)
    except asyncio.CancelledError:
        launching.add_done_callback(_abandon)
        raise


def _abandon(launching: asyncio.Future[Worker]) -> None:
    """Nobody waits any more for the worker that came up."""
    if not launching.cancelled() and launching.exception() is None:
        launching.result().process.terminate()
