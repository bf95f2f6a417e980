"""Raw images, and what the host's file gives every format: locks, holes, vectors, errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.storage.disk import Disk
from hvhost.storage.file import IOV_MAX, HostFile
from hvhost.storage.raw import RawDisk

MIB = 1 << 20


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def test_data_lands_where_it_was_written(tmp_path: Path) -> None:
    disk: Disk = RawDisk.create(tmp_path / "a.img", MIB)
    disk.writev(4096, views(b"a" * 512, b"b" * 1024))
    buffers = views(bytes(1024), bytes(512))
    disk.readv(4096, buffers)
    assert b"".join(buffers) == b"a" * 512 + b"b" * 1024
    disk.close()
    disk.close()
    assert (tmp_path / "a.img").read_bytes()[4096:4608] == b"a" * 512


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    disk = RawDisk.create(tmp_path / "a.img", 2 * MIB)
    parts = [bytes([number % 251]) * 512 for number in range(IOV_MAX + 100)]
    disk.writev(512, views(*parts))
    buffers = views(*[bytes(512)] * len(parts))
    disk.readv(512, buffers)
    assert b"".join(buffers) == b"".join(parts)
    disk.close()


def test_unmapped_ranges_read_zeros_and_take_no_storage(tmp_path: Path) -> None:
    disk = RawDisk.create(tmp_path / "a.img", MIB)
    disk.writev(0, views(b"x" * MIB))
    disk.flush()
    before = disk.allocated
    disk.unmap(512, MIB - 1024)
    data = bytearray(MIB)
    disk.readv(0, [memoryview(data)])
    assert data == b"x" * 512 + bytes(MIB - 1024) + b"x" * 512
    assert disk.allocated <= before - MIB + 3 * 4096
    disk.close()


def test_the_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    disk = RawDisk.create(path, MIB)
    with pytest.raises(HvHostError, match=rf"written to now, because this process \({os.getpid()}"):
        RawDisk(path)
    with pytest.raises(HvHostError, match="cannot be read now"):
        RawDisk(path, read_only=True)
    disk.close()
    readers = [RawDisk(path, read_only=True) for _ in range(2)]
    with pytest.raises(HvHostError, match="cannot be written to"):
        RawDisk(path)
    for reader in readers:
        reader.close()
    RawDisk(path).close()


def test_the_holder_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    RawDisk.create(path, MIB).close()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        RawDisk(path)
        os.write(ready[1], b"1")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    with pytest.raises(HvHostError, match=rf"process {child} \("):
        RawDisk(path)
    os.write(go[1], b"1")
    os.waitpid(child, 0)
    RawDisk(path).close()


def test_a_read_only_disk_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    RawDisk.create(path, MIB).close()
    disk = RawDisk(path, read_only=True)
    with pytest.raises(HvHostError, match="open for reading only"):
        disk.writev(0, views(b"x" * 512))
    with pytest.raises(HvHostError, match="open for reading only"):
        disk.unmap(0, 512)
    with pytest.raises(HvHostError, match="open for reading only"):
        disk.resize(2 * MIB)
    disk.close()


def test_ranges_outside_are_our_own_mistake(tmp_path: Path) -> None:
    disk = RawDisk.create(tmp_path / "a.img", MIB)
    for offset in (-512, MIB, MIB - 512):
        with pytest.raises(LocalProtocolError):
            disk.readv(offset, views(bytes(1024)))
    disk.close()


def test_resize_and_identity(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    disk = RawDisk.create(path, MIB)
    identity = disk.identifier
    disk.resize(2 * MIB)
    disk.writev(2 * MIB - 512, views(b"z" * 512))
    disk.close()
    disk = RawDisk(path)
    assert disk.size == 2 * MIB and disk.identifier == identity
    with pytest.raises(HvHostError, match="multiple of 512"):
        disk.resize(1000)
    disk.close()


def test_errors_of_the_host_go_up(tmp_path: Path) -> None:
    """A file cut behind our back reads as EIO; a full device (/dev/full's errno) as ENOSPC."""
    path = tmp_path / "a.img"
    disk = RawDisk.create(path, MIB)
    os.truncate(path, 4096)
    with pytest.raises(OSError) as caught:
        disk.readv(4096, views(bytes(512)))
    assert caught.value.errno == errno.EIO
    disk.close()
    with pytest.raises(HvHostError, match="neither a file nor a block device"):
        RawDisk(Path("/dev/full"))
    with pytest.raises(FileNotFoundError):
        RawDisk(tmp_path / "none.img")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_flush_every_flush_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Also one for want of room, which is not waited for: room brings nothing back."""
    RawDisk.create(tmp_path / "a.img", MIB).close()
    file = HostFile(tmp_path / "a.img", read_only=False)

    def broken(descriptor: int) -> None:
        raise OSError(error, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="broken"):
            file.flush()
    with pytest.raises(OSError, match="an earlier flush failed") as caught:
        file.flush()
    assert caught.value.errno == errno.EIO
    file.close()
