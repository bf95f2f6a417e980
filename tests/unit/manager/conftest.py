from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.machine.model import MachineConfig
from hvhost.manager import forked, launcher
from hvhost.manager.control import machines
from manager.stand_in import FAKE_WORKER, live_as


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory and a worker of the test's own; nothing survives the test."""
    root = Path(tempfile.mkdtemp(prefix="hv"))  # short, whatever the test's name: it holds sockets
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(root))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(launcher, "WORKER", FAKE_WORKER)
    monkeypatch.setattr(forked, "live", live_as(FAKE_WORKER))
    yield root
    for listing in machines():
        if listing.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(listing.pid, 9)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def config(tmp_path: Path) -> MachineConfig:
    """A machine whose kernel is a file, at least."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"MZ")
    return MachineConfig(name="m1", kernel=str(kernel))
