"""Fixtures of tests that need a rig."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_process import HERE, Rig, alive, eventually

from hvhost.rig import client, image, layout, qemu


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
