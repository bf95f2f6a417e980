"""The row ``file-copy``: what it waits for, and that no guest or host which is wrong passes."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from scripted_guest import FAST

from hvhost.errors import HvHostError
from hvhost.machine.model import CopyProgress
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


class Whole:
    """A guest with files and the host's copies into it; each fault makes one thing go wrong."""

    def __init__(self, *faults: str, daemon: str = filecopy.KERNEL_DAEMON) -> None:
        self.faults, self.daemon = set(faults), daemon
        self.files: dict[str, bytes] = {}
        self.directories = {"/", "/tmp"}
        self.dead = False

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        script = command[-1]
        word, *rest = script.split()
        path = rest[-1] if rest else ""
        if word == "pidof":
            return CommandResult(0, "77\n" if path == self.daemon and not self.dead else "")
        if word == "cat":
            return CommandResult(0, self.files.get(path, b"").decode(errors="replace"))
        if word == "sha256sum":
            digest = hashlib.sha256(self.files.get(path, b"")).hexdigest()
            return CommandResult(0, f"{digest}  {path}\n")
        if word == "stat":
            found = self.files.get(rest[2])
            return CommandResult(1, "") if found is None else CommandResult(0, f"{len(found)}\n")
        if word == "mkdir":
            self.directories.add(rest[1].rstrip(";"))
        elif word == "killall":
            self.dead = True
        elif script.endswith(f"; {self.daemon}"):
            self.dead = "stays-dead" in self.faults
        return CommandResult(0, "")

    def copy(
        self,
        source: Path,
        target: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        data, half = source.read_bytes(), source.read_bytes()[: source.stat().st_size // 2]
        directory = posixpath.dirname(target)
        if self.dead:
            raise HvHostError("The guest cannot create it: its daemon does not run.")
        if directory not in self.directories and not (create_path or "makes-path" in self.faults):
            vague = "vague" in self.faults
            raise HvHostError("It failed." if vague else "Its directory is missing.")
        self.directories.add(directory)
        if target in self.files and not overwrite and "replaces" not in self.faults:
            if "empties" in self.faults:
                self.files[target] = b""
            raise HvHostError("It exists in the guest already.")
        if "/small/" in target and "fits" not in self.faults:
            if "half-on-full" in self.faults:
                self.files[target] = half
            raise HvHostError("The guest's disk became full.")
        try:
            watch(CopyProgress(str(source), target, len(data)))
            watch(CopyProgress(str(source), target, len(data), 0 if "quick" in self.faults else 1))
        except Exception:
            if "half-on-cancel" in self.faults:
                self.files[target] = half
            if "empty-on-cancel" in self.faults:
                self.files[target] = b""
            raise
        if self.dead and "said-whole" not in self.faults:
            vague = "killed-vague" in self.faults
            raise HvHostError("It failed." if vague else "What there is of it is incomplete.")
        if not (target in self.files and "keeps-old" in self.faults):
            self.files[target] = data[:-1] + b"?" if "damaged" in self.faults else data
        return CopyProgress(str(source), target, len(data), len(data), 2.0)


def prove(guest: Whole, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(filecopy, "SIZE", 1 << 20)
    monkeypatch.setattr(filecopy, "LARGE_SIZE", 1 << 20)
    machine = SimpleNamespace(
        info=lambda: SimpleNamespace(file_copy_ready="no-driver" not in guest.faults),
        copy=guest.copy,
    )
    session = SimpleNamespace(
        timing=FAST, machine=machine, step=lambda text: None, running=lambda: guest
    )
    return list(filecopy.prove(cast("Session", session)))


@pytest.mark.parametrize(
    ("daemon", "faults"),
    [
        (filecopy.KERNEL_DAEMON, ()),
        (filecopy.UIO_DAEMON, ()),
        (filecopy.UIO_DAEMON, ("empty-on-cancel",)),  # it can do no better
    ],
)
def test_a_right_guest_works(
    daemon: str, faults: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = prove(Whole(*faults, daemon=daemon), monkeypatch)
    assert "1 MiB at 0.5 MiB/s" in said[0]
    assert f"copied whole with {daemon}" in said[-1]
    assert f"cancelled half-way: {'0 bytes' if faults else 'nothing'} left" in said


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no-driver", "did not open its channel"),
        ("makes-path", "a missing directory: the copy did not fail"),
        ("vague", "a missing directory: the message is 'It failed.'"),
        ("damaged", "took a file, but it is not there"),
        ("replaces", "an existing file: the copy did not fail"),
        ("empties", "a refused copy changed the file"),
        ("keeps-old", "--overwrite did not replace the file"),
        ("fits", "a full disk: the copy did not fail"),
        ("half-on-full", "after a full disk: 524288 bytes left"),
        ("quick", "over before it could be cancelled"),
        ("half-on-cancel", "after a cancelled copy: 524288 bytes left"),
        ("empty-on-cancel", "after a cancelled copy: 0 bytes left"),
        ("said-whole", "killed half-way, but the copy is said to be whole"),
        ("killed-vague", "killed half-way; the message is 'It failed.'"),
        ("stays-dead", "does not take files"),
    ],
)
def test_each_wrong_guest_fails(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RowFailed) as failed:
        prove(Whole(fault), monkeypatch)
    assert said in str(failed.value)


def test_a_file_that_is_damaged_fails(tmp_path: Path) -> None:
    guest, source = Whole("damaged"), tmp_path / "source"
    source.write_bytes(b"file" * 999)
    session = cast("Session", SimpleNamespace(step=lambda text: None, machine=guest))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with pytest.raises(RowFailed, match="is not the one that was copied"):
        list(filecopy._whole(session, cast("Probe", guest), source, digest))
