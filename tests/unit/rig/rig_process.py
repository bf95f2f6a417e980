"""A rig with a stand-in for QEMU, for tests: its keeper's processes, and looking after them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hvhost.paths import python_environment

HERE = Path(__file__).parent


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


def alive(process: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def stop(process: int) -> None:
    """Stop a process, and all its threads have."""
    os.kill(process, signal.SIGSTOP)
    tasks = Path(f"/proc/{process}/task")
    eventually(
        lambda: all(
            (task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
            for task in tasks.iterdir()
        )
    )


def eventually(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
