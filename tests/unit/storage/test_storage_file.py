"""What the host's files cannot do, and what they say when asked for it."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.storage import file as file_module
from hvhost.storage.file import HostFile, write_all
from hvhost.storage.raw import RawDisk

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * MIB)
    return path


@pytest.fixture
def file(path: Path) -> HostFile:
    return HostFile(path, read_only=False)


def failing(number: int) -> Callable[..., None]:
    def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    return fallocate


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV])
def test_where_there_are_no_holes_zeros_are_written(
    file: HostFile, path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(file_module, "_fallocate", failing(number))
    file.clear(512, 65536)
    assert path.read_bytes() == b"x" * 512 + bytes(65536) + b"x" * (MIB - 512 - 65536)
    file.reserve(MIB, 4096)
    file.reserve(0, 4096)
    assert file.size() == MIB + 4096, "extended, and not cut"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_other_errors_of_making_room_go_up(
    file: HostFile, path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(file_module, "_fallocate", failing(number))
    with pytest.raises(OSError) as caught:
        file.clear(0, 65536)
    assert caught.value.errno == number
    with pytest.raises(OSError) as caught:
        file.reserve(MIB, 4096)
    assert caught.value.errno == number
    assert path.read_bytes() == b"x" * MIB


class Interrupted:
    """A C library whose ``fallocate`` ends with these errors in turn; 0 is none."""

    def __init__(self, *errors: int) -> None:
        self.errors = list(errors)

    def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> int:
        ctypes.set_errno(self.errors.pop(0))
        return -1 if ctypes.get_errno() else 0


def test_a_signal_is_no_error(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Interrupted(errno.EINTR, errno.EINTR, 0)
    monkeypatch.setattr(file_module, "_libc", library)
    file.reserve(0, 4096)
    assert library.errors == []
    monkeypatch.setattr(file_module, "_libc", Interrupted(errno.EINTR, errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        file.reserve(0, 4096)
    assert caught.value.errno == errno.ENOSPC


def test_data_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    path.touch()
    os.truncate(path, MIB)
    file = HostFile(path, read_only=False)
    assert not file.may_have_data(0, MIB)
    write_all(file, 65536, b"x" * 4096)
    assert file.may_have_data(0, MIB) and file.may_have_data(65536, 4096)
    assert not file.may_have_data(0, 65536) and not file.may_have_data(MIB // 2, MIB // 2)
    assert not file.may_have_data(2 * MIB, 4096), "beyond the end"
    file.close()
    with pytest.raises(OSError) as caught:
        file.may_have_data(0, 4096)
    assert caught.value.errno == errno.EBADF


def test_a_device_of_the_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played by a file that says it is one: not every computer has a loop device."""
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        return os.stat_result((stat.S_IFBLK | 0o600, *real(descriptor)[1:]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        file = HostFile(path, read_only=False)
    assert file.is_device and file.allocated() == file.size() == MIB
    file.clear(0, MIB)
    assert file.may_have_data(0, MIB), "what it has nobody can tell"
    with pytest.raises(HvHostError, match="a device of the host; its size cannot be set"):
        file.truncate(2 * MIB)
    assert file.size() == MIB


@pytest.mark.parametrize("name", ["/dev/null", "/"])
def test_what_is_no_image(name: str) -> None:
    with pytest.raises(HvHostError, match="neither a file nor a block device"):
        HostFile(Path(name), read_only=True)


# --- raw disks ----------------------------------------------------------------------------------


def test_a_raw_disk_reads_at_once_what_is_on_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file's last bytes, those are not on it that make no whole sector."""
    os.truncate(path, MIB + 2048)
    disk = RawDisk(path, logical_sector_size=4096)
    buffer = memoryview(bytearray(2048))
    disk.readv(0, [buffer])  # so that the host has it at hand
    disk.readv(MIB - 2048, [buffer])
    assert disk.size == MIB
    # Where the host's file system can tell what it has at hand; where not, nothing is read so.
    can = disk.file.read_now(0, 2048, [buffer])
    assert disk.read_now(0, 2048, [buffer]) is disk.read_now(MIB - 2048, 2048, [buffer]) is can
    assert not disk.read_now(MIB, 2048, [buffer])
    assert not disk.read_now(MIB - 1024, 2048, [buffer])
    disk.may_have_data(0, 4096)  # which moves to there what -1 stands for
    assert not disk.read_now(-1, 2048, [buffer])
    monkeypatch.setattr(HostFile, "read_now", lambda *_: False)
    assert not disk.read_now(0, 2048, [buffer]), "what the host has not at hand"


@pytest.mark.parametrize("size", [0, -512, 100, 513])
def test_sizes_that_no_raw_disk_has(tmp_path: Path, size: int) -> None:
    with pytest.raises(HvHostError, match=f"cannot have {size} bytes"):
        RawDisk.create(tmp_path / "new.img", size)
    assert not (tmp_path / "new.img").exists()
    disk = RawDisk.create(tmp_path / "other.img", MIB)
    with pytest.raises(HvHostError, match=f"cannot have {size} bytes"):
        disk.resize(size)
    assert disk.size == MIB == disk.file.size()
