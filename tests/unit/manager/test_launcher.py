from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.machine.storage_model import DriveConfig, DriveKind
from hvhost.manager import launcher
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.launcher import check, check_images, launch
from hvhost.network.config import parse_adapters


def wait_for(condition: object, seconds: float = 5.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_can_be_spoken_to(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    info = MachineClient("m1").info()
    assert (info.name, info.pid) == ("m1", worker.process.pid)
    assert json.loads(worker.directory.config_file.read_text())["kernel"] == config.kernel
    worker.stop()
    worker.check_ended_well()
    assert worker.directory.state() is NameState.FREE


def test_a_detached_worker_has_its_own_session_and_no_input(
    runtime: Path, config: MachineConfig
) -> None:
    worker = launch(config, detach=True)
    assert os.getsid(worker.process.pid) == worker.process.pid
    assert Path(f"/proc/{worker.process.pid}/fd/0").readlink() == Path("/dev/null")
    worker.stop()


def test_a_name_in_use(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    with pytest.raises(HvHostError, match="'m1' is running already"):
        launch(config, detach=True)
    assert MachineClient("m1").info().pid == worker.process.pid
    worker.stop()


def test_one_name_started_twice_at_once(runtime: Path, config: MachineConfig) -> None:
    outcomes: list[str] = []

    def start() -> None:
        try:
            launch(config, detach=True)
            outcomes.append("runs")
        except HvHostError as error:
            outcomes.append("refused" if "already" in str(error) else str(error))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "refused", "runs"]


def test_a_worker_killed_frees_its_name(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    worker.process.kill()
    worker.process.wait()
    assert worker.directory.state() is NameState.DEAD
    launch(config, detach=True).stop()


def test_the_workers_own_sentence(runtime: Path, config: MachineConfig) -> None:
    with pytest.raises(HvHostError, match=r"^no KVM here; buy one\.$"):
        launch(replace(config, command_line="fail"), detach=True)
    assert MachineDirectory.of("m1").state() is NameState.FREE


def test_a_worker_without_a_word(runtime: Path, config: MachineConfig) -> None:
    with pytest.raises(HvHostError, match=r"ended with status 3 without a word; \S*worker\.log"):
        launch(replace(config, command_line="fail-silently"), detach=True)


def test_a_guest_that_is_quicker_than_the_api(runtime: Path, config: MachineConfig) -> None:
    line = "2026-01-02 03:04:05,678 hvhost.machine.machine: stopped the guest powered off"
    program = (sys.executable, "-c", f"print({line!r})")
    with pytest.raises(HvHostError, match="before anybody could speak to it: the guest powered"):
        launch(config, detach=True, program=program)
    assert MachineDirectory.of("m1").state() is NameState.FREE


def test_a_worker_killed_by_a_signal(runtime: Path, config: MachineConfig) -> None:
    program = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(HvHostError, match="ended by SIGKILL without a word"):
        launch(config, detach=True, program=program)


def test_a_worker_that_never_comes_up(runtime: Path, config: MachineConfig) -> None:
    with pytest.raises(HvHostError, match=r"has said nothing for 0\.5 seconds"):
        launch(replace(config, command_line="never-open"), detach=True, timeout=0.5)
    assert MachineDirectory.of("m1").state() is NameState.FREE


def test_a_start_given_up(runtime: Path, config: MachineConfig) -> None:
    abandoned = threading.Event()
    threading.Timer(0.3, abandoned.set).start()
    with pytest.raises(HvHostError, match="the start of machine 'm1' was given up"):
        launch(replace(config, command_line="never-open"), detach=True, abandoned=abandoned)
    assert MachineDirectory.of("m1").state() is NameState.FREE


def test_a_worker_that_tells_what_it_does_is_given_time(
    runtime: Path, config: MachineConfig
) -> None:
    said: list[str] = []
    worker = launch(
        replace(config, command_line="slow"), detach=True, timeout=3.0, progress=said.append
    )
    assert said[:14] == [f"step {number}" for number in range(14)]  # 4.5 seconds of them
    worker.stop()


def test_a_worker_that_ignores_sigterm_is_killed(
    runtime: Path, config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_STOP_SECONDS", 0.2)
    code = (
        "import pathlib, signal, sys, time; signal.signal(15, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1]).with_name('api.sock').touch(); time.sleep(60)"
    )
    worker = launch(config, detach=True, program=(sys.executable, "-c", code))
    worker.stop()
    assert worker.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_attached_worker_dies_with_who_started_it(
    runtime: Path, config: MachineConfig, how: signal.Signals
) -> None:
    code = f"""
import sys, time
from hvhost.machine.model import MachineConfig
from hvhost.machine.storage_model import DriveConfig, DriveKind
from hvhost.manager import launcher
launcher.WORKER = {launcher.WORKER!r}
print(launcher.launch(MachineConfig(name="m1", kernel={config.kernel!r}), detach=False).process.pid)
sys.stdout.flush()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert exists(pid)
        starter.send_signal(how)
    wait_for(lambda: not exists(pid))
    assert MachineDirectory.of("m1").state() is NameState.FREE


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"kernel": "/nowhere/vmlinuz"}, "there is no kernel '/nowhere/vmlinuz'"),
        ({"kernel": "/etc"}, "kernel '/etc' is not a file"),
        ({"initrd": "/nowhere/initrd"}, "there is no initrd '/nowhere/initrd'"),
        ({"cpus": 0}, "at least one CPU, not 0"),
        ({"cpus": 1025}, "1025 CPUs are more than the 1024 that KVM can give"),
        ({"memory": 1 << 20}, "1 MiB of memory is too little"),
        ({"memory": (512 << 20) + 1}, "not a whole number of MiB"),
        ({"memory": 1 << 60}, "is more than the .* this computer has"),
        ({"command_line": "a\0b"}, "zero byte"),
        ({"name": "../x"}, "cannot be a machine's name"),
    ],
)
def test_bad_input_starts_nothing(
    runtime: Path, config: MachineConfig, wrong: dict[str, object], sentence: str
) -> None:
    with pytest.raises(HvHostError, match=sentence):
        launch(replace(config, **wrong), detach=True, program=("/bin/false",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nics", "sentence"),
    [
        (["switch:nope"], "there is no switch 'nope'"),
        (["none", "tap:hvhost-no-tap"], "there is no tap device 'hvhost-no-tap'"),
        (["nat"], "needs the program passt"),
    ],
)
def test_what_an_adapter_is_plugged_into_is_looked_for_before_anything_is_started(
    runtime: Path,
    config: MachineConfig,
    monkeypatch: pytest.MonkeyPatch,
    nics: list[str],
    sentence: str,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HvHostError, match=sentence):
        check(replace(config, adapters=parse_adapters(nics, [])))
    check(replace(config, adapters=parse_adapters(["none", "host-only"], [])))


def test_adapters_that_cannot_be_together_start_nothing(config: MachineConfig) -> None:
    adapters = parse_adapters(["none"], []) * 2
    with pytest.raises(HvHostError, match="'net0' already"):
        check(replace(config, adapters=adapters))


def test_a_kernel_that_may_not_be_read(
    config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(HvHostError, match="is not readable"):
        check(config)


@pytest.mark.parametrize(
    ("drive", "sentence"),
    [
        (DriveConfig("/no/x.vhdx"), "there is no disk '/no/x.vhdx'; check the path."),
        (DriveConfig("/no/x.iso", DriveKind.DVD), "there is no dvd '/no/x.iso'; check the path."),
        (DriveConfig("/etc"), "disk '/etc' is neither a file nor a block device; name the image"),
        (DriveConfig("/dev/null"), "disk '/dev/null' is neither a file nor a block device"),
    ],
)
def test_an_image_is_looked_for_before_anything_is_started(
    config: MachineConfig, drive: DriveConfig, sentence: str
) -> None:
    with pytest.raises(HvHostError, match=f"^{re.escape(sentence)}"):
        check(replace(config, drives=(drive,)))


def test_an_image_is_opened_as_the_machine_will(
    config: MachineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = os.W_OK
    monkeypatch.setattr(os, "access", lambda _, mode: mode != denied)  # root may do everything
    disk = DriveConfig(config.kernel)
    with pytest.raises(HvHostError, match="may not be written by you; add ,readonly"):
        check(replace(config, drives=(disk,)))
    for only_read in ({"read_only": True}, {"temporary": True}, {"kind": DriveKind.DVD}):
        check(replace(config, drives=(replace(disk, **only_read),)))
    check(replace(config, drives=(DriveConfig(None, DriveKind.DVD),)))
    denied = os.R_OK
    with pytest.raises(HvHostError, match=r"disk .* is not readable by you"):
        check_images([replace(disk, read_only=True)])
