"""The Python API and the API below it, with a real guest."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
from pathlib import Path

from guest.conftest import GUESTS
from guest.helpers import BOOT_SECONDS, machines_of
from hvhost import HeartbeatStatus, Machine
from hvhost.guests.build import GuestImages


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("machine", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def check_description(path: Path) -> int:
    """Everything that can be got without parameters is what the API says; how much that was."""
    connection = Connection(path)

    def get(path: str) -> tuple[int, object]:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    status, description = get("/openapi.json")
    assert status == 200
    assert isinstance(description, dict)
    assert description["openapi"].startswith("3.")
    got = 0
    for route, operations in description["paths"].items():
        read = operations.get("get")
        if read is None or any(p["required"] for p in read.get("parameters", ())):
            continue
        status, body = get(route)
        assert status in (200, 409), (route, body)
        schema = read["responses"][str(status)]["content"]["application/json"]["schema"]
        if "$ref" in schema:
            named = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            assert isinstance(body, dict)
            assert set(named.get("required", ())) <= body.keys(), route
        else:
            assert schema["type"] == "array", route
            assert isinstance(body, list)
        got += 1
    connection.close()
    return got


def test_a_machine_in_a_program(one: GuestImages, runtime: Path) -> None:
    """Driven by Python; and the API below, asked by a client that knows its description alone."""
    before = machines_of(runtime)

    async def program() -> list[str]:
        async with await Machine.start(guest=GUESTS[0], cpus=2, command_line="quiet") as machine:
            info = await machine.wait_heartbeat(HeartbeatStatus.OK, timeout=BOOT_SECONDS)
            assert info.vmbus_version is not None
            console = machine.console
            await console.expect("Please press Enter", timeout=BOOT_SECONDS)
            console.send_line("")
            await console.expect("# ", timeout=BOOT_SECONDS)
            console.send_line("uname -r")
            release = await console.expect(re.escape(one.release))
            assert release[0] == one.release
            again = await Machine.attach(machine.name)
            assert (await again.info()).pid == info.pid
            await again.close()
            assert min(await machine.measure_heartbeats(10)) > 0
            path = runtime / "machines" / machine.name / "api.sock"
            assert await asyncio.to_thread(check_description, path) >= 2
            assert min(await machine.measure_heartbeats(1)) > 0, "it did not mind"
            await machine.shut_down()
            await machine.wait_stopped(timeout=BOOT_SECONDS)
            return [event.kind async for event in machine.events()]

    kinds = asyncio.run(program())
    assert kinds[0] == "started"
    assert "sleep" in kinds
    assert machines_of(runtime) <= before
