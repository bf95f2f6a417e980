"""VHDX and VHD hold what was written to them, whatever is done to them in between."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.storage.disk import ImageDisk
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_compact import compact
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from simulated.image_files import MemoryFile

MIB = 1 << 20


def read(disk: ImageDisk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk.readv(offset, [memoryview(data)])
    return bytes(data)


def write(disk: ImageDisk, offset: int, data: bytes) -> None:
    half = len(data) // 1024 * 512
    disk.writev(offset, [memoryview(data)[:half], memoryview(data)[half:]])


@dataclass(frozen=True)
class Kind:
    """A kind of image to try; *parent_size* makes it a differencing one."""

    vhd: bool = False
    fixed: bool = False
    sector: int = 512
    block_size: int = MIB
    parent_size: int | None = None

    def new(self, size: int) -> MemoryFile:
        file = MemoryFile()
        differs = self.parent_size is not None
        if self.vhd:
            parent = VhdParent(bytes(16), "a", "b") if differs else None
            create_vhd(file, VhdOptions(size, self.fixed, self.block_size, parent))
        else:
            locator = {"parent_linkage": "x"} if differs else {}
            options = VhdxOptions(size, self.fixed, self.block_size, self.sector, locator=locator)
            create_vhdx(file, options)
        return file

    def open(self, file: MemoryFile, parent: bytes) -> VhdxDisk | VhdDisk:
        disk = VhdDisk(file) if self.vhd else VhdxDisk(file)
        if self.parent_size is not None:
            disk.attach(VhdxDisk(MemoryFile(parent), read_only=True))
        return disk


def parent_image(kind: Kind, contents: bytes) -> bytes:
    file = MemoryFile()
    options = VhdxOptions(len(contents), block_size=MIB, logical_sector_size=kind.sector)
    create_vhdx(file, options)
    disk = VhdxDisk(file)
    disk.writev(0, [memoryview(contents)])
    disk.close()
    return bytes(file.content)


KINDS = [
    Kind(),
    Kind(sector=4096, block_size=2 * MIB),
    Kind(fixed=True),
    Kind(parent_size=4 * MIB),
    Kind(parent_size=7 * MIB, sector=4096),
    Kind(parent_size=MIB + 4096, block_size=2 * MIB),
    Kind(vhd=True),
    Kind(vhd=True, fixed=True),
    Kind(vhd=True, parent_size=4 * MIB),
]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 2**32))
@example(KINDS[3], 0)
@example(KINDS[4], 1)
@example(KINDS[8], 2)
def test_a_disk_is_like_memory(kind: Kind, seed: int) -> None:
    """Writes, unmaps, resizes, compaction and reopening, against a bytearray."""
    chance = random.Random(seed)
    model = bytearray(chance.choice([4 * MIB, 3 * MIB + 4096 * 3]))
    parent = b""
    if kind.parent_size is not None:
        contents = chance.randbytes(kind.parent_size)
        parent = parent_image(kind, contents)
        model[: kind.parent_size] = contents[: len(model)]
    file = kind.new(len(model))
    disk = kind.open(file, parent)
    for _ in range(25):
        what = chance.random()
        offset = chance.randrange(len(model) // kind.sector) * kind.sector
        length = chance.choice([kind.sector, 3 * kind.sector, 65536, MIB, 2 * MIB])
        length = min(length, len(model) - offset)
        if what < 0.5:
            data = chance.randbytes(length)
            write(disk, offset, data)
            model[offset : offset + length] = data
        elif what < 0.75:
            disk.unmap(offset, length)
            model[offset : offset + length] = bytes(length)
        elif what < 0.8:
            disk.flush()
        elif what < 0.9 and not (kind.vhd and kind.parent_size):
            size = chance.randrange(1, 10 * MIB // kind.sector) * kind.sector
            disk.resize(size)
            model = model[:size].ljust(size, b"\0")
        elif what < 0.95 and isinstance(disk, VhdxDisk) and not kind.fixed:
            compact(disk, lambda done, total: None)
        else:
            disk.close()
            disk = kind.open(file, parent)
        assert read(disk, 0, len(model)) == model
    disk.close()
    assert read(kind.open(file, parent), 0, len(model)) == model


# --- on the host's files ------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> VhdxDisk:
    made = create_disk(tmp_path / "a.vhdx", VhdxOptions(64 * MIB, block_size=2 * MIB))
    assert isinstance(made, VhdxDisk)
    return made


def test_a_read_of_a_block_that_is_there_is_one_call(
    disk: VhdxDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(disk, 0, bytes(2 * MIB))
    calls: list[int] = []
    honest = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return honest(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    disk.readv(65536, [memoryview(bytearray(4096))] * 16)
    assert calls == [16]


def test_unmapping_gives_storage_back(disk: VhdxDisk) -> None:
    write(disk, 0, b"x" * 8 * MIB)
    disk.flush()
    full = disk.allocated
    disk.unmap(0, 4 * MIB)
    disk.flush()
    assert disk.allocated <= full - 4 * MIB + 65536, "whole blocks"
    disk.unmap(4 * MIB + 4096, 512 * 1024)
    assert disk.allocated <= full - 4 * MIB - 512 * 1024 + 65536, "part of a block"
    size = disk.file.size()
    write(disk, 20 * MIB, b"y" * 4 * MIB)
    assert disk.file.size() == size, "the place of what was unmapped is used again"
    assert read(disk, 20 * MIB, MIB) == b"y" * MIB and read(disk, 0, MIB) == bytes(MIB)
    disk.close()


def test_unmapping_a_fixed_disk_leaves_holes(tmp_path: Path) -> None:
    options = VhdxOptions(16 * MIB, fixed=True, block_size=2 * MIB)
    disk = create_disk(tmp_path / "a.vhdx", options)
    before = disk.allocated
    assert before >= 16 * MIB
    disk.unmap(2 * MIB, 6 * MIB)
    assert disk.allocated <= before - 6 * MIB + 65536  # the first change writes to the log
    disk.close()


def test_what_the_host_cannot_store_can_be_tried_again(
    disk: VhdxDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC, wherever it comes in a write and its flush, loses nothing and breaks nothing."""
    write(disk, 0, b"a" * 4096)
    disk.flush()
    honest = os.pwritev
    for failing in range(6):
        calls = 0

        def full(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
            nonlocal calls
            calls += 1
            if calls > failing:  # noqa: B023
                raise OSError(errno.ENOSPC, "no space")
            return honest(descriptor, buffers, offset)

        offset, data = (failing + 1) * 4 * MIB, bytes([failing + 1]) * 4096
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", full)
            try:
                write(disk, offset, data)
                disk.flush()
            except OSError as error:
                assert error.errno == errno.ENOSPC
        write(disk, offset, data)
        disk.flush()
    path = Path(disk.file.name)
    disk.close()
    again = open_disk(path)
    assert read(again, 0, 4096) == b"a" * 4096
    for failing in range(6):
        assert read(again, (failing + 1) * 4 * MIB, 4096) == bytes([failing + 1]) * 4096
    again.close()


def test_identity_and_rules(tmp_path: Path) -> None:
    for name, options in (("a.vhdx", VhdxOptions(4 * MIB)), ("a.vhd", VhdOptions(4 * MIB))):
        path = tmp_path / name
        disk = create_disk(path, options)
        identity = disk.identifier
        for wrong in (-512, 4 * MIB):
            with pytest.raises(LocalProtocolError):
                disk.readv(wrong, [memoryview(bytearray(512))])
            with pytest.raises(LocalProtocolError):
                disk.writev(wrong, [memoryview(bytearray(512))])
            with pytest.raises(LocalProtocolError):
                disk.unmap(wrong, 512)
        for size in (0, 1000, 1 << 62):
            with pytest.raises(HvHostError, match="cannot have"):
                disk.resize(size)
        disk.close()
        disk = open_disk(path, read_only=True)
        assert disk.identifier == identity
        before = path.read_bytes()
        with pytest.raises(HvHostError, match="open for reading only"):
            disk.writev(0, [memoryview(bytes(512))])
        disk.close()
        assert path.read_bytes() == before
        with pytest.raises(FileExistsError):
            create_disk(path, options)


def test_opening_for_writing_changes_nothing_until_written(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    create_disk(path, VhdxOptions(4 * MIB)).close()
    before = path.read_bytes()
    disk = open_disk(path)
    read(disk, 0, 4096)
    disk.flush()
    disk.close()
    assert path.read_bytes() == before


def test_new_guids_for_what_was_written(tmp_path: Path) -> None:
    """MS-VHDX 2.2.2: both GUIDs change with the first write, and once only."""
    path = tmp_path / "a.vhdx"
    disk = create_disk(path, VhdxOptions(4 * MIB))
    assert isinstance(disk, VhdxDisk)
    headers = [disk.journal.header]
    for _ in range(2):
        write(disk, 0, b"x" * 4096)
        headers.append(disk.journal.header)
    assert headers[1] is headers[2]
    assert headers[0].file_write_guid != headers[1].file_write_guid
    assert headers[0].data_write_guid != headers[1].data_write_guid
    assert headers[0].sequence_number < headers[1].sequence_number
    disk.close()
    assert disk.journal.header.log_guid.int == 0


OPTIONS: list[Callable[[], object]] = [
    lambda: VhdxOptions(4 * MIB, block_size=512 * 1024),
    lambda: VhdxOptions(4 * MIB, block_size=3 * MIB),
    lambda: VhdxOptions(4 * MIB, block_size=512 * MIB),
    lambda: VhdxOptions(4 * MIB, logical_sector_size=1024),
    lambda: VhdxOptions(65 << 40),
    lambda: VhdxOptions(1000),
    lambda: VhdOptions(3 << 40),
    lambda: VhdOptions(4 * MIB, block_size=3 * MIB),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_images_that_cannot_be(tmp_path: Path, options: Callable[[], VhdxOptions]) -> None:
    with pytest.raises(HvHostError):
        create_disk(tmp_path / "a", options())
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_is_the_same_disk_to_the_guest(tmp_path: Path) -> None:
    base, other = tmp_path / "a.vhdx", tmp_path / "a.vhd"
    disk = create_disk(base, VhdxOptions(4 * MIB))
    disk.close()
    for same_disk in (True, False):
        path = tmp_path / f"{same_disk}.vhdx"
        child = create_disk(path, differencing_options(path, base, same_disk=same_disk))
        assert (child.identifier == disk.identifier) is same_disk
        child.close()
    create_disk(other, VhdOptions(4 * MIB)).close()
    with pytest.raises(HvHostError, match="is no VHDX"):
        differencing_options(tmp_path / "b.vhd", other, same_disk=True)


def test_a_raw_image_is_no_parent(tmp_path: Path) -> None:
    create_disk(tmp_path / "a.img", MIB).close()
    with pytest.raises(HvHostError, match="is raw"):
        differencing_options(tmp_path / "b.vhdx", tmp_path / "a.img")
