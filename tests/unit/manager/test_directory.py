from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.manager.directory import (
    MachineDirectory,
    NameState,
    check_name,
    machine_directories,
    running_directory,
)


@pytest.mark.parametrize("name", ["a", "7", "web-1", "a.b_c-d", "x" * 63])
def test_names_that_can_be(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "é", "a\n", "x" * 64])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(HvHostError, match="cannot be a machine's name"):
        check_name(name)


@given(st.text())
def test_no_name_leaves_the_directory(name: str) -> None:
    try:
        check_name(name)
    except HvHostError:
        return
    assert (Path("/x") / name).resolve().parent == Path("/x")
    assert name not in (".", "..")


def test_the_directory_is_its_owners(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    (runtime / "machines" / "m").mkdir(mode=0o755)
    directory.create()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(HvHostError, match="bytes too long for a socket"):
        MachineDirectory.of("m").create()


def test_the_states_of_a_name(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    assert directory.state() is NameState.FREE
    with directory.claim():
        assert directory.state() is NameState.STARTING
        lock = directory.lock_file.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        directory.pid_file.write_text("42\n")
    assert directory.state() is NameState.ALIVE
    assert directory.worker_pid() == 42
    lock.close()
    assert directory.state() is NameState.DEAD
    directory.pid_file.unlink()
    assert directory.state() is NameState.FREE
    assert directory.worker_pid() is None


def test_a_name_in_use(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    directory.create()
    with directory.lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HvHostError, match="'m' is running already"), directory.claim():
            pytest.fail("claimed a name in use")
        assert not directory.remove()
        assert directory.path.exists()


def test_a_name_being_started(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    with (
        directory.claim(),
        pytest.raises(HvHostError, match="is being started already"),
        directory.claim(patience=0.05),
    ):
        pytest.fail("claimed twice")


def test_a_claim_waits_for_who_only_looks(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    directory.create()
    descriptor = os.open(directory.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.1, lambda: os.close(descriptor)).start()
    started = time.monotonic()
    with directory.claim():
        assert time.monotonic() - started >= 0.05


def test_a_claim_removes_what_a_dead_worker_left(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    directory.create()
    for stale in (directory.api_socket, directory.serial_socket(1), directory.pid_file):
        stale.write_text("1")
    (directory.path / "sub").mkdir()
    directory.lock_file.touch()
    with directory.claim():
        assert [path.name for path in directory.path.iterdir()] == ["lock"]


def test_the_running_one_or_why_not(runtime: Path) -> None:
    with pytest.raises(HvHostError, match="no running machine 'm'"):
        running_directory("m")
    directory = MachineDirectory.of("m")
    with directory.claim():
        directory.lock_file.touch()
        directory.pid_file.write_text("77")
    with pytest.raises(HvHostError, match=r"worker of machine 'm' \(process 77\) has died"):
        running_directory("m")


def test_all_directories_by_name(runtime: Path) -> None:
    for name in ("b", "a"):
        MachineDirectory.of(name).create()
    (runtime / "machines" / ".hidden").mkdir()
    (runtime / "machines" / "file").touch()
    assert [directory.name for directory in machine_directories()] == ["a", "b"]
    assert MachineDirectory.of("a").remove()
    assert not MachineDirectory.of("a").remove()
    assert [directory.name for directory in machine_directories()] == ["b"]


def test_a_machine_being_started_keeps_its_directory(runtime: Path) -> None:
    directory = MachineDirectory.of("m")
    with directory.claim():
        assert not directory.remove(patience=0.05)
        assert directory.path.exists()


def test_a_directory_removed_under_a_start_is_made_anew(runtime: Path) -> None:
    """The start waits for the lock of a directory which is gone by the time it gets it."""
    directory = MachineDirectory.of("m")
    directory.create()
    descriptor = os.open(directory.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def removed() -> None:
        directory.path.rmdir()
        os.close(descriptor)

    threading.Timer(0.1, removed).start()
    with directory.claim():
        assert directory.path.is_dir()
        assert directory.state() is NameState.STARTING
