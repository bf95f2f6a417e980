from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hvhost import paths
from hvhost.errors import HvHostError


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HVHOST_CACHE_DIR", "HVHOST_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_our_own_variables_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "c"))
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path / "r"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "x"))
    assert paths.cache_dir() == tmp_path / "c"
    assert paths.cache_dir("rig") == tmp_path / "c" / "rig"
    assert paths.runtime_dir("rig") == tmp_path / "r" / "rig"
    for made in (tmp_path / "c" / "rig", tmp_path / "r", tmp_path / "r" / "rig"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_the_desktops_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "r"))
    assert paths.cache_dir() == tmp_path / "c" / "hvhost"
    assert paths.runtime_dir() == tmp_path / "r" / "hvhost"


def test_home(tmp_path: Path) -> None:
    assert paths.cache_dir("a") == tmp_path / "home" / ".cache" / "hvhost" / "a"


def test_a_directory_of_somebody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In /tmp anybody may have made it first, and would own our sockets."""
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(HvHostError, match="belongs to another user; set HVHOST_RUNTIME_DIR"):
        paths.runtime_dir()


@pytest.mark.parametrize(
    ("variable", "make"),
    [("HVHOST_CACHE_DIR", paths.cache_dir), ("HVHOST_RUNTIME_DIR", paths.runtime_dir)],
)
def test_a_directory_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, make: type[Path]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    with pytest.raises(HvHostError, match=f"cannot be made .*; set {variable} to a directory"):
        make("name")


def test_a_python_of_ours_finds_this_package(tmp_path: Path) -> None:
    script = "import hvhost, sys; print(hvhost.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script],
        env=paths.python_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent == Path(paths.__file__).parent
    assert paths.python_environment()["PATH"] == os.environ["PATH"]


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "full")

    path = tmp_path / "file"
    paths.write_whole(path, b"old", 0o755)
    assert path.stat().st_mode & 0o777 == 0o755
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            paths.write_whole(path, b"new")
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"
    assert path.read_bytes() == b"old"
    paths.write_whole(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
