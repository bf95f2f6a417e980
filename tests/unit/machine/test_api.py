from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_machine import FakeMachine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.machine import application
from hvhost.machine.api import ApiServer
from hvhost.machine.application import ENDPOINTS, MAXIMUM_BODY, openapi
from hvhost.machine.model import MachineConfig, MachineEvent, MachineInfo


class Api:
    """A served machine and a plain HTTP client for it."""

    def __init__(self, path: Path, command_line: str = "") -> None:
        self.path = path
        config = MachineConfig(name="m", kernel="/boot/vmlinuz", command_line=command_line)
        self.machine = FakeMachine(config)
        self.server = ApiServer(self.machine, path)
        self.server.start()

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("machine")
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(20)
        connection.sock.connect(str(self.path))
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def refusal(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
        status, answer = self.ask(method, path, body)
        problem = json.loads(answer)
        assert list(problem) == ["error"]
        return status, problem["error"]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "api.sock")
    yield api
    api.server.close()


def test_info_is_the_machines_own(api: Api) -> None:
    status, answer = api.ask("GET", "/v1/machine")
    assert status == 200
    info = msgspec.json.decode(answer, type=MachineInfo)
    assert (info.name, info.heartbeat, info.channels[0].name) == ("m", "ok", "heartbeat")


def test_only_the_owner_may_connect(api: Api) -> None:
    assert stat.S_IMODE(api.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("path", "body", "call"),
    [
        ("shutdown", None, "shut_down power-off"),
        ("shutdown", b'{"action":"reboot"}', "shut_down reboot"),
        ("stop", None, "force_stop"),
        ("reset", None, "reset"),
        ("nmi", b"{}", "nmi"),
        ("pause", None, "pause"),
        ("resume", None, "resume"),
    ],
)
def test_actions_reach_the_machine(api: Api, path: str, body: bytes | None, call: str) -> None:
    assert api.ask("POST", f"/v1/machine/{path}", body) == (204, b"")
    assert api.machine.calls[0] == call


def test_a_hung_machine_says_where_its_processors_spin(api: Api) -> None:
    where = [{"index": 0, "state": "running", "rip": 0xFFFFFFFF81234567, "rflags": 0x46, "ring": 0}]
    status, answer = api.ask("POST", "/v1/machine/debug/hang")
    assert (status, json.loads(answer)) == (200, where)
    assert api.machine.calls[0] == "hang"
    status, answer = api.ask("GET", "/v1/machine/debug/processors")
    assert (status, json.loads(answer)) == (200, where)


def test_heartbeats_are_measured(api: Api) -> None:
    status, answer = api.ask("POST", "/v1/machine/heartbeat/measure", b'{"count":3}')
    assert (status, json.loads(answer)) == (200, {"seconds": [0.001] * 3})


def test_a_time_sync_says_how_long_it_took(api: Api) -> None:
    status, answer = api.ask("POST", "/v1/machine/time/sync")
    assert (status, json.loads(answer)) == (200, {"seconds": 0.0005})


def test_a_clock_in_the_guests_memory_is_watched(api: Api) -> None:
    status, answer = api.ask("POST", "/v1/machine/debug/clock", b'{"address":7,"count":2}')
    assert (status, json.loads(answer)) == (200, [{"host": 1000, "guest": 1007, "error": 5}] * 2)


def test_key_value_pairs(api: Api) -> None:
    path = "/v1/machine/kvp"
    for body in (b'{"key":"a","value":"1"}', b'{"key":"b","value":"2","pool":"guest"}'):
        assert api.ask("POST", f"{path}/set", body) == (204, b"")
    external, guest = (
        {"pool": "external", "key": "a", "value": "1"},
        {"pool": "guest", "key": "b", "value": "2"},
    )
    assert json.loads(api.ask("GET", path)[1]) == [external, guest]
    assert json.loads(api.ask("GET", f"{path}?pool=guest")[1]) == [guest]
    assert json.loads(api.ask("GET", f"{path}/item?key=b")[1]) == guest
    assert api.refusal("GET", f"{path}/item?key=b&pool=external")[0] == 409
    assert api.refusal("GET", f"{path}/item")[0] == 400
    assert api.refusal("GET", f"{path}?pool=other")[0] == 400
    assert api.ask("POST", f"{path}/delete", b'{"key":"a"}') == (204, b"")
    assert json.loads(api.ask("GET", path)[1]) == [guest]


def test_addresses(api: Api) -> None:
    status, answer = api.ask("GET", "/v1/machine/ip?adapter=00:15:5D:00:00:01")
    assert (status, json.loads(answer)["addresses"]) == (200, "192.0.2.7")
    assert api.refusal("POST", "/v1/machine/ip/set", b'{"adapter":"{1}"}')[0] == 409
    assert api.refusal("POST", "/v1/machine/ip/set", b"{}")[0] == 400


def test_what_must_be_given_is_described_so() -> None:
    paths = openapi()["paths"]
    (key, pool) = paths["/v1/machine/kvp/item"]["get"]["parameters"]
    assert (key["name"], key["required"], pool["required"]) == ("key", True, False)
    assert paths["/v1/machine/kvp/set"]["post"]["requestBody"]["required"] is True
    assert paths["/v1/machine/shutdown"]["post"]["requestBody"]["required"] is False


def test_what_the_machine_refuses_is_a_conflict(tmp_path: Path) -> None:
    api = Api(tmp_path / "api.sock", "no-heartbeat")
    status, sentence = api.refusal("POST", "/v1/machine/heartbeat/measure")
    assert status == 409
    assert "load hv_utils" in sentence
    api.server.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "named"),
    [
        ("POST", "shutdown", b'{"action":"explode"}', "explode"),
        ("POST", "shutdown", b'{"acton":"reboot"}', "acton"),
        ("POST", "shutdown", b"{", "shutdown"),
        ("POST", "shutdown", b"[]", "array"),
        ("POST", "shutdown", b"\xff", "shutdown"),
        ("POST", "heartbeat/measure", b'{"count":0}', "count"),
        ("POST", "heartbeat/measure", b'{"count":1000000}', "count"),
        ("POST", "heartbeat/measure", b'{"count":"many"}', "count"),
        ("POST", "nmi", b'{"vp":1}', "vp"),
        ("POST", "nmi", b" " * (MAXIMUM_BODY + 1), "longer"),
        ("GET", "events?after=x", None, "after"),
        ("GET", "events?after=-1", None, "after"),
        ("GET", "events?timeout=nan", None, "timeout"),
        ("GET", "events?timeout=301", None, "timeout"),
        ("GET", "events?until=3", None, "until"),
    ],
)
def test_wrong_parameters_are_named(
    api: Api, method: str, path: str, body: bytes | None, named: str
) -> None:
    status, sentence = api.refusal(method, f"/v1/machine/{path}", body)
    assert status == 400
    assert named in sentence
    assert not api.machine.calls


def test_what_is_not_there_says_where_to_look(api: Api) -> None:
    assert api.refusal("GET", "/v1/nothing")[0] == 404
    assert api.refusal("DELETE", "/v1/machine")[0] == 405
    assert "/openapi.json" in api.refusal("GET", "/")[1]


def test_a_bug_answers_and_is_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    api.machine.nmi = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        assert api.refusal("POST", "/v1/machine/nmi")[0] == 500
    assert "POST /v1/machine/nmi failed" in caplog.text
    assert api.ask("GET", "/v1/machine")[0] == 200


def test_events_wait_for_the_next_one(api: Api) -> None:
    status, answer = api.ask("GET", "/v1/machine/events")
    events = msgspec.json.decode(answer, type=list[MachineEvent])
    assert (status, [event.kind for event in events]) == (200, ["started"])
    assert api.ask("GET", "/v1/machine/events?after=1&timeout=0.05") == (200, b"[]")

    answers: list[tuple[int, bytes]] = []
    path = "/v1/machine/events?after=1&timeout=20"
    waiting = threading.Thread(target=lambda: answers.append(api.ask("GET", path)))
    waiting.start()
    time.sleep(0.1)
    assert not answers
    api.machine.post("crash", "Kernel panic")
    waiting.join(10)
    assert json.loads(answers[0][1])[0]["detail"] == "Kernel panic"


def test_many_waiting_clients_do_not_keep_a_stop_waiting(api: Api) -> None:
    path = "/v1/machine/events?after=1&timeout=20"
    threads = [threading.Thread(target=lambda: api.ask("GET", path)) for _ in range(60)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert api.ask("POST", "/v1/machine/stop")[0] == 204  # and its event frees all of them
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_close_ends_what_waits_and_removes_the_socket(tmp_path: Path) -> None:
    api = Api(tmp_path / "api.sock")
    ended = threading.Event()

    def wait() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            api.ask("GET", "/v1/machine/events?after=1&timeout=60")
        ended.set()

    threading.Thread(target=wait).start()
    time.sleep(0.2)
    api.server.close()
    assert ended.wait(3)
    assert not api.path.exists()
    api.server.close()


def test_close_before_any_client(tmp_path: Path) -> None:
    before = threading.active_count()
    api = Api(tmp_path / "api.sock")
    api.server.close()
    assert threading.active_count() == before
    assert not api.path.exists()


class LateApplication(ModuleType):
    """In the place of the module with the web server, which it notices to be taken."""

    def __init__(self, taken: Callable[[], object]) -> None:
        super().__init__("hvhost.machine.application")
        self.served = 0
        self._taken = taken

    def __getattr__(self, name: str) -> Any:
        if name != "Server":
            raise AttributeError(name)
        self._taken()
        return lambda machine: SimpleNamespace(run=self._serve, close=lambda: None)

    def _serve(self, listener: socket.socket) -> None:
        self.served += 1


def test_a_close_before_any_client_imports_no_web_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    late = LateApplication(lambda: taken.append(1))
    monkeypatch.setitem(sys.modules, late.__name__, late)
    Api(tmp_path / "api.sock").server.close()
    assert taken == []


def test_a_close_while_the_web_server_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Api] = []
    closers: list[threading.Thread] = []

    def taken() -> None:
        server = made[0].server
        closers.append(threading.Thread(target=server.close))
        closers[0].start()
        while not server._closing:
            time.sleep(0.001)

    late = LateApplication(taken)
    monkeypatch.setitem(sys.modules, late.__name__, late)
    made.append(Api(tmp_path / "api.sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(made[0].path))
        made[0].server._thread.join(10)
    closers[0].join(10)
    assert late.served == 0 and not made[0].path.exists()


def test_what_is_in_another_process_is_asked_there(api: Api) -> None:
    def elsewhere(name: str, parameters: str) -> str:
        if name == "drive_remove":
            raise HvHostError("there is no such drive.")
        return json.dumps({"name": name, "parameters": json.loads(parameters)})

    api.machine.storage_elsewhere = elsewhere
    status, answer = api.ask("GET", "/v1/machine/drives")
    assert (status, json.loads(answer)) == (200, {"name": "drives", "parameters": {}})
    status, answer = api.ask("GET", "/v1/machine/backup?timeout=2")
    assert (status, json.loads(answer)["parameters"]) == (200, {"timeout": 2.0})
    status, _ = api.refusal("POST", "/v1/machine/drives/eject", b"{}")
    assert status == 400, "parameters are checked before they are sent"
    refused = api.refusal("POST", "/v1/machine/drives/remove", b'{"address":"scsi0:9"}')
    assert refused == (409, "there is no such drive.")


def test_close_without_start(tmp_path: Path) -> None:
    machine = FakeMachine(MachineConfig(name="m", kernel="k"))
    ApiServer(machine, tmp_path / "api.sock").close()


def test_an_idle_server_sleeps(api: Api) -> None:
    """The kernel counts how often the server's thread gave up the processor by itself."""
    assert api.ask("GET", "/v1/machine")[0] == 200
    [server] = [thread for thread in threading.enumerate() if thread.name == "api"]

    def waits() -> int:
        status = Path(f"/proc/self/task/{server.native_id}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    time.sleep(0.2)
    before = waits()
    time.sleep(0.6)
    assert waits() - before <= 1


def test_a_worker_imports_no_web_server_before_its_first_client(tmp_path: Path) -> None:
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_machine import FakeMachine
from hvhost.machine.api import ApiServer
from hvhost.machine.model import MachineConfig
from hvhost.machine.serial import SerialSocket
server = ApiServer(FakeMachine(MachineConfig(name="m", kernel="k")), {str(tmp_path / "a")!r})
server.start()
time.sleep(0.1)
heavy = {{"asyncio", "starlette", "uvicorn", "msgspec", "httpx", "http.client", "typer", "rich"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
server.close()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def test_the_description_is_whole(api: Api) -> None:
    status, answer = api.ask("GET", "/openapi.json")
    document = json.loads(answer)
    assert status == 200
    assert document["openapi"].startswith("3.1.")
    assert document == json.loads(json.dumps(openapi()))
    described = {
        (method.upper(), path, operation["operationId"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert described == {(each.method, each.path, each.name) for each in ENDPOINTS}
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    assert {"MachineInfo", "MachineEvent", "CrashReport", "Problem"} <= set(schemas)
    parameters = document["paths"]["/v1/machine/events"]["get"]["parameters"]
    assert [parameter["name"] for parameter in parameters] == ["after", "timeout"]
    assert parameters[0]["schema"]["minimum"] == 0
    assert set(schemas["MachineInfo"]["properties"]) == set(MachineInfo.__dataclass_fields__)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from([each.path for each in ENDPOINTS if each.method == "POST"]),
    body=st.binary(max_size=40) | st.sampled_from([b'{"count":1e9}', b'{"action":null}', b"null"]),
)
def test_any_body_gets_an_answer(api: Api, path: str, body: bytes) -> None:
    status, answer = api.ask("POST", path, body)
    assert status in (200, 204, 400, 409)
    assert (status >= 400) == (b'"error"' in answer)


def test_the_answer_for_a_client_that_went_away_is_dropped() -> None:
    going = threading.Event()
    broken: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: broken.append(what))
        waiting = asyncio.create_task(application._in_thread(going.wait))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        threads = [each for each in threading.enumerate() if each.name == "api-request"]
        going.set()
        for each in threads:
            each.join(10)
        await asyncio.sleep(0)  # what the threads asked for
        await asyncio.sleep(0)

    asyncio.run(main())
    assert not broken
