from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvhost.paths import python_environment
from hvhost.rig import client, image, layout, qemu

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent as a process of this computer, under the sanitizers."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("stand-in") / "stand_in"
    options = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    options += [f"-I{layout.HEADER.parent}", "-fsanitize=address,undefined"]
    options += ["-fno-sanitize-recover=undefined"]
    subprocess.run([compiler, *options, "-o", str(program), str(HERE / "stand_in.c")], check=True)
    return program


class Rig:
    """A runtime directory whose keeper, once somebody needs it, has a stand-in for QEMU."""

    def __init__(self, directory: Path, stand_in: Path) -> None:
        self.directory = directory / "rig"
        self.directory.mkdir(mode=0o700)
        self.stand_in = stand_in
        self.settings: dict[str, object] = {
            "command": [str(stand_in)],
            "PING_SECONDS": 0.2,
            "HANG_SECONDS": 2.0,
            "DEVICE_SECONDS": 2.0,
        }
        self.linger = 0.2
        self.keepers: list[subprocess.Popen[bytes]] = []

    def start_keeper(self) -> subprocess.Popen[bytes]:
        """In the place of :func:`hvhost.rig.client._start_keeper`."""
        environment = python_environment()
        environment["HVHOST_RIG_LINGER"] = str(self.linger)
        environment["ASAN_OPTIONS"] = "detect_leaks=0"
        with (self.directory / "rig.out").open("ab") as output:
            keeper = subprocess.Popen(
                [sys.executable, str(HERE / "keeper_process.py"), json.dumps(self.settings)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.keepers.append(keeper)
        return keeper

    @property
    def keeper(self) -> subprocess.Popen[bytes]:
        return self.keepers[-1]

    def qemus(self) -> list[int]:
        """Process ids of the keepers' children."""
        found = []
        for keeper in self.keepers:
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text()
                found += [int(each) for each in text.split()]
        return found

    def log(self) -> str:
        parts = (self.directory / "rig.log", self.directory / "rig.out")
        return "".join(part.read_text() for part in parts if part.exists())

    def ended(self, seconds: float = 10) -> int:
        """Exit status of the last keeper, which ends by itself."""
        return self.keeper.wait(seconds)


@pytest.fixture
def rig(tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    one = Rig(tmp_path, stand_in)
    monkeypatch.setattr(client, "_start_keeper", one.start_keeper)
    monkeypatch.setattr(qemu, "find_qemu", lambda progress: qemu.Qemu("none", (10, 0)))
    monkeypatch.setattr(image, "rig_image", lambda progress: (Path("/kernel"), Path("/initrd")))
    yield one
    qemus = one.qemus()
    for keeper in one.keepers:
        if keeper.poll() is None:
            keeper.kill()
        keeper.wait()
    eventually(lambda: not any(alive(each) for each in qemus))


def alive(process: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def stop(process: int) -> None:
    os.kill(process, signal.SIGSTOP)


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
