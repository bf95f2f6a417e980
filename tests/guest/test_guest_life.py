"""A machine's life from the command line, with a real guest in it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guest.conftest import GUESTS
from guest.helpers import BOOT_SECONDS, command, hvhost, machines_of, processes_of, wait_for
from hvhost.guests.build import GuestImages
from hvhost.verify.rows.nmi import nmi_panic

READY = "hvhost-guest: ready"


def info(name: str) -> dict[str, Any]:
    result = hvhost("info", name, "--json")
    assert result.returncode == 0, result.stderr
    account: dict[str, Any] = json.loads(result.stdout)
    return account


def names() -> list[str]:
    return [machine["name"] for machine in json.loads(hvhost("ps", "--json").stdout)]


@pytest.fixture
def detached(one: GuestImages, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a machine from ``hvhost run --detach`` whose shutdown service is ready."""
    name = f"t-{request.node.name[5:30]}".rstrip("-_[")
    append = "panic=0 quiet unknown_nmi_panic=1"
    result = hvhost("run", "--guest", GUESTS[0], "--name", name, "--append", append, "--detach")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{name}\n"
    try:
        wait_for("the shutdown service", lambda: info(name)["shutdown_ready"], BOOT_SECONDS)
        yield name
    finally:
        if name in names():
            hvhost("stop", "--force", name)


def await_ready(name: str) -> None:
    """Read the console until the guest's init has done all; it begins with what was said before.

    Its end here is not the machine's.
    """
    with subprocess.Popen(
        command("console", name), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as console:
        assert console.stdout is not None
        seen = b""
        while READY.encode() not in seen:
            data = os.read(console.stdout.fileno(), 4096)
            assert data, seen
            seen += data
        console.terminate()


def test_what_can_be_asked_and_done_by_name(detached: str, runtime: Path) -> None:
    account = info(detached)
    assert account["state"] == "running"
    assert account["vmbus_version"] in ("5.2", "5.3")
    assert account["guest_os_id"] >> 56 == 0x81, "Linux says so of itself"
    assert account["boots"] == 1
    assert {"heartbeat", "shutdown"} <= {
        channel["name"] for channel in account["channels"] if channel["state"] == "open"
    }
    assert detached in hvhost("ps").stdout
    shown = hvhost("info", detached).stdout
    assert account["vmbus_version"] in shown
    await_ready(detached)
    second = hvhost("run", "--guest", GUESTS[0], "--name", detached, "--detach")
    assert second.returncode == 1
    assert f"machine '{detached}' is running already" in second.stderr
    assert hvhost("restart", detached).returncode == 0
    assert info(detached)["boots"] == 2
    wait_for("the shutdown service", lambda: info(detached)["shutdown_ready"], BOOT_SECONDS)
    started = time.monotonic()
    result = hvhost("stop", detached)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 30
    assert detached not in names()
    place = f"/machines/{detached}/"
    assert not [line for line in processes_of(runtime).values() if place in line]
    late = hvhost("info", detached)
    assert late.returncode == 1
    assert "there is no running machine" in late.stderr


def test_nmi_and_force(detached: str) -> None:
    # A processor deep in init's work has a trace that leaves no room for what the panic is.
    await_ready(detached)
    assert hvhost("nmi", detached).returncode == 0
    wait_for("the crash", lambda: info(detached)["state"] == "crashed")
    account = info(detached)
    assert nmi_panic(account["crash"]["text"]), account["crash"]["text"]
    assert account["heartbeat"] == "crashed"
    refused = hvhost("stop", detached)
    assert refused.returncode == 1
    assert "stop --force" in refused.stderr
    assert hvhost("restart", "--force", detached).returncode == 0
    wait_for("ok", lambda: info(detached)["heartbeat"] == "ok", BOOT_SECONDS)
    assert info(detached)["crash"] is None
    assert hvhost("stop", "--force", detached).returncode == 0
    assert detached not in names()


def test_a_foreground_machine_is_driven_through_a_pipe(runtime: Path) -> None:
    before = machines_of(runtime)
    with subprocess.Popen(
        command("run", "--guest", GUESTS[0], "--append", "quiet"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = b""
        try:
            for expected, typed in (
                (b"Please press Enter", b"\n"),
                (b"# ", b"echo 6 times 7 is $((6 * 7))\n"),
                (b"6 times 7 is 42", b"poweroff\n"),
            ):
                while expected not in seen:
                    data = os.read(process.stdout.fileno(), 4096)
                    assert data, (seen, process.stderr and process.stderr.read())
                    seen += data
                process.stdin.write(typed)
                process.stdin.flush()
            _, errors = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert machines_of(runtime) <= before, "a foreground machine leaves nothing"
