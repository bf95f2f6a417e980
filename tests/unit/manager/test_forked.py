"""A worker that is a fork of who starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.manager import forked
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.forked import ForkedWorker
from hvhost.manager.launcher import launch_forked


@pytest.fixture
def directory(runtime: Path) -> MachineDirectory:
    one = MachineDirectory.of("m1")
    one.create()
    return one


def life(
    monkeypatch: pytest.MonkeyPatch,
    directory: MachineDirectory,
    config: MachineConfig,
    code: str,
) -> tuple[int, str]:
    """Status and log of a worker whose life is *code*."""

    def live(directory: MachineDirectory, config: MachineConfig) -> int:
        scope: dict[str, object] = {"config": config}
        exec(code, scope)  # the test's own
        status = scope.get("status", 0)
        assert isinstance(status, int)
        return status

    monkeypatch.setattr(forked, "live", live)
    worker = ForkedWorker(directory, config)
    status = worker.wait(20)
    assert worker.poll() == status == worker.wait()
    worker.kill()  # nothing, by now
    return status, directory.log_file.read_text()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_can_be_spoken_to(runtime: Path, config: MachineConfig) -> None:
    worker = launch_forked(config)
    assert MachineClient("m1").info().pid == worker.process.pid
    assert os.getsid(worker.process.pid) == worker.process.pid
    assert Path(f"/proc/{worker.process.pid}/fd/0").readlink() == Path("/dev/null")
    assert not worker.ended(0)
    worker.stop()
    assert worker.ended(0)
    worker.check_ended_well()
    assert worker.directory.state() is NameState.FREE


def test_a_name_in_use(runtime: Path, config: MachineConfig) -> None:
    worker = launch_forked(config)
    with pytest.raises(HvHostError, match="'m1' is running already"):
        launch_forked(config)
    worker.stop()


def test_it_has_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, directory: MachineDirectory, config: MachineConfig
) -> None:
    mine = os.open("/etc/passwd", os.O_RDONLY)
    code = "import os; print(os.listdir('/proc/self/fd'), os.getcwd(), config.name)"
    status, log = life(monkeypatch, directory, config, code)
    os.close(mine)
    assert status == 0
    assert log == "['0', '1', '2', '3'] / m1\n", "the fourth is that of the listing itself"


def test_its_own_processes_find_this_package(
    monkeypatch: pytest.MonkeyPatch, directory: MachineDirectory, config: MachineConfig
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    code = "import os; print(os.environ['PYTHONPATH'])"
    root = Path(forked.__file__).parents[2]
    assert life(monkeypatch, directory, config, code) == (0, f"{root}\n")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("status = 3", 3, ""),
        ("raise SystemExit(4)", 4, ""),
        ("raise SystemExit('error: it was told to stop.')", 1, "error: it was told to stop.\n"),
        ("import os, signal; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_how_it_ends(
    monkeypatch: pytest.MonkeyPatch,
    directory: MachineDirectory,
    config: MachineConfig,
    code: str,
    status: int,
    said: str,
) -> None:
    assert life(monkeypatch, directory, config, code) == (status, said)


def test_a_bug_leaves_its_trace(
    monkeypatch: pytest.MonkeyPatch, directory: MachineDirectory, config: MachineConfig
) -> None:
    status, log = life(monkeypatch, directory, config, "raise ValueError('odd')")
    assert status == 1
    assert "Traceback" in log
    assert log.endswith("ValueError: odd\n")


def test_waiting_has_an_end(
    monkeypatch: pytest.MonkeyPatch, directory: MachineDirectory, config: MachineConfig
) -> None:
    monkeypatch.setattr(forked, "live", lambda *_: time.sleep(60))
    worker = ForkedWorker(directory, config)
    with pytest.raises(TimeoutError):
        worker.wait(0.01)
    worker.terminate()
    assert worker.wait(20) == -signal.SIGTERM


def test_it_dies_with_who_started_it(runtime: Path, config: MachineConfig) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from manager.stand_in import FAKE_WORKER, live_as
from hvhost.machine.model import MachineConfig
from hvhost.manager import forked, launcher
forked.live = live_as(FAKE_WORKER)
worker = launcher.launch_forked(MachineConfig(name="m1", kernel={config.kernel!r}))
print(worker.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    deadline = time.monotonic() + 10
    while MachineDirectory.of("m1").state() is not NameState.FREE or lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
