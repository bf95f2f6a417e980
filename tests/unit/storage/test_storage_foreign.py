"""Images of other formats become VHDX files, by ``qemu-img``, and the original stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.manager.storage import with_storage
from hvhost.storage.foreign import foreign_format
from hvhost.storage.images import format_of, open_disk
from hvhost.storage.operations import NewImage, convert

SIZE = 4 << 20
needs_qemu_img = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is not on this computer"
)


@pytest.fixture
def image(tmp_path: Path) -> tuple[Path, bytes]:
    """A qcow2 image and what is in it."""
    data = os.urandom(65536) + bytes(SIZE - 65536)
    (tmp_path / "a.raw").write_bytes(data)
    path = tmp_path / "a.qcow2"
    command = ["qemu-img", "convert", "-O", "qcow2", str(tmp_path / "a.raw"), str(path)]
    subprocess.run(command, check=True)
    return path, data


def content(path: Path) -> bytes:
    disk = open_disk(path, read_only=True)
    data = bytearray(disk.size)
    disk.readv(0, [memoryview(data)])
    disk.close()
    return bytes(data)


@needs_qemu_img
@pytest.mark.parametrize("suffix", ["vhdx", "img", "vhd"])
def test_converted(image: tuple[Path, bytes], tmp_path: Path, suffix: str) -> None:
    path, data = image
    made = tmp_path / f"new.{suffix}"
    assert convert(path, made, NewImage(), lambda *_: None).size == SIZE
    assert content(made) == data
    assert not list(tmp_path.glob(".incoming-*"))


@needs_qemu_img
def test_a_machine_runs_with_a_copy_that_is_made_once(
    image: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))
    path, data = image
    before, told = path.read_bytes(), list[str]()
    config = MachineConfig("m1", "/vmlinuz")
    found = set()
    for _ in range(2):
        (drive,) = with_storage(config, [f"{path},temporary"], progress=told.append).drives
        assert drive.path is not None and drive.temporary
        found.add(drive.path)
    (made,) = found
    assert content(Path(made)) == data and path.read_bytes() == before and len(told) == 1
    os.utime(path, ns=(0, 0))
    (drive,) = with_storage(config, [f"{path},temporary"]).drives
    assert drive.path not in found, "another image under the same name"


@needs_qemu_img
def test_what_is_refused(
    image: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = image
    with pytest.raises(HvHostError, match=r"hvhost disk convert .* ,temporary"):
        format_of(path)
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + bytes(1020))
    with pytest.raises(HvHostError, match="qemu-img could not convert"):
        convert(broken, tmp_path / "new.vhdx", NewImage(), lambda *_: None)
    assert not (tmp_path / "new.vhdx").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HvHostError, match="qemu-utils"):
        convert(path, tmp_path / "new.vhdx", NewImage(), lambda *_: None)


def test_a_raw_image_is_raw_whatever_its_guest_wrote(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"QFI\xfb" + bytes(4092))
    assert foreign_format(path) is None and foreign_format(tmp_path) is None
