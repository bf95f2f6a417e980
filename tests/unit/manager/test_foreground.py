from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.manager import foreground, forked
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.launcher import launch
from hvhost.manager.terminal import Ending
from manager.stand_in import live_as

MAIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from manager.stand_in import FAKE_WORKER, live_as
from hvhost.cli.main import main
from hvhost.manager import forked
forked.live = live_as(FAKE_WORKER)
main()
"""


def run(
    config: MachineConfig,
    typed: bytes,
    printed: list[bytes] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Ending:
    """A run with *typed* piped into it; what it prints is added to *printed*."""
    source, typing = os.pipe()
    reading, sink = os.pipe()
    os.write(typing, typed)
    os.close(typing)

    def collect() -> None:
        with os.fdopen(reading, "rb") as file:
            output = file.read()
        if printed is not None:
            printed.append(output)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        return foreground.run(config, source=source, sink=sink, progress=progress)
    finally:
        os.close(sink)
        os.close(source)
        thread.join()


def test_it_ends_with_the_guest_and_leaves_nothing(runtime: Path, config: MachineConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    printed: list[bytes] = []
    assert run(config, b"poweroff", printed) is Ending.CLOSED
    assert printed == [b"fake guest up\r\npoweroffbye\r\n"]
    assert not MachineDirectory.of("m1").path.exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("words", "typed", "said"),
    [
        ("", b"die", "the guest broke; mend it"),
        ("fail", b"", "no KVM here"),
        ("fail-late", b"", "never had a chance"),
    ],
)
def test_a_machine_that_fails_leaves_its_words_and_no_more(
    runtime: Path, config: MachineConfig, words: str, typed: bytes, said: str
) -> None:
    with pytest.raises(HvHostError, match=said):
        run(replace(config, command_line=words), typed)
    assert not MachineDirectory.of("m1").path.exists()


def test_a_log_that_an_error_names_stays(runtime: Path, config: MachineConfig) -> None:
    log = MachineDirectory.of("m1").log_file
    with pytest.raises(HvHostError, match=f"without a word; {log} has its log"):
        run(replace(config, command_line="fail-silently"), b"")
    assert log.exists()


def test_nothing_is_left_when_the_output_closes(runtime: Path, config: MachineConfig) -> None:
    source, typing = os.pipe()
    reading, sink = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        foreground.run(config, source=source, sink=sink)
    for descriptor in (source, typing, sink):
        os.close(descriptor)
    assert not MachineDirectory.of("m1").path.exists()


def test_what_another_machine_has_is_not_removed(
    runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = launch(config, detach=True)
    removed: list[MachineDirectory] = []
    monkeypatch.setattr(MachineDirectory, "remove", removed.append)
    with pytest.raises(HvHostError, match="is running already"):
        run(config, b"")
    assert not removed
    worker.stop()


@pytest.mark.parametrize(
    ("how", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGHUP, -1)],
)
def test_a_signal_ends_the_machine_too(
    runtime: Path, config: MachineConfig, how: signal.Signals, status: int
) -> None:
    code = MAIN
    command = [sys.executable, "-c", code, "run", "--name", "m1", "--kernel", config.kernel]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # nohup, if these tests run under it, is not meant for the machine.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"fake guest up\r\n"
        process.send_signal(how)
        assert process.wait(10) == status
    deadline = time.monotonic() + 5
    while MachineDirectory.of("m1").state() is not NameState.FREE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminal_is_given_back(runtime: Path, config: MachineConfig) -> None:
    """As a person does it: a shell's terminal, the escape character, and the terminal's modes."""
    code = MAIN
    command = [sys.executable, "-c", code, "run", "--name", "m1", "--kernel", config.kernel]
    for leave in (b"\x1d", b"poweroff", None):
        person, terminal = os.openpty()
        before = termios.tcgetattr(terminal)
        with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal) as process:
            seen = b""
            while b"fake guest up" not in seen:
                seen += os.read(person, 100)
            assert termios.tcgetattr(terminal)[3] & termios.ICANON == 0
            if leave is None:
                process.terminate()
            else:
                os.write(person, leave)
            assert process.wait(10) == (143 if leave is None else 0)
        assert termios.tcgetattr(terminal) == before
        os.close(terminal)
        os.close(person)
        assert MachineDirectory.of("m1").state() is NameState.FREE


def test_a_worker_that_lost_its_console_but_lives(
    runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreground, "_END_SECONDS", 0.2)
    code = (
        "import pathlib, socket, sys, time; here = pathlib.Path(sys.argv[1]).parent;"
        "port = socket.socket(socket.AF_UNIX); port.bind(str(here / 'serial1.sock'));"
        "port.listen(); (here / 'api.sock').touch(); port.accept()[0].close(); time.sleep(60)"
    )
    monkeypatch.setattr(forked, "live", live_as((sys.executable, "-c", code)))
    with pytest.raises(HvHostError, match="closed its console but did not end"):
        run(config, b"")
    assert MachineDirectory.of("m1").log_file.exists()
    monkeypatch.setattr(forked, "live", live_as((sys.executable, "-c", code.split("port =")[0])))
    told: list[str] = []
    assert run(config, b"", progress=told.append) is Ending.CLOSED
    assert told == ["machine 'm1' stopped before its console could be shown."]


QUICK = """
import pathlib, socket, sys
here = pathlib.Path(sys.argv[1]).parent
print("2026-01-02 03:04:05,678 hvhost.machine.machine: stopped the guest powered off")
port = socket.socket(socket.AF_UNIX)
port.bind(str(here / ".new"))
port.listen()
"""


def test_a_guest_that_is_quicker_than_the_api(
    runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All it said is shown, or that it could not be."""
    shown = f"{QUICK}(here / '.new').rename(here / 'serial1.sock')\nport.accept()[0].send(b'bye')"
    told: list[str] = []
    for code, console in ((shown, b"bye"), (QUICK, b"")):
        monkeypatch.setattr(forked, "live", live_as((sys.executable, "-c", code)))
        printed: list[bytes] = []
        assert run(config, b"", printed, progress=told.append) is Ending.CLOSED
        assert printed == [console]
    assert told == [
        "machine 'm1' stopped before its console could be shown: the guest powered off."
    ]
