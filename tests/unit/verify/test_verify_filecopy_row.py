"""The row ``file-copy``: how it waits for a daemon, which registers in its own time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from scripted_guest import FAST

from hvhost.errors import HvHostError
from hvhost.verify.guest import CommandResult, Probe, RowFailed
from hvhost.verify.rows import filecopy
from hvhost.verify.session import Session


@dataclass
class Guest:
    """A guest whose daemon appears, and takes files, after so many looks."""

    appears: int = 0
    takes: int = 0
    keeps: bool = True
    pids: str = "77"
    files: dict[str, str] = field(default_factory=dict)

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        script = command[-1]
        if script.startswith("pidof"):
            self.appears -= script.endswith(filecopy.KERNEL_DAEMON)
            there = self.appears < 0 and script.endswith(filecopy.KERNEL_DAEMON)
            return CommandResult(0, f"{self.pids}\n" if there else "")
        if script.startswith("cat"):
            return CommandResult(0, self.files.get(script[4:], ""))
        return CommandResult(0, "")

    def copy(self, source: Path, destination: str, **flags: bool) -> None:
        self.takes -= 1
        if self.takes >= 0:
            raise HvHostError("The guest cannot create it: its daemon does not run.")
        if self.keeps:
            self.files[destination] = source.read_text()


Parts = tuple[Session, Probe, Path]


@pytest.fixture
def parts(tmp_path: Path) -> Callable[[Guest], Parts]:
    def build(guest: Guest) -> Parts:
        source = tmp_path / "other"
        source.write_text("another file")
        info = SimpleNamespace(file_copy_ready=True)
        machine = SimpleNamespace(info=lambda: info, copy=guest.copy)
        session = SimpleNamespace(timing=FAST, machine=machine, step=lambda text: None)
        return cast("Session", session), cast("Probe", guest), source

    return build


def test_a_daemon_that_registers_late_is_waited_for(parts: Callable[[Guest], Parts]) -> None:
    guest = Guest(appears=2, takes=3)
    session, probe, source = parts(guest)
    assert filecopy._running_daemon(session, probe) == filecopy.KERNEL_DAEMON
    filecopy._await_daemon(session, probe, source)
    assert guest.takes == -1


def test_a_daemon_that_never_comes_fails(parts: Callable[[Guest], Parts]) -> None:
    session, probe, source = parts(Guest(appears=10**6, takes=10**6))
    with pytest.raises(RowFailed, match="no file copy daemon runs"):
        filecopy._running_daemon(session, probe)
    with pytest.raises(RowFailed, match="does not take files") as failed:
        filecopy._await_daemon(session, probe, source)
    assert "its daemon does not run" in failed.value.evidence[0]


def test_two_daemons_fail(parts: Callable[[Guest], Parts]) -> None:
    session, probe, _ = parts(Guest(pids="77 78"))
    with pytest.raises(RowFailed, match=r"^2 file copy daemons run"):
        filecopy._running_daemon(session, probe)


def test_a_file_that_is_taken_must_be_there(parts: Callable[[Guest], Parts]) -> None:
    session, probe, source = parts(Guest(keeps=False))
    with pytest.raises(RowFailed, match="took a file, but it is not there"):
        filecopy._await_daemon(session, probe, source)
