"""The worker's process: how it starts, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from kernel_files import Elf, Segment, pvh_note

from hvhost.machine.model import MachineConfig
from hvhost.paths import python_environment

HERE = Path(__file__).parent
LEFT = {"config.json", "kernel", "lock"}


class WorkerProcess:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: subprocess.Popen[str] | None = None

    def start(self, words: str, **changes: object) -> None:
        kernel = self.directory / "kernel"
        if not kernel.exists():
            kernel.write_bytes(Elf([Segment(b"text" * 10, 0x200000), pvh_note(0x200000)]).build())
        config = MachineConfig("m", str(kernel), command_line=words, memory=16 << 20)
        values = asdict(config) | changes
        (self.directory / "config.json").write_text(json.dumps(values))
        environment = python_environment()
        paths = (HERE.parent / "kvm", HERE.parent / "firmware", environment["PYTHONPATH"])
        environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        environment["HVHOST_CACHE_DIR"] = str(self.directory.parent / "cache")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker_process.py"), str(self.directory / "config.json")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, seconds: float = 15) -> tuple[int, str]:
        """Exit status and everything it printed."""
        assert self.process is not None
        output, _ = self.process.communicate(timeout=seconds)
        assert "Traceback" not in output, output
        return self.process.returncode, output

    def wait_for(self, condition: Callable[[], bool]) -> None:
        assert self.process is not None
        deadline = time.monotonic() + 15
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def up(self) -> None:
        self.wait_for((self.directory / "api.sock").exists)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    directory = tmp_path / "m"
    directory.mkdir()
    one = WorkerProcess(directory)
    yield one
    if one.process is not None and one.process.poll() is None:
        one.process.kill()
        one.process.communicate()


def test_a_guest_that_powers_off(worker: WorkerProcess) -> None:
    worker.start("power-off")
    status, output = worker.end()
    assert status == 0
    assert "stopped the guest powered off" in output
    assert "threads left: 0" in output
    assert worker.files == LEFT


def test_what_is_there_while_it_runs(worker: WorkerProcess) -> None:
    worker.start("")
    worker.up()
    assert worker.process is not None
    assert (worker.directory / "worker.pid").read_text() == f"{worker.process.pid}\n"
    assert worker.files >= {"api.sock", "serial1.sock", "serial2.sock", "worker.pid"}
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(10)
        console.connect(str(worker.directory / "serial1.sock"))
        assert console.recv(100) == b"up\n", "the past of the console"
    worker.signal(signal.SIGTERM)
    status, output = worker.end()
    assert status == 0
    assert "stopped powered off by force" in output
    assert worker.files == LEFT


def test_an_interrupt_is_a_power_off_too(worker: WorkerProcess) -> None:
    worker.start("")
    worker.up()
    for _ in range(3):  # whoever is impatient changes nothing
        worker.signal(signal.SIGINT)
    status, output = worker.end()
    assert status == 0
    assert output.count("stopped powered off by force") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_it_starts_is_heeded_at_once(
    worker: WorkerProcess, number: signal.Signals
) -> None:
    """Not after the minute that a rig may take; and nobody may mistake it for another failure."""
    worker.start("slow")
    worker.wait_for((worker.directory / "worker.pid").exists)
    time.sleep(0.5)
    started = time.monotonic()
    worker.signal(number)
    status, output = worker.end()
    assert time.monotonic() - started < 5
    assert status == 1
    assert output.splitlines()[-1] == (
        "error: the machine was told to stop while it started; start it again."
    )
    assert worker.files == LEFT


def test_a_machine_that_fails(worker: WorkerProcess) -> None:
    worker.start("fails")
    status, output = worker.end()
    assert status == 1
    assert "\nerror: KVM stopped virtual processor" in output
    assert output.count("\nerror: ") == 1
    assert "threads left: 0" in output
    assert worker.files == LEFT


def test_a_rig_that_dies(worker: WorkerProcess) -> None:
    worker.start("dies", cpus=4)
    status, output = worker.end()
    assert status == 1
    assert output.count("stopped the rig's QEMU died: no reason") == 1
    assert "\nerror: the rig's QEMU died: no reason\n" in output
    assert "threads left: 0" in output
    assert worker.files == LEFT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("unreachable", "error: there is no KVM; run `hvhost doctor`."),
        (
            "broken",
            "error: machine 'm' could not be built ([Errno 12] Cannot allocate memory); "
            "run `hvhost doctor` to see what this computer can do.",
        ),
    ],
)
def test_a_machine_that_cannot_start(worker: WorkerProcess, words: str, sentence: str) -> None:
    worker.start(words)
    status, output = worker.end()
    assert status == 1
    assert sentence in output.splitlines()
    assert worker.files == LEFT


def test_a_kernel_that_is_none(worker: WorkerProcess) -> None:
    (worker.directory / "kernel").write_bytes(b"#!/bin/sh\n" * 100)
    worker.start("")
    status, output = worker.end()
    assert status == 1
    assert output.splitlines()[0].startswith("error: ")
    assert worker.files == LEFT


def test_a_kernel_that_is_gone(worker: WorkerProcess) -> None:
    worker.start("", kernel="/nowhere/vmlinuz")
    status, output = worker.end()
    assert status == 1
    assert "/nowhere/vmlinuz" in output
    assert worker.files == LEFT


def test_an_initrd_that_is_gone(worker: WorkerProcess) -> None:
    worker.start("", initrd="/nowhere/initrd")
    status, output = worker.end()
    assert status == 1
    assert "/nowhere/initrd" in output.splitlines()[-2]
    assert worker.files == LEFT


def test_one_machine_of_a_name_at_a_time(worker: WorkerProcess, tmp_path: Path) -> None:
    """The second waits for the lock and touches nothing of the first."""
    worker.start("")
    worker.up()
    second = WorkerProcess(worker.directory)
    second.start("power-off")
    time.sleep(0.5)
    assert worker.process is not None
    assert (worker.directory / "worker.pid").read_text() == f"{worker.process.pid}\n"
    worker.signal(signal.SIGTERM)
    assert worker.end()[0] == 0
    assert second.end()[0] == 0
    assert worker.files == LEFT


def test_a_directory_too_deep_for_sockets(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    worker = WorkerProcess(directory)
    worker.start("")
    status, output = worker.end()
    assert status == 1
    assert output.splitlines()[-2].startswith("error: ")
    assert worker.files == LEFT


def test_a_directory_that_is_removed_meanwhile(worker: WorkerProcess) -> None:
    worker.start("")
    worker.up()
    for path in worker.directory.iterdir():
        path.unlink()
    worker.directory.rmdir()
    worker.signal(signal.SIGTERM)
    assert worker.end()[0] == 0


def plain_run(tmp_path: Path, words: str) -> subprocess.Popen[str]:
    """``hvhost run`` in a process of its own, its worker a fork of it over a KVM in memory."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(Elf([Segment(b"text" * 10, 0x200000), pvh_note(0x200000)]).build())
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import worker_process\n"
        "from hvhost.machine import worker\n"
        "worker.connect = worker_process.connect\n"
        "from hvhost.cli.main import main\n"
        "main()"
    )
    environment = python_environment()
    paths = (HERE.parent / "kvm", HERE.parent / "firmware", environment["PYTHONPATH"])
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    environment["HVHOST_RUNTIME_DIR"] = str(tmp_path / "r")
    arguments = ["--name", "m", "--kernel", str(kernel), "--append", words, "--memory", "32M"]
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_plain_run_from_the_command_line_to_its_end(tmp_path: Path) -> None:
    with plain_run(tmp_path, "") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        with (tmp_path / "r" / "machines" / "m" / "worker.log").open() as file:
            process.send_signal(signal.SIGINT)
            output, said = process.communicate(timeout=100)
            log = file.read()
    assert (process.returncode, output) == (130, "")
    assert said in ("", "hvhost: looking for a KVM…\n"), "it may be too quick to be said"
    assert "stopped powered off by force" in log
    assert "Traceback" not in log
    assert not any((tmp_path / "r" / "machines").iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("unreachable", "there is no KVM; run `hvhost doctor`."),
        ("fails", "KVM stopped virtual processor 0 with INTERNAL_ERROR (detail 0x3)."),
    ],
)
def test_a_plain_run_that_fails(tmp_path: Path, words: str, sentence: str) -> None:
    with plain_run(tmp_path, words) as process:
        output, said = process.communicate(timeout=100)
    assert (process.returncode, output) == (1, "")
    assert said.splitlines()[-1] == f"hvhost: {sentence}"
    assert said.count(sentence) == 1 and "Traceback" not in said
    assert not any((tmp_path / "r" / "machines").iterdir())
