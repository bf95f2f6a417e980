"""The real probe, worker and client behind what the rows ask for; only the guest is missing."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.guests import probe as probe_module
from hvhost.guests.build import GuestImages
from hvhost.guests.probe import ProbeClient, build_probe
from hvhost.machine.model import MachineConfig, MachineEvent, ShutdownAction
from hvhost.manager.launcher import launch
from hvhost.verify import live, live_guest, live_logs, live_probe, live_usage
from hvhost.verify.guest import Carrier
from hvhost.verify.live import LiveMachine
from hvhost.verify.live_guest import LiveGuest
from hvhost.verify.live_logs import EventLog
from hvhost.verify.live_probe import LiveProbe, best_probe
from hvhost.verify.options import VerifyOptions

FAKE_WORKER = Path(__file__).parents[1] / "manager" / "fake_worker.py"


@contextlib.contextmanager
def real_probe() -> Iterator[ProbeClient]:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [str(build_probe()), "-"], stdin=theirs.fileno(), stdout=theirs.fileno()
    )
    theirs.close()
    connection = ProbeClient(ours)
    connection.wait_ready(10, drivers=False)
    yield connection
    connection.close()
    process.wait(10)


@pytest.fixture
def probe() -> Iterator[LiveProbe]:
    with real_probe() as connection:
        yield LiveProbe(connection, Carrier.SERIAL_LINE)


class SocketGuest:
    """Another probe behind a machine's socket, as a guest's; or nobody."""

    def __init__(self, directory: Path, answer: bytes) -> None:
        self.asked: list[bytes] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(directory / "vsock.sock"))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        stream, _ = self._listener.accept()
        with stream:
            self.asked.append(stream.recv(64))
            stream.sendall(self._answer)
            if self._answer.startswith(b"OK"):
                subprocess.run(
                    [str(build_probe()), "-"],
                    stdin=stream.fileno(),
                    stdout=stream.fileno(),
                    check=True,
                )


@pytest.mark.parametrize(
    ("said", "answer", "carrier", "asked"),
    [
        ("listening\n", b"OK 1\n", Carrier.SOCKET, [b"CONNECT 26742\n"]),
        ("listening\n", b"REFUSED nobody took it.\n", Carrier.SERIAL_LINE, [b"CONNECT 26742\n"]),
        ("none\n", b"OK 1\n", Carrier.SERIAL_LINE, []),
    ],
)
def test_the_probe_is_asked_over_sockets_where_the_guest_has_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    answer: bytes,
    carrier: Carrier,
    asked: list[bytes],
) -> None:
    monkeypatch.setattr(probe_module, "SOCKETS_FILE", str(tmp_path / "sockets"))
    guest = SocketGuest(tmp_path, answer)
    with real_probe() as serial:

        def find_out() -> None:
            time.sleep(0.2)
            (tmp_path / "new").write_text(said)
            (tmp_path / "new").rename(tmp_path / "sockets")

        threading.Thread(target=find_out, daemon=True).start()
        probe = best_probe(serial, tmp_path)
        assert probe.carrier is carrier
        assert guest.asked == asked
        assert probe.run(["echo", "hello"], 5).output == "hello\n"
        probe.close()


def test_a_guest_that_never_says_whether_it_has_sockets_keeps_the_serial_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "SOCKETS_FILE", str(tmp_path / "sockets"))
    monkeypatch.setattr(live_probe, "_FOUND_OUT_SECONDS", 0.2)
    with real_probe() as serial:
        assert best_probe(serial, tmp_path).carrier is Carrier.SERIAL_LINE


def test_files(probe: LiveProbe, tmp_path: Path) -> None:
    for name, text in (("a/x", "one\n"), ("b/x", "two: 2\nthree\n"), ("c/y", "no\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert probe.read(f"{tmp_path}/a/x") == "one\n"
    assert probe.read_all(f"{tmp_path}/*/x", f"{tmp_path}/none/*") == {
        f"{tmp_path}/a/x": "one",
        f"{tmp_path}/b/x": "two: 2\nthree",
    }
    probe.write(f"{tmp_path}/a/x", "ONE")
    assert (tmp_path / "a/x").read_text() == "ONE\n"
    with pytest.raises(HvHostError, match="No such file"):
        probe.read(f"{tmp_path}/absent")
    with pytest.raises(HvHostError, match="No such file"):
        probe.write(f"{tmp_path}/absent", "x")


def test_commands(probe: LiveProbe, tmp_path: Path) -> None:
    result = probe.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 5)
    assert (result.status, result.output) == (3, "out\nerr\n")
    probe.fire(f"{tmp_path}/it's fired", "c")
    assert not (tmp_path / "it's fired").exists(), "before the answer could get out"
    deadline = time.monotonic() + 5
    while not (tmp_path / "it's fired").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "it's fired").read_text() == "c\n"


def test_answers(probe: LiveProbe) -> None:
    assert probe.answers(5)
    silent = LiveProbe(ProbeClient(socket.socketpair()[0]), Carrier.SERIAL_LINE)
    assert not silent.answers(0.05)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineConfig:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    program = (sys.executable, str(FAKE_WORKER))
    monkeypatch.setattr(live, "launch", functools.partial(launch, program=program))
    return MachineConfig(name="v", kernel=os.path.realpath(__file__), memory=64 << 20)


def test_a_machines_last_words_outlive_its_worker(config: MachineConfig, tmp_path: Path) -> None:
    made: list[LiveMachine] = []
    # As a row would: the thread that starts the machine ends long before it does.
    thread = threading.Thread(target=lambda: made.append(LiveMachine(config)))
    thread.start()
    thread.join()
    machine = made[0]
    time.sleep(0.2)
    assert not machine.wait_stopped(0.1)
    assert machine.info().name == "v"
    assert machine.heartbeat_round_trips(3)
    assert (machine.vp_seconds() or 0.0) >= 0.0
    machine.shut_down(ShutdownAction.POWER_OFF)
    assert machine.wait_stopped(10)
    kinds = [event.kind for event in machine.events(0, 2.0)]
    assert kinds[0] == "started"
    assert machine.console().startswith("fake guest up") and "bye" in machine.console()
    for call in (machine.info, machine.nmi, lambda: machine.events(99, 0.0)):
        with pytest.raises(HvHostError, match="the machine stopped while something"):
            call()
    with pytest.raises(HvHostError, match="stopped while"):
        machine.connect_probe(0.1)
    machine.kill()
    for _ in range(2):
        machine.keep_logs(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"worker.log", "worker-2.log"}


def test_the_emulators_time_is_that_of_the_keepers_children(tmp_path: Path) -> None:
    path = tmp_path / "rig.sock"
    keeper = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket, subprocess, sys, time\n"
            "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1000)\n"
            "c = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
            "sys.stdin.read(); c.kill(); c.wait()",
            str(path),
        ],
        stdin=subprocess.PIPE,
    )
    try:
        deadline, before, after = time.monotonic() + 30, None, 0.0
        while (before is None or after - before <= 0.1) and time.monotonic() < deadline:
            time.sleep(0.05)
            after = live_usage.emulator_seconds(path) or 0.0
            before = after if before is None else before
        assert before is not None and after - before > 0.1
    finally:
        keeper.communicate(timeout=10)
    assert live_usage.emulator_seconds(path) is None


def test_kill_ends_a_machine_whose_guest_is_silent(config: MachineConfig) -> None:
    machine = LiveMachine(config)
    assert machine.connect_probe(0.2) is None
    machine.kill()
    assert machine.wait_stopped(0.0)
    machine.kill()


def test_events_are_collected_once_and_in_order() -> None:
    batches = [
        [MachineEvent(1, 0.0, "a"), MachineEvent(2, 0.0, "b")],
        [],
        [MachineEvent(3, 0.0, "c")],
    ]
    asked = []

    def fetch(after: int, timeout: float) -> list[MachineEvent]:
        asked.append(after)
        if not batches:
            raise HvHostError("gone")
        return batches.pop(0)

    log = EventLog(fetch)
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [0, 2, 2, 3]
    assert [event.kind for event in log.after(1, 0.0) or []] == ["b", "c"]
    assert log.after(3, 5.0) is None, "none will come"


def test_a_machine_that_cannot_be_started_says_why(config: MachineConfig) -> None:
    refused = replace(config, name="../v")
    with pytest.raises(HvHostError, match="name"):
        LiveMachine(refused)


def test_a_worker_that_neither_answers_nor_ends(
    config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = LiveMachine(config)
    monkeypatch.setattr(live, "_ENDING_SECONDS", 0.01)
    assert "does not answer any more" in str(machine._end())
    machine.kill()


def test_a_console_that_nobody_offers_is_not_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_logs, "_CONSOLE_CONNECT_SECONDS", 0.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 100

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(HvHostError, match=r"serial port ttyS0\.sock cannot be reached: No such"):
        live_logs.connect_serial(tmp_path / "ttyS0.sock")


def test_the_32_bit_guest_beside_one_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    images = GuestImages(Path("/k"), Path("/i"), None, "T", "6.1", ())
    narrow = replace(images, architecture="i386")
    asked: list[str] = []

    def prepare(name: str, progress: object) -> GuestImages:
        asked.append(name)
        return narrow

    monkeypatch.setattr(live_guest, "prepare_guest", prepare)
    found = LiveGuest(images, VerifyOptions(cpus=3)).pae_sibling()
    assert found is not None and found.images is narrow
    assert (found.options.guest, found.options.cpus) == ("debian-12-pae", 3)
    assert LiveGuest(narrow, VerifyOptions()).pae_sibling() == LiveGuest(narrow, VerifyOptions())
    assert asked == ["debian-12-pae"]
    for options in (
        VerifyOptions(kernel=Path("/k")),
        VerifyOptions(debs=[Path("/linux-image.deb")]),
        VerifyOptions(guest="debian-13"),
    ):
        assert LiveGuest(images, options).pae_sibling() is None
    assert asked == ["debian-12-pae"]


def test_no_news_is_no_end() -> None:
    over = threading.Event()

    def fetch(after: int, timeout: float) -> list[MachineEvent]:
        over.wait(5)
        raise HvHostError("gone")

    log = EventLog(fetch)
    assert log.after(0, 0.01) == []
    over.set()
    assert log.after(0, 5.0) is None


@pytest.mark.parametrize(
    ("verbose", "append", "line"),
    [
        (False, "", "console=ttyS0 panic=0 quiet"),
        (True, "", "console=ttyS0 panic=0"),
        (True, "nosmp", "console=ttyS0 panic=0 nosmp"),
    ],
)
def test_the_guests_command_line(
    verbose: bool, append: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[MachineConfig] = []
    monkeypatch.setattr(live_guest, "LiveMachine", lambda config, progress: configs.append(config))
    images = GuestImages(Path("/k"), Path("/i"), None, "T", "6.1", ("hv_kvp_daemon",))
    guest = LiveGuest(images, VerifyOptions(append=append, cpus=3, memory=256 << 20))
    guest.start(verbose=verbose)
    (config,) = configs
    assert (config.command_line, config.cpus, config.memory) == (line, 3, 256 << 20)
    assert (config.kernel, config.initrd) == ("/k", "/i")
    assert (guest.release, guest.os_name, guest.modules) == ("6.1", "T", None)
    needing = replace(images, command_line="needed=1")
    LiveGuest(needing, VerifyOptions(append=append)).start(verbose=verbose)
    assert configs[1].command_line == line.replace("panic=0", "panic=0 needed=1")


# The last, as nothing runs behind it in a process that was made to try it.
def test_a_start_that_is_interrupted_leaves_nothing(
    config: MachineConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = replace(config, command_line="never-open")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        LiveMachine(slow)
    timer.join()
    assert not list((tmp_path / "machines").iterdir())
