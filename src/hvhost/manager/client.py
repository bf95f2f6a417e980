"""A machine's API for programs that wait: what the command line speaks.

Built on :mod:`http.client`, which imports in a fraction of the time httpx takes.
"""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec

from hvhost.errors import HvHostError
from hvhost.machine.model import (
    ClockSample,
    CopyProgress,
    CopyState,
    IpSettings,
    KvpPool,
    KvpRecord,
    MachineEvent,
    MachineInfo,
    ProcessorInfo,
    ServiceInfo,
    ShutdownAction,
)
from hvhost.manager.directory import MachineDirectory, NameState, running_directory
from hvhost.sockets.client import connect
from hvhost.sockets.protocol import Service

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

ANSWER_SECONDS = 30.0
"""How long a worker may take for an answer that waits for nothing."""

KVP_SECONDS = 120.0
"""How much longer it may take when it waits for the guest's key-value daemon."""

COPY_LOOK_SECONDS = 0.2
"""How often a copy's progress is looked at."""

COPY_CANCEL_SECONDS = 50.0
"""How long the guest may take to give a copy up."""

ENDING_SECONDS = 3.0
"""How long a worker may live on after its API, or before it."""

_POLL_SECONDS = 0.02


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket's path."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("machine", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class MachineClient:
    """The running machine *name*; every method raises :class:`HvHostError` with a sentence.

    One connection per call: nothing to close.
    """

    def __init__(self, name: str) -> None:
        self.directory: MachineDirectory = running_directory(name)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.directory.name

    def info(self) -> MachineInfo:
        """The machine's account of itself."""
        return self._get("/v1/machine", MachineInfo)

    def events(self, after: int = 0, timeout: float = 0.0) -> list[MachineEvent]:
        """Events with a sequence above *after*; waits up to *timeout* seconds for the first."""
        return self._get(
            f"/v1/machine/events?after={after}&timeout={timeout}", list[MachineEvent], timeout
        )

    def shut_down(self, action: ShutdownAction = ShutdownAction.POWER_OFF) -> None:
        """Ask the guest through its shutdown service; returns when it was asked."""
        self._post("shutdown", {"action": action})

    def force_stop(self) -> None:
        """Power off at once."""
        self._post("stop")

    def reset(self) -> None:
        """Hard reset."""
        self._post("reset")

    def pause(self) -> None:
        """Stop every virtual processor and the guest's clock."""
        self._post("pause")

    def resume(self) -> None:
        """Let a paused machine go on; its guest is told the time."""
        self._post("resume")

    def nmi(self) -> None:
        """Raise a non-maskable interrupt on virtual processor 0."""
        self._post("nmi")

    def hang(self) -> list[ProcessorInfo]:
        """Debug: hang the guest with interrupts off; where its virtual processors spin."""
        answer = self._request("POST", "/v1/machine/debug/hang", None, 0.0)
        return msgspec.json.decode(answer, type=list[ProcessorInfo])

    def processors(self) -> list[ProcessorInfo]:
        """Debug: where every virtual processor is just now."""
        return self._get("/v1/machine/debug/processors", list[ProcessorInfo])

    def measure_heartbeats(self, count: int = 100) -> list[float]:
        """Seconds of each of *count* heartbeats sent back to back."""
        answer = self._request("POST", "/v1/machine/heartbeat/measure", {"count": count}, 60.0)
        return msgspec.json.decode(answer, type=dict[str, list[float]])["seconds"]

    def time_sync(self) -> float:
        """Have the guest set its clock to the host's now; seconds until its driver took it."""
        answer = self._request("POST", "/v1/machine/time/sync", None, 0.0)
        return msgspec.json.decode(answer, type=dict[str, float])["seconds"]

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        """Debug: compare a clock that the guest writes into its memory with the host's."""
        body = {"address": address, "count": count, "interval": interval}
        # A sample may take a second to come.
        answer = self._request("POST", "/v1/machine/debug/clock", body, count * (interval + 1.0))
        return msgspec.json.decode(answer, type=list[ClockSample])

    def kvp_list(self, pool: KvpPool | None = None) -> list[KvpRecord]:
        """All key-value pairs of *pool*, or of all pools."""
        return self._get(f"/v1/machine/kvp{_query(pool=pool)}", list[KvpRecord], KVP_SECONDS)

    def kvp_get(self, key: str, pool: KvpPool | None = None) -> KvpRecord:
        """The item of *key* in *pool*, or in the first pool that has it."""
        return self._get(
            f"/v1/machine/kvp/item{_query(pool=pool, key=key)}", KvpRecord, KVP_SECONDS
        )

    def kvp_set(self, key: str, value: str, pool: KvpPool = KvpPool.EXTERNAL) -> None:
        """Add an item or change it."""
        self._post("kvp/set", {"key": key, "value": value, "pool": pool}, KVP_SECONDS)

    def kvp_delete(self, key: str, pool: KvpPool = KvpPool.EXTERNAL) -> None:
        """Remove an item."""
        self._post("kvp/delete", {"key": key, "pool": pool}, KVP_SECONDS)

    def ip_settings(self, adapter: str) -> IpSettings:
        """The addresses of the guest's adapter with this MAC address."""
        return self._get(f"/v1/machine/ip{_query(adapter=adapter)}", IpSettings, KVP_SECONDS)

    def set_ip(self, settings: IpSettings) -> None:
        """Have the guest's daemon configure an adapter, named by its instance GUID in braces."""
        self._post("ip/set", asdict(settings), KVP_SECONDS)

    def connect(self, service: Service, timeout: float = 30.0) -> socket.socket:
        """A socket connected to *service* of the guest: a port number or a GUID."""
        return connect(self.directory.path, service, timeout)

    def copy_start(
        self, source: Path, destination: str, *, create_path: bool = False, overwrite: bool = False
    ) -> CopyProgress:
        """Begin to copy *source* to *destination* in the guest, a directory if it ends in ``/``."""
        body = {
            "source": str(source.absolute()),
            "destination": destination,
            "create_path": create_path,
            "overwrite": overwrite,
        }
        answer = self._request("POST", "/v1/machine/copy", body, 0.0)
        return msgspec.json.decode(answer, type=CopyProgress)

    def copy_progress(self, timeout: float = 0.0) -> CopyProgress:
        """How far the last copy is; waits up to *timeout* seconds for its end."""
        return self._get(f"/v1/machine/copy?timeout={timeout}", CopyProgress, timeout)

    def copy_cancel(self) -> None:
        """Give the copy under way up; :meth:`copy_progress` tells when that is done."""
        self._post("copy/cancel")

    def copy(
        self,
        source: Path,
        destination: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        """Copy *source* into the guest; cancelled if this is interrupted, also by *watch*."""
        progress = self.copy_start(
            source, destination, create_path=create_path, overwrite=overwrite
        )
        try:
            while progress.state is CopyState.COPYING:
                watch(progress)
                progress = self.copy_progress(COPY_LOOK_SECONDS)
        except BaseException:
            self.copy_cancel()
            progress = self.copy_progress(COPY_CANCEL_SECONDS)
            logger.info("%s", progress.error)
            raise
        if progress.error is not None:
            raise HvHostError(progress.error)
        return progress

    def services(self) -> list[ServiceInfo]:
        """The integration services, switched on or off."""
        return self._get("/v1/machine/services", list[ServiceInfo])

    def set_service(self, name: str, enabled: bool) -> None:
        """Switch a service on or off; the guest's driver binds or unbinds."""
        self._post("services", {"name": name, "enabled": enabled})

    def ask(
        self,
        method: str,
        path: str,
        kind: type[Result],
        body: dict[str, Any] | None = None,
        wait: float = 0.0,
    ) -> Result:
        """What the worker answers on one of its routes; for the clients of device families."""
        return msgspec.json.decode(self._request(method, path, body, wait), type=kind)

    def _get(self, path: str, kind: type[Result], wait: float = 0.0) -> Result:
        return msgspec.json.decode(self._request("GET", path, None, wait), type=kind)

    def _post(self, verb: str, body: dict[str, Any] | None = None, wait: float = 0.0) -> None:
        self._request("POST", f"/v1/machine/{verb}", body, wait)

    def _await_door(self) -> None:
        """A machine in the foreground has its console a moment before its API."""
        deadline = time.monotonic() + ENDING_SECONDS
        while not self.directory.api_socket.exists() and time.monotonic() < deadline:
            if self.directory.state() is not NameState.ALIVE:
                return
            time.sleep(_POLL_SECONDS)

    def _request(self, method: str, path: str, body: object, wait: float) -> bytes:
        self._await_door()
        connection = _UnixConnection(str(self.directory.api_socket), ANSWER_SECONDS + wait)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError:
            raise HvHostError(
                f"machine {self.name!r} gave no answer within {ANSWER_SECONDS + wait:g} seconds;"
                f" look into {self.directory.log_file} or end its worker, process"
                f" {self.directory.worker_pid()}."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            # A worker closes its API a moment before it ends.
            self.directory.wait_gone(ENDING_SECONDS)
            running_directory(self.name)  # says so if it is gone
            raise HvHostError(
                f"machine {self.name!r} cannot be spoken to ({error}); look into"
                f" {self.directory.log_file}."
            ) from error
        finally:
            connection.close()
        if response.status >= 400:
            raise HvHostError(_refusal(answer, response.status))
        return answer


def _query(**parameters: str | None) -> str:
    """A query of those parameters that are given."""
    given = {name: value for name, value in parameters.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def _refusal(answer: bytes, status: int) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the worker answered with HTTP status {status}; its log says why."
