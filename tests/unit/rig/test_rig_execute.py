"""``hvhost rig exec``: the command's streams between QEMU's sockets and ours."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from hvhost.errors import HvHostError
from hvhost.rig import execute, qemu


class Emulator:
    """The far ends of the streams, and a process in the place of QEMU's."""

    def __init__(self, directory: Path) -> None:
        pairs = {name: socket.socketpair() for name in execute.STREAMS}
        self.near = {name: pair[0] for name, pair in pairs.items()}
        self.far = {name: pair[1] for name, pair in pairs.items()}
        self.console = directory / "console"
        self.console.write_bytes(b"booting\nKernel panic\n")
        self.process = subprocess.Popen(["/bin/sleep", "600"])

    def relay(self) -> int:
        return execute._Streams(self.near).relay(self.process, self.console)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for each in (*self.near.values(), *self.far.values()):
            each.close()


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    one = Emulator(tmp_path)
    yield one
    one.close()


def test_output_that_comes_after_the_status_is_not_lost(
    emulator: Emulator, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    emulator.far["status"].sendall(b"started\n3\n")
    emulator.far["stdout"].sendall(b"said")
    late = threading.Timer(0.1, emulator.far["stderr"].sendall, [b"last words"])
    late.start()
    assert emulator.relay() == 3
    late.join()
    assert capsysbinary.readouterr() == (b"said", b"last words")


def test_a_command_that_takes_its_time_is_waited_for(emulator: Emulator) -> None:
    late = threading.Timer(1.5, emulator.far["status"].sendall, [b"0\n"])  # a look takes 1 s
    late.start()
    assert emulator.relay() == 0
    late.join()


@pytest.mark.usefixtures("capsysbinary")
def test_what_a_command_left_behind_may_go_on_talking(emulator: Emulator) -> None:
    enough = threading.Event()
    timer = threading.Timer(10.0, enough.set)

    def talk() -> None:
        with contextlib.suppress(OSError):
            while not enough.wait(0.01):
                emulator.far["stdout"].sendall(b"more\n")

    thread = threading.Thread(target=talk)
    thread.start()
    timer.start()
    emulator.far["status"].sendall(b"started\n0\n")
    assert emulator.relay() == 0
    assert not enough.is_set(), "it ended only when the other did"
    timer.cancel()
    enough.set()
    thread.join()


def test_a_rig_that_ends_first_is_told_by_its_last_line(emulator: Emulator) -> None:
    emulator.process.kill()
    emulator.process.wait()
    emulator.far["status"].sendall(b"started\n")
    with pytest.raises(HvHostError, match="ended before the command did: Kernel panic"):
        emulator.relay()


def test_a_rig_that_hangs_before_the_command_is_told(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "START_SECONDS", 0.1)
    with pytest.raises(HvHostError) as caught:
        emulator.relay()
    assert str(caught.value) == (
        "the rig hangs: after 0 s it had not started the command; its last line is: Kernel panic"
    )


def test_a_command_that_has_begun_has_no_limit(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "START_SECONDS", 0.5)
    emulator.far["status"].sendall(b"started\n")
    late = threading.Timer(1.5, emulator.far["status"].sendall, [b"0\n"])  # a look takes 1 s
    late.start()
    assert emulator.relay() == 0
    late.join()


class Emulators:
    """In the place of QEMU: *hanging* ones connect and say nothing, the next runs the command."""

    def __init__(self, hanging: int) -> None:
        self.hanging = hanging
        self.started: list[subprocess.Popen[bytes]] = []
        self.sockets: list[socket.socket] = []

    def start(self, arguments: list[str], stdout: IO[bytes]) -> subprocess.Popen[bytes]:
        stdout.write(b"booting\n")
        stdout.flush()
        for stream in execute.STREAMS:
            (path,) = re.findall(f"id={stream},path=(\\S+)", " ".join(arguments))
            self.sockets.append(socket.socket(socket.AF_UNIX))
            self.sockets[-1].connect(path)
        if len(self.started) >= self.hanging:
            self.sockets[-1].sendall(b"started\n4\n")  # the status is the last
        self.started.append(subprocess.Popen(["/bin/sleep", "600"]))
        return self.started[-1]

    def close(self) -> None:
        for each in self.sockets:
            each.close()


Play = Callable[[int], tuple[Emulators, list[str], Callable[[], int]]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Runs a command where so many emulators hang: they, what is told, and the run."""
    made: list[Emulators] = []
    handler = signal.getsignal(signal.SIGTERM)

    def begin(hanging: int) -> tuple[Emulators, list[str], Callable[[], int]]:
        (tmp_path / "base").write_bytes(b"")
        made.append(Emulators(hanging))
        told: list[str] = []
        monkeypatch.setattr(execute, "_base_image", lambda _: (tmp_path, tmp_path / "base"))
        monkeypatch.setattr(qemu, "start", made[-1].start)
        monkeypatch.setattr(execute, "START_SECONDS", 0.1)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return made[-1], told, lambda: execute.execute(["true"], progress=told.append)

    yield begin
    signal.signal(signal.SIGTERM, handler)
    for each in made:
        each.close()


@pytest.mark.usefixtures("capsysbinary")
def test_a_rig_that_hung_is_ended_and_another_runs_the_command(play: Play, tmp_path: Path) -> None:
    emulators, told, run = play(1)
    assert run() == 4
    (line,) = told
    assert line.startswith("the rig hangs") and line.endswith("booting; trying again")
    assert [each.poll() for each in emulators.started] == [-signal.SIGKILL] * 2
    assert not [*tmp_path.glob("hvhost-exec-*")]


def test_rigs_that_all_hang_are_a_sentence_and_leave_nothing(play: Play, tmp_path: Path) -> None:
    emulators, told, run = play(9)
    with pytest.raises(HvHostError, match="the rig hangs"):
        run()
    assert len(told) + 1 == len(emulators.started) == execute.START_ATTEMPTS
    assert all(each.poll() == -signal.SIGKILL for each in emulators.started)
    assert not [*tmp_path.glob("hvhost-exec-*")]


def test_standard_input_goes_to_the_command_from_its_start_on(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"typed")
    os.close(writing)
    with os.fdopen(reading) as typed:
        monkeypatch.setattr(sys, "stdin", typed)
        received: list[bytes] = []

        def command() -> None:
            emulator.far["stdin"].settimeout(10)
            while data := emulator.far["stdin"].recv(100):
                received.append(data)
            emulator.far["status"].sendall(b"0\n")

        thread = threading.Thread(target=command)
        thread.start()
        emulator.far["status"].sendall(b"started\n")
        assert emulator.relay() == 0
        thread.join()
    assert b"".join(received) == b"typed"
