"""``hvhost copy``, ``services`` and ``exec`` against a worker without a virtual machine."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.guests.probe import ProbeClient
from hvhost.machine.model import MachineConfig
from hvhost.manager import probe as probe_module
from hvhost.manager.client import MachineClient
from hvhost.manager.launcher import launch

__all__ = ["hvhost"]


def begin(config: MachineConfig, command_line: str = "") -> None:
    launch(replace(config, command_line=command_line), detach=True)


def test_copy(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    begin(config)
    done = hvhost("copy", "m1", config.kernel, "/boot/", "--create-path", "--overwrite")
    assert (done.status, done.err) == (0, "")
    assert done.out == "Copied 1000 B to /boot/ in 2.0 s (500 B/s).\n"
    done = hvhost("copy", "m1", config.kernel, "/boot/", "--json")
    told = json.loads(done.out)
    assert (told["destination"], told["copied"], told["state"]) == ("/boot/", 1000, "done")


def test_copies_that_fail(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    begin(config, "full")
    assert hvhost.sentence("copy", "m1", config.kernel, "/x") == "The guest's disk became full."
    assert hvhost("copy", "m1", "/nowhere", "/x").status == 2


def test_a_copy_that_is_interrupted_is_cancelled(runtime: Path, config: MachineConfig) -> None:
    begin(config, "slow-copy")
    client = MachineClient("m1")

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.copy(Path(config.kernel), "/x", watch=interrupt)
    assert "cancelled after 600" in str(client.copy_progress().error)


def test_a_copy_on_a_terminal_shows_how_far_it_is_until_it_is_interrupted(
    runtime: Path, config: MachineConfig
) -> None:
    begin(config, "slow-copy")
    person, terminal = os.openpty()
    command = [sys.executable, "-P", "-m", "hvhost", "copy", "m1", config.kernel, "/x"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        seen = b""
        while b"600/1" not in seen:
            assert select.select([person], [], [], 60)[0], seen
            seen += os.read(person, 1000)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    os.close(person)
    assert "cancelled after 600" in str(MachineClient("m1").copy_progress().error)


def test_services(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    begin(config)
    shown = hvhost("services", "m1", "--disable", "heartbeat", "--disable", "sockets")
    assert shown.status == 0
    lines = [line.split() for line in shown.out.splitlines() if line.strip()]
    assert ["heartbeat", "off"] in lines and ["file-copy", "on", "open", "ready"] in lines
    again = json.loads(hvhost("services", "m1", "--enable", "heartbeat", "--json").out)
    assert {each["name"]: each["enabled"] for each in again} == {
        "heartbeat": True,
        "file-copy": True,
        "sockets": False,
    }
    assert "no service 'vss'" in hvhost.sentence("services", "m1", "--enable", "vss")


class FakeProbe:
    def __init__(self, status: int) -> None:
        self.status = status
        self.asked: list[str] = []
        self.closed = False

    def follow(self, arguments: list[str], output: Callable[[bool, bytes], None]) -> int:
        self.asked = arguments
        output(False, b"to output\n")
        output(True, b"to errors\n")
        return self.status

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("ending", "status"), [(0, 0), (7, 7), (-9, 137)])
def test_exec(
    hvhost: Hvhost,
    runtime: Path,
    config: MachineConfig,
    monkeypatch: pytest.MonkeyPatch,
    ending: int,
    status: int,
) -> None:
    begin(config)
    probe = FakeProbe(ending)
    monkeypatch.setattr(probe_module, "connect_probe", lambda directory: probe)
    for words in (["--", "ls", "-h"], ["ls", "-h"]):
        result = hvhost("exec", "m1", *words)
        assert (result.status, result.out, result.err) == (status, "to output\n", "to errors\n")
        assert probe.asked == ["ls", "-h"] and probe.closed
    assert "say what to run" in hvhost.sentence("exec", "m1", "--")


def test_a_guest_without_a_probe(
    hvhost: Hvhost, runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(config)  # it has no sockets, and nobody answers on its serial port
    wait = ProbeClient.wait_ready
    monkeypatch.setattr(
        ProbeClient, "wait_ready", lambda self, timeout, drivers: wait(self, 0.1, drivers=drivers)
    )
    assert "does not carry hvhost's probe" in hvhost.sentence("exec", "m1", "--", "ls")


def test_a_paused_guest_runs_nothing(hvhost: Hvhost, runtime: Path, config: MachineConfig) -> None:
    begin(config)
    assert hvhost("pause", "m1").status == 0
    assert "'m1' is paused; `hvhost resume m1`" in hvhost.sentence("exec", "m1", "--", "ls")
