"""What a VHDX does no more than it must: reads at once, changes, growth, compaction."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.space import Space
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_compact import compact
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from hvhost.storage.vhdx_format import OFFSET_MASK, STATE_MASK, PayloadState
from simulated.damaged_images import vhdx
from simulated.image_files import MemoryFile, Write

MIB = 1 << 20
DIFFERENCING: dict[str, Any] = {"locator": {"parent_linkage": "x"}}


class AskedFile(MemoryFile):
    """Knows how often data were asked of it that need no waiting, and may have none at hand."""

    asked = 0
    waits = False

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        self.asked += 1
        return not self.waits and super().read_now(offset, length, buffers)


def new(size: int = 4 * MIB, **options: Any) -> tuple[AskedFile, VhdxDisk]:
    file = AskedFile()
    create_vhdx(file, VhdxOptions(size, block_size=MIB, **options))
    file.recorded.clear()
    return file, VhdxDisk(file)


def write(disk: VhdxDisk, offset: int, data: bytes) -> None:
    disk.writev(offset, [memoryview(data)])


def states(disk: VhdxDisk) -> list[int]:
    return [disk.table.get(index) & STATE_MASK for index in range(disk.layout.block_count)]


def places(disk: VhdxDisk) -> list[int]:
    return [disk.table.get(index) & OFFSET_MASK for index in range(disk.layout.block_count)]


def test_only_what_is_whole_in_one_block_is_read_at_once() -> None:
    file, disk = new(3 * MIB + 4096)
    data = random.Random(1).randbytes(3 * MIB + 4096)
    for offset in (0, MIB, 3 * MIB):  # the third block stays empty
        write(disk, offset, data[offset : offset + MIB])
    buffer = memoryview(bytearray(4096))

    def now(offset: int) -> bool:
        return disk.read_now(offset, len(buffer), [buffer])

    for offset in (0, 2 * MIB - 4096, 3 * MIB):
        assert now(offset) and buffer == data[offset : offset + 4096]
    asked = file.asked
    for offset in (-512, MIB - 512, 2 * MIB, 3 * MIB - 512, 3 * MIB + 512, 4 * MIB):
        assert not now(offset), offset
    assert file.asked == asked, "what is elsewhere, or nowhere, is not looked for in the file"
    file.waits = True
    assert not now(0), "what the host has not at hand"


def test_before_the_first_block_is_not_the_last_one() -> None:
    file, disk = new(8190 * MIB)  # whose last entry is where one before the first would be
    write(disk, 8189 * MIB, b"x" * MIB)
    assert disk.read_now(8190 * MIB - 4096, 4096, [memoryview(bytearray(4096))])
    assert not disk.read_now(-4096, 4096, [memoryview(bytearray(4096))])
    assert file.asked == 1


def test_a_disk_that_is_only_read_is_not_even_flushed() -> None:
    file = MemoryFile(vhdx())
    disk = VhdxDisk(file, read_only=True)
    disk.flush()
    disk.close()
    disk.close()
    assert file.recorded == []


def test_a_second_close_writes_nothing() -> None:
    file, disk = new()
    write(disk, 0, b"x" * 512)
    disk.close()
    file.recorded.clear()
    disk.close()
    assert file.recorded == []


def test_a_parent_of_other_sectors() -> None:
    _, child = new(**DIFFERENCING)
    for sector, fits in ((512, True), (4096, False)):
        parent = VhdxDisk(MemoryFile(vhdx(logical_sector_size=sector)), read_only=True)
        if fits:
            child.attach(parent)
        else:
            with pytest.raises(DiskError, match="differ in their sector size"):
                child.attach(parent)


def test_changes_are_announced_once() -> None:
    """Another header for each would tell its children that a parent has changed again."""
    _, disk = new()
    write(disk, 0, b"x" * 512)
    header = disk.journal.header
    write(disk, MIB, b"x" * 512)
    disk.flush()
    disk.unmap(MIB, MIB)
    disk.resize(8 * MIB)
    assert disk.journal.header is header


@pytest.mark.parametrize("size", [0, -512, 4 * MIB + 100, (64 << 40) + 512])
def test_sizes_it_cannot_have(size: int) -> None:
    file, disk = new()
    with pytest.raises(HvHostError, match=f"cannot have {size} bytes"):
        disk.resize(size)
    assert file.recorded == []


def test_the_size_it_has_already() -> None:
    file, disk = new()
    disk.resize(4 * MIB)
    assert file.recorded == [] and not disk.journal.active


def test_a_child_that_grows_takes_only_what_it_must() -> None:
    """Where its parent had data beyond its end there are zeros now; whole blocks stay parents'."""
    parent = VhdxDisk(MemoryFile(vhdx()))
    write(parent, 0, b"p" * 4 * MIB)
    file, child = new(**DIFFERENCING)
    child.attach(parent)
    child.resize(2 * MIB)
    before = file.size()
    child.resize(4 * MIB)
    assert file.size() == before and states(child) == [0, 0, PayloadState.ZERO, PayloadState.ZERO]
    buffer = memoryview(bytearray(4 * MIB))
    child.readv(0, [buffer])
    assert buffer == b"p" * 2 * MIB + bytes(2 * MIB)


# --- compaction ---------------------------------------------------------------------------------


def progress(done: int, total: int) -> None:
    assert 0 <= done <= total


def test_a_fixed_disk_is_not_compacted() -> None:
    file, disk = new(fixed=True)
    with pytest.raises(HvHostError, match="is fixed; convert it to a dynamic one"):
        compact(disk, progress)
    assert file.recorded == []


def test_what_a_compaction_does() -> None:
    """Zeros go, what is last moves to the first gap, and what has no gap before it stays."""
    file, disk = new(8 * MIB)
    for block, data in ((0, b"a"), (1, b"\0"), (2, b"c"), (3, b"\0"), (4, b"e"), (5, b"f")):
        write(disk, block * MIB, data * MIB)
    before = places(disk)
    assert before[:6] == [(4 + number) * MIB for number in range(6)]
    compact(disk, progress)
    assert states(disk) == [6, 2, 6, 2, 6, 6, 0, 0]
    assert [each // MIB for each in places(disk)] == [4, 0, 6, 0, 7, 5, 0, 0]
    assert file.size() == 8 * MIB
    buffer = memoryview(bytearray(6 * MIB))
    disk.readv(0, [buffer])
    assert buffer == b"".join(each * MIB for each in (b"a", b"\0", b"c", b"\0", b"e", b"f"))
    file.recorded.clear()
    compact(disk, progress)
    moved = [each for each in file.recorded if isinstance(each, Write) and each.offset >= 4 * MIB]
    assert moved == [], "there is nothing left to do"


def test_zeros_of_a_block_in_part_stay() -> None:
    """Around them are its parent's data, which would go with it."""
    parent = VhdxDisk(MemoryFile(vhdx()))
    write(parent, 0, b"p" * 4 * MIB)
    _, child = new(**DIFFERENCING)
    child.attach(parent)
    write(child, MIB + 4096, bytes(8192))
    compact(child, progress)
    buffer = memoryview(bytearray(MIB))
    child.readv(MIB, [buffer])
    assert buffer == b"p" * 4096 + bytes(8192) + b"p" * (MIB - 12288)
    assert states(child)[1] == PayloadState.PARTIALLY_PRESENT


def test_gaps_are_taken_where_they_are_long_enough() -> None:
    extents = [(0, MIB), (2 * MIB, MIB), (5 * MIB, MIB)]
    file = MemoryFile(bytes(10 * MIB))
    space = Space(file, extents, MIB)
    assert space.free == (1 + 2 + 4) * MIB
    assert space.allocate_gap(2 * MIB, below=5 * MIB) == 3 * MIB
    assert space.allocate_gap(2 * MIB, below=6 * MIB) is None
    assert space.allocate_gap(MIB, below=2 * MIB) == MIB
    assert space.free == 4 * MIB and space.allocate(4 * MIB) == 6 * MIB
    assert space.allocate(MIB) == 10 * MIB and file.size() == 11 * MIB
