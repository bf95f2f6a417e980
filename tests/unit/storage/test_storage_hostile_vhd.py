"""VHD images that were cut, or made to mislead: refused with a sentence, or read as they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhd_format import DynamicHeader, Footer, ParentLocator
from hvhost.storage.vhd_parent import parent_paths
from hvhost.storage.vhdx import VhdxDisk
from simulated.damaged_images import (
    put_vhd_entry,
    refusal,
    vhd,
    vhdx,
    with_dynamic_header,
    with_footer,
)
from simulated.image_files import MemoryFile

MIB = 1 << 20
GIB = 1 << 30


def differencing() -> VhdDisk:
    file = MemoryFile()
    create_vhd(file, VhdOptions(4 * MIB, block_size=MIB, parent=VhdParent(bytes(16), "a", "b")))
    return VhdDisk(file)


# --- footers ------------------------------------------------------------------------------------


def test_a_footer_that_a_crash_lost_is_taken_from_the_first_sector() -> None:
    content = vhd()
    first = bytes(content[:512])
    for damaged in (content[:-512] + bytes(512), content[:-512] + content[-512:-1] + b"x"):
        assert VhdDisk(MemoryFile(damaged)).footer == Footer.unpack(first)
    other = with_footer(vhd(), unique_id=b"the one that counts"[:16])
    other[:512] = first
    assert VhdDisk(MemoryFile(other)).identifier.bytes == b"the one that cou"


def test_the_first_sector_of_a_fixed_disk_is_its_guest_s() -> None:
    """A footer that a guest put there does not stand in for the one that was cut."""
    content = vhd(fixed=True)
    content[:512] = content[-512:]
    VhdDisk(MemoryFile(content)).close()
    for cut in (content[:-512], content[:MIB], content[:512]):
        assert "no valid VHD footer" in refusal(cut)


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_file_too_short_for_a_footer(size: int) -> None:
    assert "no valid VHD footer" in refusal(bytes(size))


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("size", [0, 4 * MIB - 100, 2040 * GIB + 512])
def test_sizes_that_no_vhd_can_have(fixed: bool, size: int) -> None:
    content = with_footer(vhd(fixed=fixed), current_size=size)
    assert f"holds a disk of {size} bytes; no VHD can" in refusal(content)


def test_a_fixed_disk_that_was_cut() -> None:
    content = vhd(fixed=True)
    assert "shorter than its disk" in refusal(content[: 2 * MIB] + content[-512:])
    assert "shorter than its disk" in refusal(content[:-1024] + content[-512:])


@pytest.mark.parametrize("kind", [0, 1, 5, 6])
def test_a_kind_of_disk_nobody_knows(kind: int) -> None:
    assert f"a VHD of type {kind}; it is unknown" in refusal(with_footer(vhd(), disk_type=kind))


# --- dynamic disks ------------------------------------------------------------------------------


def moved_header(place: int) -> bytearray:
    """An image whose header is at *place*, where it would be whole."""
    content = vhd()
    footer = content[-512:]
    content = content[:-512].ljust(place + 1024, b"\0") + footer
    content[place : place + 1024] = content[512:1536]
    return with_footer(content, data_offset=place)


def test_a_header_where_none_can_be() -> None:
    VhdDisk(MemoryFile(moved_header(8192))).close()
    assert "its header outside the file" in refusal(moved_header(8200))
    content = vhd()
    for place in (len(content) - 512, len(content), 1 << 62, (1 << 64) - 512):
        assert "its header outside the file" in refusal(with_footer(content, data_offset=place))


def test_a_header_that_is_none() -> None:
    assert "no valid dynamic disk header" in refusal(with_dynamic_header(vhd(), cookie=b"cxsparsf"))
    content = vhd()
    content[512 + 1000] ^= 1
    assert "no valid dynamic disk header" in refusal(content)


@pytest.mark.parametrize("block", [0, 256, 3 * MIB, 512 * MIB, 1 << 31])
def test_blocks_of_no_size_they_can_have(block: int) -> None:
    assert f"blocks of {block} bytes" in refusal(with_dynamic_header(vhd(), block_size=block))


@pytest.mark.parametrize(
    "changes",
    [
        {"maximum_table_entries": 3},
        {"maximum_table_entries": 1 << 31},
        {"maximum_table_entries": 1024},
        {"table_offset": 1 << 63},
    ],
)
def test_a_table_that_does_not_fit(changes: dict[str, int]) -> None:
    assert "a block table that does not fit" in refusal(with_dynamic_header(vhd(), **changes))


@pytest.mark.parametrize(
    ("sectors", "said"),
    [
        ([0], "two things at one place, at 0"),
        ([1], "two things at one place, at 512"),
        ([3], "two things at one place, at 1536"),
        ([8, 8], "two things at one place, at 4096"),
        ([8, 2056], "two things at one place, at 1052672"),
        ([4096], "a block outside the file"),
        ([0xFFFFFFFE], "a block outside the file"),
    ],
)
def test_blocks_that_cannot_be(sectors: list[int], said: str) -> None:
    """Else a guest that writes to one changes another, or the table."""
    content = vhd()
    content = content[:-512].ljust(2 * MIB, b"\0") + content[-512:]
    put_vhd_entry(content, 0, 8)
    VhdDisk(MemoryFile(content)).close()
    for block, sector in enumerate(sectors):
        put_vhd_entry(content, block, sector)
    assert said in refusal(content)


def test_the_table_is_where_nothing_else_is() -> None:
    assert "two things at one place" in refusal(with_dynamic_header(vhd(), table_offset=512))
    assert "two things at one place" in refusal(with_dynamic_header(vhd(), table_offset=0))


# --- parents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        (1 << 62, 20),
        (0, 65538),
        (0, 0xFFFFFFFE),
    ],
)
def test_a_path_of_a_parent_that_cannot_be_one(tmp_path: Path, place: tuple[int, int]) -> None:
    """It is passed over: the other spellings still name the parent."""
    base, child = tmp_path / "base.vhd", tmp_path / "child.vhd"
    create_disk(base, VhdOptions(4 * MIB)).close()
    create_disk(child, differencing_options(child, base)).close()
    content = bytearray(child.read_bytes())
    content = content[:-512].ljust(MIB, b"x") + content[-512:]
    header = DynamicHeader.unpack(content, 512)
    offset, length = place
    wrong = ParentLocator(b"W2ru", length, length, 0, offset).pack()
    content = with_dynamic_header(content, locators=wrong + header.locators[len(wrong) :])
    child.write_bytes(content)
    disk = open_disk(child, read_only=True)
    assert isinstance(disk, VhdDisk)
    assert parent_paths(disk) == ["", str(base).replace("/", "\\"), "base.vhd"]
    disk.close()


def test_a_path_too_long_for_a_vhd(tmp_path: Path) -> None:
    for paths in (("a" * 1025, "b"), ("a", "b" * 1025)):
        file = MemoryFile()
        with pytest.raises(HvHostError, match="too long a path"):
            create_vhd(file, VhdOptions(4 * MIB, parent=VhdParent(bytes(16), *paths)))
        assert not file.recorded
    create_vhd(MemoryFile(), VhdOptions(4 * MIB, parent=VhdParent(bytes(16), "a" * 1024, "b")))


def test_a_parent_of_other_sectors() -> None:
    parent = VhdxDisk(MemoryFile(vhdx(logical_sector_size=4096)), read_only=True)
    with pytest.raises(DiskError, match="differ in their sector size"):
        differencing().attach(parent)


def test_a_differencing_disk_has_its_parent_s_size() -> None:
    with pytest.raises(HvHostError, match="whose size is its parent's"):
        differencing().resize(8 * MIB)


# --- what is asked of it ------------------------------------------------------------------------


SIZES: list[Callable[[], VhdOptions]] = [
    lambda: VhdOptions(0),
    lambda: VhdOptions(-512),
    lambda: VhdOptions(4 * MIB + 100),
    lambda: VhdOptions(2040 * GIB + 512),
]
BLOCKS: list[Callable[[], VhdOptions]] = [
    lambda: VhdOptions(4 * MIB, block_size=0),
    lambda: VhdOptions(4 * MIB, block_size=2048),
    lambda: VhdOptions(4 * MIB, block_size=3 * MIB),
    lambda: VhdOptions(4 * MIB, block_size=512 * MIB),
]


@pytest.mark.parametrize(
    ("options", "said"),
    [(each, "a VHD of .* cannot be") for each in SIZES]
    + [(each, "a block of .* cannot be") for each in BLOCKS],
)
def test_images_that_cannot_be_made(options: Callable[[], VhdOptions], said: str) -> None:
    file = MemoryFile()
    with pytest.raises(HvHostError, match=said):
        create_vhd(file, options())
    assert not file.recorded


class AskedFile(MemoryFile):
    """Knows how often data were asked of it that need no waiting."""

    asked = 0

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        self.asked += 1
        return super().read_now(offset, length, buffers)


def test_only_what_is_whole_in_one_block_is_read_at_once() -> None:
    file = AskedFile(vhd(3 * MIB + 4096))
    disk = VhdDisk(file)
    data = random.Random(1).randbytes(3 * MIB + 4096)
    for offset in (0, MIB, 3 * MIB):  # the third block stays empty
        disk.writev(offset, [memoryview(data)[offset : offset + MIB]])
    buffer = memoryview(bytearray(4096))

    def now(offset: int) -> bool:
        return disk.read_now(offset, len(buffer), [buffer])

    for offset in (0, 2 * MIB - 4096, 3 * MIB):
        assert now(offset) and buffer == data[offset : offset + 4096]
    asked = file.asked
    for offset in (-4096, -512, MIB - 512, 2 * MIB, 3 * MIB - 512, 3 * MIB + 512, 4 * MIB, 1 << 40):
        assert not now(offset), offset
    assert file.asked == asked, "what is elsewhere, or nowhere, is not looked for in the file"


def test_a_differencing_disk_reads_nothing_at_once() -> None:
    disk = differencing()
    disk.writev(0, [memoryview(bytes(MIB))])
    assert not disk.read_now(0, 512, [memoryview(bytearray(512))])


def test_a_fixed_disk_reads_at_once_what_is_on_it() -> None:
    disk = VhdDisk(MemoryFile(vhd(MIB, fixed=True)))
    buffer = memoryview(bytearray(1024))
    assert disk.read_now(MIB - 1024, 1024, [buffer])
    assert not disk.read_now(MIB - 512, 1024, [buffer]), "the footer is not the guest's"


@pytest.mark.parametrize("fixed", [True, False])
def test_a_disk_that_is_only_read_is_not_even_flushed(fixed: bool) -> None:
    file = MemoryFile(vhd(fixed=fixed))
    disk = VhdDisk(file, read_only=True)
    disk.flush()
    disk.close()
    disk.close()
    assert file.recorded == []
