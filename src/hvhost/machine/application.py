"""What a worker's API serves, and its OpenAPI description, both made from one table of routes.

Imports the web server, so nothing but the API's own thread may import this module.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hvhost.errors import HvHostError
from hvhost.machine import backup_api, memory_api, network_api, storage_api
from hvhost.machine.endpoint import Endpoint, Nothing, WaitQuery
from hvhost.machine.model import (
    ClockSample,
    CopyProgress,
    IpSettings,
    KvpPool,
    KvpRecord,
    LiveMachine,
    MachineEvent,
    MachineInfo,
    ProcessorInfo,
    ServiceInfo,
    ShutdownAction,
)

logger = logging.getLogger(__name__)

MAXIMUM_BODY = 64 << 10
"""Bytes of a request's body."""

_GRACE_SECONDS = 1
_JSON = "application/json"


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Events with a sequence above ``after``; waits up to ``timeout`` seconds for the first."""

    after: Annotated[int, msgspec.Meta(ge=0, description="last sequence already seen")] = 0
    timeout: Annotated[float, msgspec.Meta(ge=0, le=300, description="seconds to wait")] = 0.0


class ShutdownRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to ask of the guest's shutdown service."""

    action: ShutdownAction = ShutdownAction.POWER_OFF


class MeasureRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many heartbeats to send back to back."""

    count: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100


class KvpQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which pool; all of them without ``pool``."""

    pool: KvpPool | None = None


class KvpKeyQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which item; the first pool that has it without ``pool``."""

    key: str
    pool: KvpPool | None = None


class KvpSetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An item to add or change."""

    key: str
    value: str
    pool: KvpPool = KvpPool.EXTERNAL


class KvpDeleteRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An item to remove."""

    key: str
    pool: KvpPool = KvpPool.EXTERNAL


class AdapterQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter of the guest, by its MAC address (``00:15:5D:01:02:03``)."""

    adapter: str


class CopyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the host, by its absolute path, and where it goes in the guest.

    ``destination`` is a file, or a directory if it ends in a slash.
    """

    source: str
    destination: str
    create_path: bool = False
    overwrite: bool = False


class ServiceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A service and whether it is to be on."""

    name: str
    enabled: bool


class WatchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where in guest physical memory a clock is written, how often to look, and in what distance.

    ``interval`` is in seconds.
    """

    address: Annotated[int, msgspec.Meta(ge=0)]
    count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    interval: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.02


@dataclass(frozen=True, slots=True)
class Answered:
    """Seconds until the guest answered."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of each heartbeat's round trip, in the order sent."""

    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request was refused: one sentence for the user."""

    error: str


def _shut_down(machine: LiveMachine, request: ShutdownRequest) -> None:
    machine.shut_down(request.action)


def _events(machine: LiveMachine, query: EventsQuery) -> list[MachineEvent]:
    return machine.events(query.after, query.timeout)


def _measure(machine: LiveMachine, request: MeasureRequest) -> Measurement:
    return Measurement(machine.heartbeat_round_trips(request.count))


def _kvp_set(machine: LiveMachine, request: KvpSetRequest) -> None:
    machine.kvp_set(request.pool, request.key, request.value)


def _kvp_delete(machine: LiveMachine, request: KvpDeleteRequest) -> None:
    machine.kvp_delete(request.pool, request.key)


def _copy_start(machine: LiveMachine, request: CopyRequest) -> CopyProgress:
    return machine.copy_start(
        request.source,
        request.destination,
        create_path=request.create_path,
        overwrite=request.overwrite,
    )


def _set_service(machine: LiveMachine, request: ServiceRequest) -> None:
    machine.set_service(request.name, request.enabled)


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/machine",
        "info",
        "The machine's own account of itself",
        lambda machine, _: machine.info(),
        result=MachineInfo,
    ),
    Endpoint(
        "GET",
        "/v1/machine/events",
        "events",
        "What happened since, or wait for it (long poll)",
        _events,
        EventsQuery,
        list[MachineEvent],
    ),
    Endpoint(
        "POST",
        "/v1/machine/shutdown",
        "shutdown",
        "Ask the guest to power off or reboot through its shutdown service",
        _shut_down,
        ShutdownRequest,
    ),
    Endpoint(
        "POST",
        "/v1/machine/stop",
        "stop",
        "Power off at once, without asking the guest",
        lambda machine, _: machine.force_stop(),
    ),
    Endpoint(
        "POST",
        "/v1/machine/reset",
        "reset",
        "Hard reset: the guest boots again from its kernel",
        lambda machine, _: machine.reset(),
    ),
    Endpoint(
        "POST",
        "/v1/machine/pause",
        "pause",
        "Stop every virtual processor and the guest's clock until it is resumed",
        lambda machine, _: machine.pause(),
    ),
    Endpoint(
        "POST",
        "/v1/machine/resume",
        "resume",
        "Let a paused machine go on; its guest is told the time",
        lambda machine, _: machine.resume(),
    ),
    Endpoint(
        "POST",
        "/v1/machine/nmi",
        "nmi",
        "Raise a non-maskable interrupt on virtual processor 0",
        lambda machine, _: machine.nmi(),
    ),
    Endpoint(
        "POST",
        "/v1/machine/debug/hang",
        "hang",
        "Debug: leave every virtual processor spinning in ring 0 with interrupts off",
        lambda machine, _: machine.hang(),
        result=list[ProcessorInfo],
    ),
    Endpoint(
        "GET",
        "/v1/machine/debug/processors",
        "processors",
        "Debug: where every virtual processor is just now",
        lambda machine, _: machine.processors(),
        result=list[ProcessorInfo],
    ),
    Endpoint(
        "POST",
        "/v1/machine/heartbeat/measure",
        "measure_heartbeat",
        "Time heartbeats sent back to back",
        _measure,
        MeasureRequest,
        Measurement,
    ),
    Endpoint(
        "POST",
        "/v1/machine/time/sync",
        "time_sync",
        "Have the guest set its clock to the host's now",
        lambda machine, _: Answered(machine.time_sync()),
        result=Answered,
    ),
    Endpoint(
        "POST",
        "/v1/machine/debug/clock",
        "watch_clock",
        "Debug: compare a clock that the guest writes into its memory with the host's",
        lambda machine, what: machine.watch_clock(what.address, what.count, what.interval),
        WatchRequest,
        list[ClockSample],
    ),
    Endpoint(
        "GET",
        "/v1/machine/kvp",
        "kvp_list",
        "The guest's key-value pairs",
        lambda machine, query: machine.kvp_list(query.pool),
        KvpQuery,
        list[KvpRecord],
    ),
    Endpoint(
        "GET",
        "/v1/machine/kvp/item",
        "kvp_get",
        "One key-value pair of the guest",
        lambda machine, query: machine.kvp_get(query.pool, query.key),
        KvpKeyQuery,
        KvpRecord,
    ),
    Endpoint(
        "POST",
        "/v1/machine/kvp/set",
        "kvp_set",
        "Give the guest a key-value pair, or change it",
        _kvp_set,
        KvpSetRequest,
    ),
    Endpoint(
        "POST",
        "/v1/machine/kvp/delete",
        "kvp_delete",
        "Take a key-value pair from the guest",
        _kvp_delete,
        KvpDeleteRequest,
    ),
    Endpoint(
        "GET",
        "/v1/machine/ip",
        "ip_settings",
        "The addresses of one of the guest's adapters, as its key-value daemon tells them",
        lambda machine, query: machine.ip_settings(query.adapter),
        AdapterQuery,
        IpSettings,
    ),
    Endpoint(
        "POST",
        "/v1/machine/ip/set",
        "set_ip",
        "Have the guest's key-value daemon configure an adapter, named by its instance GUID",
        lambda machine, settings: machine.set_ip(settings),
        IpSettings,
    ),
    Endpoint(
        "POST",
        "/v1/machine/copy",
        "copy_start",
        "Begin to copy a file of the host into the guest",
        _copy_start,
        CopyRequest,
        CopyProgress,
    ),
    Endpoint(
        "GET",
        "/v1/machine/copy",
        "copy_progress",
        "How far the last copy is, or wait for its end",
        lambda machine, query: machine.copy_progress(query.timeout),
        WaitQuery,
        CopyProgress,
    ),
    Endpoint(
        "POST",
        "/v1/machine/copy/cancel",
        "copy_cancel",
        "Give up the copy under way",
        lambda machine, _: machine.copy_cancel(),
    ),
    Endpoint(
        "GET",
        "/v1/machine/services",
        "services",
        "The integration services, switched on or off",
        lambda machine, _: machine.services(),
        result=list[ServiceInfo],
    ),
    Endpoint(
        "POST",
        "/v1/machine/services",
        "set_service",
        "Switch an integration service on or off",
        _set_service,
        ServiceRequest,
    ),
    *backup_api.ENDPOINTS,
    *memory_api.ENDPOINTS,
    *network_api.ENDPOINTS,
    *storage_api.ENDPOINTS,
)


async def _in_thread(function: Callable[[], object]) -> object:
    """*function*'s result, from a daemon thread: one that waits for an event never holds up exit.

    A pool would let enough long polls keep a request to stop waiting.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if future.done():  # the client went away
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            logger.debug("a request outlived the API")

    threading.Thread(target=run, name="api-request", daemon=True).start()
    return await future


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAXIMUM_BODY:
            raise msgspec.ValidationError(f"The body is longer than {MAXIMUM_BODY} bytes")
    return bytes(body)


async def _parameters(endpoint: Endpoint, request: Request) -> object:
    if endpoint.method == "GET":
        return msgspec.convert(dict(request.query_params), endpoint.parameters, strict=False)
    return msgspec.json.decode(await _body(request) or b"{}", type=endpoint.parameters)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=_JSON)


def _call(machine: LiveMachine, endpoint: Endpoint, parameters: object) -> object:
    elsewhere = machine.elsewhere(endpoint.family) if endpoint.family else None
    if elsewhere is None:
        return endpoint.call(machine, parameters)
    return msgspec.Raw(elsewhere(endpoint.name, msgspec.json.encode(parameters).decode()).encode())


def _route(machine: LiveMachine, endpoint: Endpoint) -> Route:
    async def handle(request: Request) -> Response:
        try:
            parameters = await _parameters(endpoint, request)
        except msgspec.MsgspecError as error:
            return _json(Problem(f"{endpoint.name}: {error}."), 400)
        try:
            result = await _in_thread(lambda: _call(machine, endpoint, parameters))
        except HvHostError as error:
            return _json(Problem(str(error)), 409)
        return Response(status_code=204) if result is None else _json(result)

    return Route(endpoint.path, handle, methods=[endpoint.method], name=endpoint.name)


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 description of :data:`ENDPOINTS`."""
    types = [Problem, *(endpoint.parameters for endpoint in ENDPOINTS)]
    types += [endpoint.result for endpoint in ENDPOINTS if endpoint.result is not None]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}

    def content(kind: Any) -> dict[str, Any]:
        return {"content": {_JSON: {"schema": schema_of[repr(kind)]}}}

    operations: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        operation: dict[str, Any] = {
            "operationId": endpoint.name,
            "summary": endpoint.summary,
            "responses": {
                "204" if endpoint.result is None else "200": {
                    "description": "Done.",
                    **({} if endpoint.result is None else content(endpoint.result)),
                },
                "400": {"description": "The parameters are wrong.", **content(Problem)},
                "409": {"description": "The machine cannot do this now.", **content(Problem)},
            },
        }
        if endpoint.parameters is not Nothing:
            if endpoint.method == "GET":
                query = components[endpoint.parameters.__name__]
                required = query.get("required", ())
                operation["parameters"] = [
                    {"name": name, "in": "query", "required": name in required, "schema": schema}
                    for name, schema in query["properties"].items()
                ]
            else:
                operation["requestBody"] = {
                    "required": bool(components[endpoint.parameters.__name__].get("required")),
                    **content(endpoint.parameters),
                }
        operations.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    components.pop(Nothing.__name__, None)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hvhost machine",
            "version": "1",
            "description": "One live machine, served by its worker on a Unix socket.",
        },
        "paths": operations,
        "components": {"schemas": components},
    }


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json(Problem(f"{error.detail}; /openapi.json lists what there is."), error.status_code)


async def _crash(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _json(Problem(f"hvhost failed: {error!r}; the worker's log has more."), 500)


def build(machine: LiveMachine) -> Starlette:
    """The ASGI application for *machine*."""

    async def describe(_: Request) -> Response:
        return _json(openapi())

    return Starlette(
        routes=[
            *(_route(machine, endpoint) for endpoint in ENDPOINTS),
            Route("/openapi.json", describe, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _crash},
    )


class _Uvicorn(uvicorn.Server):
    """Waits to be closed instead of looking ten times a second: an idle worker stays asleep."""

    closed: asyncio.Event

    async def main_loop(self) -> None:
        await self.closed.wait()


class Server:
    """The web server; :meth:`run` blocks its thread, :meth:`close` ends it from any other."""

    def __init__(self, machine: LiveMachine) -> None:
        self._server = _Uvicorn(
            uvicorn.Config(
                build(machine),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        self._loop = asyncio.new_event_loop()
        self._server.closed = asyncio.Event()

    def run(self, listener: socket.socket) -> None:
        """Serve clients of *listener* until closed."""
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[listener]))
        finally:
            self._loop.close()

    def close(self) -> None:
        """End :meth:`run` after the requests being answered."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._server.closed.set)
