"""What a disk held at one moment is in the copy, whatever its guest does meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.storage.backup_base import GRAIN, Difference, Keeper, Whole
from hvhost.storage.disk import Disk
from hvhost.storage.file import HostFile
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.raw import RawDisk
from hvhost.storage.shared_copy import SharedCopy
from hvhost.storage.snapshot import CHUNK, STEP, Snapshot
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from simulated.image_files import MemoryFile

SECTOR = 512
SIZE = 40 * CHUNK + 3 * SECTOR
MIB = 1 << 20


def content(disk: Disk) -> bytes:
    data = bytearray(disk.size)
    disk.readv(0, [memoryview(data)])
    return bytes(data)


def copy_all(snapshot: Snapshot) -> None:
    chunk = 0
    while (piece := snapshot.take(chunk)) is not None:
        snapshot.put(piece)
        chunk = piece.following


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "unmap", "copy"]),
        st.integers(0, SIZE // SECTOR - 1),
        st.integers(1, 3 * CHUNK // SECTOR),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["img", "vhdx"]), st.none() | STEPS, STEPS, STEPS)
def test_the_copy_is_what_the_disk_was(
    suffix: str,
    earlier: list[tuple[str, int, int]] | None,
    before: list[tuple[str, int, int]],
    meanwhile: list[tuple[str, int, int]],
) -> None:
    """By itself, or on top of an *earlier* copy whose content has little to do with it."""
    with TemporaryDirectory() as name:
        disk = create_disk(
            Path(name, f"disk.{suffix}"),
            SIZE if suffix == "img" else VhdxOptions(SIZE, block_size=MIB),
        )
        model = bytearray(SIZE)

        def change(to: Disk, kind: str, sector: int, sectors: int) -> None:
            offset, end = sector * SECTOR, min((sector + sectors) * SECTOR, SIZE)
            if kind == "write":
                data = os.urandom(end - offset)
                to.writev(offset, [memoryview(data)])
            else:
                data = bytes(end - offset)
                to.unmap(offset, end - offset)
            model[offset:end] = data

        file, base_file = Path(name, "copy.vhdx"), Path(name, "base.vhdx")
        keeper: Keeper
        if earlier is None:
            target = create_disk(file, VhdxOptions(SIZE, block_size=MIB))
            keeper = Whole(target)
        else:
            base = create_disk(base_file, VhdxOptions(SIZE, block_size=MIB))
            for step in earlier:
                change(base, *step)
            base.writev(0, [memoryview(model)[:SIZE]])
            base.close()
            base = open_disk(base_file, read_only=True)
            target = create_disk(file, differencing_options(file, base_file, same_disk=True))
            keeper = Difference(base, target)
            model = bytearray(SIZE)
        for step in before:
            change(disk, *step)
        then = bytes(model)
        snapshot = Snapshot(disk, keeper)
        chunk: int | None = 0
        for step in meanwhile:
            if step[0] != "copy":
                change(snapshot, *step)
            elif chunk is not None:
                # What was read is written only after the guest had its turn.
                piece = snapshot.take(chunk)
                if piece is not None:
                    change(snapshot, "write", piece.offset // SECTOR, step[2])
                    snapshot.put(piece)
                chunk = None if piece is None else piece.following
        copy_all(snapshot)
        assert snapshot.problem is None
        target.close()
        target = open_disk(file, read_only=True)
        assert content(target) == then
        assert content(disk) == model == content(snapshot)
        target.close()
        snapshot.close()


class FailingTarget(RawDisk):
    """A disk that takes nothing."""

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_copy_that_fails_does_not_fail_the_guest(tmp_path: Path) -> None:
    disk = create_disk(tmp_path / "disk.img", SIZE)
    disk.writev(0, [memoryview(b"\1" * SECTOR)])
    create_disk(tmp_path / "copy.img", SIZE).close()
    snapshot = Snapshot(disk, Whole(FailingTarget(tmp_path / "copy.img")))
    snapshot.writev(0, [memoryview(b"\2" * SECTOR)])
    assert snapshot.problem is not None and "No space left" in snapshot.problem
    assert content(disk)[:SECTOR] == b"\2" * SECTOR
    snapshot.writev(CHUNK, [memoryview(b"\3" * SECTOR)])
    assert content(disk)[CHUNK : CHUNK + SECTOR] == b"\3" * SECTOR


def test_empty_parts_are_passed_over(tmp_path: Path) -> None:
    disk = create_disk(tmp_path / "disk.vhdx", VhdxOptions(1 << 40))
    disk.writev(1 << 39, [memoryview(b"\1" * SECTOR)])
    target = create_disk(tmp_path / "copy.vhdx", VhdxOptions(1 << 40))
    snapshot = Snapshot(disk, Whole(target))
    snapshot._kept[: (1 << 39) // CHUNK - STEP] = b"\1" * ((1 << 39) // CHUNK - STEP)
    piece = snapshot.take(0)
    assert piece is not None and piece.offset == 1 << 39 and piece.data[0] == 1
    rest = snapshot.take(piece.following)
    assert rest is not None and not rest.data and rest.following > piece.following + STEP


def test_a_disk_that_is_copied_keeps_its_size(tmp_path: Path) -> None:
    disk = create_disk(tmp_path / "disk.img", SIZE)
    snapshot = Snapshot(disk, Whole(create_disk(tmp_path / "copy.img", SIZE)))
    with pytest.raises(HvHostError, match="backed up"):
        snapshot.resize(SIZE + SECTOR)


def test_only_what_is_different_is_stored(tmp_path: Path) -> None:
    base_file, file = tmp_path / "base.vhdx", tmp_path / "copy.vhdx"
    old = os.urandom(CHUNK)
    base = create_disk(base_file, VhdxOptions(SIZE))
    base.writev(0, [memoryview(old)])
    base.close()
    base = open_disk(base_file, read_only=True)
    keeper = Difference(
        base, create_disk(file, differencing_options(file, base_file, same_disk=True))
    )
    new = bytearray(old)
    new[GRAIN] ^= 1
    new[-1] ^= 1
    keeper.put(0, memoryview(new))
    keeper.put_zeros(CHUNK, SIZE - CHUNK)
    assert keeper.stored == 2 * GRAIN
    assert content(keeper.target) == new + bytes(SIZE - CHUNK)


def test_what_cannot_share_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks in no file of the host, and block devices: beside those no second file is made."""
    memory = MemoryFile()
    create_vhdx(memory, VhdxOptions(SIZE))
    assert SharedCopy.prepare(VhdxDisk(memory)) is None
    path = tmp_path / "disk.img"
    disk = RawDisk.create(path, SIZE)
    monkeypatch.setattr(HostFile, "share_with", lambda self, descriptor: None)
    copy = SharedCopy.prepare(disk)
    assert copy is not None and len(list(tmp_path.iterdir())) == 2
    copy.close()
    disk.file.is_device = True
    assert SharedCopy.prepare(disk) is None and list(tmp_path.iterdir()) == [path]
    disk.close()
