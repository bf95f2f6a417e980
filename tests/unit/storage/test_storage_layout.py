"""What a VHDX says of itself is believed only where it can be: tables, items, sizes, blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.images import create_disk, open_disk
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_create import METADATA_OFFSET, VhdxOptions, create_vhdx
from hvhost.storage.vhdx_format import (
    METADATA_TABLE_SIZE,
    MIB,
    PARENT_LOCATOR,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    VHDX_PARENT_LOCATOR_TYPE,
    VIRTUAL_DISK_SIZE,
    BitmapState,
    ItemFlags,
    MetadataTableEntry,
    ParentLocatorEntry,
    ParentLocatorHeader,
    PayloadState,
    RegionTableEntry,
    with_checksum,
)
from hvhost.storage.vhdx_layout import ReplayedFile, make_locator, parse_locator
from hvhost.storage.vhdx_log import Replay
from hvhost.storage.vhdx_resize import set_item
from simulated.damaged_images import (
    LOCATOR,
    LOGICAL,
    PARAMETERS,
    PHYSICAL,
    SIZE,
    log_entry,
    put_entry,
    refusal,
    regions,
    vhdx,
    with_header,
    with_item,
    with_log,
    with_region,
    with_regions,
    with_value,
)
from simulated.image_files import MemoryFile

FULL = PayloadState.FULLY_PRESENT
ADDED = PHYSICAL + 1
DIFFERENCING: dict[str, Any] = {"locator": {"parent_linkage": "x"}}


def opened(content: bytes | bytearray, *, read_only: bool = True) -> VhdxDisk:
    return VhdxDisk(MemoryFile(content), read_only=read_only)


# --- headers ------------------------------------------------------------------------------------


def test_what_is_no_vhdx() -> None:
    assert "too short to be a VHDX file" in refusal(vhdx()[: MIB - 1])
    for content in (b"x" + vhdx()[1:], bytes(MIB)):
        with pytest.raises(DiskError, match="is not a VHDX file"):
            opened(content)
    with pytest.raises(DiskError, match="too short"):
        opened(b"")


def test_a_version_to_come() -> None:
    assert "VHDX version 2; hvhost knows version 1" in refusal(with_header(vhdx(), version=2))


@pytest.mark.parametrize("length", [0, MIB // 2, 3 * MIB // 2, 65 * MIB])
def test_lengths_that_no_log_has(length: int) -> None:
    assert f"has a log of {length} bytes" in refusal(with_log(b"", log_length=length))


@pytest.mark.parametrize("offset", [0, MIB // 2, MIB + 4096, 4 * MIB, (1 << 64) - MIB])
def test_places_where_no_log_is(offset: int) -> None:
    assert "its log outside the file" in refusal(with_log(b"", log_offset=offset))


def test_a_file_without_a_log_is_only_read() -> None:
    """It has none that could be damaged; a change of it could be cut off."""
    content = with_header(vhdx(), log_length=0)
    disk = opened(content, read_only=False)
    with pytest.raises(DiskError, match="has no log, so it cannot be changed"):
        disk.writev(0, [memoryview(bytes(512))])
    disk.close()
    assert isinstance(disk.file, MemoryFile) and disk.file.content == content


def test_a_table_that_only_the_log_has() -> None:
    """The file's own is a hole still, as after a crash right behind the first flush."""
    place = 4 * MIB
    page = (place | FULL).to_bytes(8, "little").ljust(4096, b"\0")
    log = bytearray(log_entry(last_file_offset=5 * MIB))
    log[4096 + 8 : 8192 - 4] = page[8:-4]
    log[64 + 4 : 64 + 16] = page[-4:] + page[:8]
    content = with_log(with_checksum(bytes(log), len(log)))
    content[place:] = b"d" * MIB
    disk = opened(content)
    buffer = memoryview(bytearray(512))
    disk.readv(0, [buffer])
    assert buffer == b"d" * 512


# --- regions ------------------------------------------------------------------------------------


def test_a_file_that_lacks_a_region() -> None:
    bat, metadata = regions(vhdx())
    assert "has no metadata" in refusal(with_regions(vhdx(), bat))
    assert "has no block allocation table" in refusal(with_regions(vhdx(), metadata))
    assert "has region" in refusal(with_regions(vhdx(), bat, metadata, bat))


def test_region_tables_that_are_none() -> None:
    damaged, foreign, crowded = vhdx(), vhdx(), vhdx()
    for offset in REGION_TABLE_OFFSETS:
        damaged[offset + 20] ^= 1
        for content, place, value in ((foreign, 0, b"rego"), (crowded, 8, b"\0\x08\0\0")):
            content[offset + place : offset + place + 4] = value
            table = with_checksum(
                bytes(content[offset : offset + REGION_TABLE_SIZE]), REGION_TABLE_SIZE
            )
            content[offset : offset + REGION_TABLE_SIZE] = table
    assert "no valid region table" in refusal(damaged)
    assert "no valid region table" in refusal(foreign)
    assert "has 2048 regions" in refusal(crowded)


def test_a_region_of_another_program() -> None:
    content = vhdx()
    bat, metadata = regions(content)
    other = RegionTableEntry(uuid4(), 4 * MIB, MIB, 0)
    opened(with_regions(content, bat, metadata, other)).close()
    assert "does not know but must" in refusal(
        with_regions(content, bat, metadata, replace(other, required=1))
    )
    assert "regions that overlap" in refusal(
        with_regions(content, bat, metadata, replace(other, file_offset=2 * MIB))
    )


def test_a_region_of_half_a_mebibyte() -> None:
    assert "at no place" in refusal(with_region(0, length=MIB + 4096))


# --- metadata -----------------------------------------------------------------------------------


def test_a_metadata_table_that_is_none() -> None:
    foreign, crowded = vhdx(), vhdx()
    foreign[METADATA_OFFSET] ^= 1
    crowded[METADATA_OFFSET + 10 : METADATA_OFFSET + 12] = (2048).to_bytes(2, "little")
    for content in (foreign, crowded):
        assert "no valid metadata table" in refusal(content)


@pytest.mark.parametrize(("number", "length"), [(PARAMETERS, 7), (SIZE, 4), (LOGICAL, 0)])
def test_a_file_that_lacks_an_item(number: int, length: int) -> None:
    assert "lacks metadata item" in refusal(with_item(number, item_id=uuid4(), flags=0))
    assert "lacks metadata item" in refusal(with_item(number, length=length))


def test_items_of_other_programs() -> None:
    """A user's items are nobody's business, and others only if they say so."""
    user = with_item(ADDED, item_id=uuid4(), offset=0, length=1 << 31, flags=ItemFlags.IS_USER)
    opened(user).close()
    opened(with_item(ADDED, item_id=uuid4(), offset=0, length=1 << 31, flags=0)).close()
    assert "does not know but must" in refusal(
        with_item(ADDED, item_id=uuid4(), flags=ItemFlags.IS_REQUIRED)
    )
    required = ItemFlags.IS_USER | ItemFlags.IS_REQUIRED
    opened(with_item(ADDED, item_id=uuid4(), flags=required)).close()


def test_an_item_twice() -> None:
    again = with_item(ADDED, item_id=VIRTUAL_DISK_SIZE, offset=METADATA_TABLE_SIZE, length=8)
    assert "twice" in refusal(again)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(METADATA_TABLE_SIZE - 8, 8), (0, 8), (MIB - 4, 8), (MIB, 8), (0xFFFFFFF8, 8)],
)
def test_an_item_outside_its_region(offset: int, length: int) -> None:
    assert "a metadata item outside its region" in refusal(
        with_item(SIZE, offset=offset, length=length)
    )


def test_an_item_as_long_as_none_is() -> None:
    content = vhdx()
    bat, metadata = regions(content)
    content += content[2 * MIB : 3 * MIB] + bytes(2 * MIB)
    content = with_regions(content, bat, replace(metadata, file_offset=4 * MIB, length=3 * MIB))
    opened(content).close()
    place = 4 * MIB + 32 + 32 * SIZE
    entry = MetadataTableEntry.unpack(content, place)
    for length, fits in ((MIB, True), (MIB + 8, False)):
        content[place : place + 32] = replace(entry, length=length).pack()
        if fits:
            opened(content).close()
        else:
            assert "a metadata item outside its region" in refusal(content)


@pytest.mark.parametrize("block", [0, MIB // 2, 3 * MIB, 512 * MIB, 1 << 31])
def test_blocks_of_no_size_they_can_have(block: int) -> None:
    content = with_value(PARAMETERS, block.to_bytes(4, "little"))
    assert f"has blocks of {block} bytes" in refusal(content)


@pytest.mark.parametrize("number", [LOGICAL, PHYSICAL])
@pytest.mark.parametrize("sector", [0, 513, 1024, 8192])
def test_sectors_of_no_size_they_can_have(number: int, sector: int) -> None:
    assert "has sectors of" in refusal(with_value(number, sector.to_bytes(4, "little")))


@pytest.mark.parametrize("size", [0, 4 * MIB - 100, (64 << 40) + 512, (1 << 64) - 512])
def test_disks_of_no_size_they_can_have(size: int) -> None:
    content = with_value(SIZE, size.to_bytes(8, "little"))
    assert f"holds a disk of {size} bytes" in refusal(content)


def test_a_table_too_short_for_its_disk() -> None:
    """One entry more than a table of a mebibyte has: it would be read from what lies behind."""
    entries = MIB // 8
    most = (entries - entries // 4097) * MIB  # a sector bitmap's after each 4,096 blocks
    opened(with_value(SIZE, most.to_bytes(8, "little"))).close()
    content = with_value(SIZE, (most + MIB).to_bytes(8, "little"))
    assert "table too short for it" in refusal(content)


# --- parent locators ----------------------------------------------------------------------------


def locator(*entries: tuple[int, int, int, int], texts: bytes = b"", count: int = -1) -> bytes:
    """An item of entries as they are: places and lengths of key and value."""
    table = b"".join(
        ParentLocatorEntry(key, value, key_length, value_length).pack()
        for key, key_length, value, value_length in entries
    )
    number = len(entries) if count < 0 else count
    return ParentLocatorHeader(VHDX_PARENT_LOCATOR_TYPE, 0, number).pack() + table + texts


def test_a_locator_is_what_was_made() -> None:
    entries = {"parent_linkage": "{x}", "relative_path": "ä\\b.vhdx"}
    assert parse_locator("x", make_locator(entries)) == entries


def test_a_parent_that_is_named_in_another_way() -> None:
    content = with_value(LOCATOR, uuid4().bytes_le, vhdx(**DIFFERENCING))
    assert "names its parent in a way" in refusal(content)


def test_a_locator_of_too_many_entries() -> None:
    text = (20, 65534, 20, 65534)
    for count, fits in ((64, True), (65, False)):
        item = locator(*[text] * count, texts=bytes(65536))
        if fits:
            assert len(parse_locator("x", item)) == 1
        else:
            with pytest.raises(DiskError, match="of too many entries"):
                parse_locator("x", item)


@pytest.mark.parametrize(
    "item",
    [
        locator(count=1),
        locator((20, 0, 20, 0), count=2, texts=bytes(11)),
        locator((32, 5, 32, 0), texts=bytes(4)),
        locator((32, 0, 32, 5), texts=bytes(4)),
        locator((0xFFFFFFFF, 2, 32, 0), texts=bytes(4)),
        locator((32, 0, 1 << 31, 2), texts=bytes(4)),
    ],
)
def test_a_locator_that_was_cut(item: bytes) -> None:
    with pytest.raises(DiskError, match="a parent locator that was cut"):
        parse_locator("x", item)


# --- blocks -------------------------------------------------------------------------------------


def test_entries_beyond_the_end_are_nobody_s() -> None:
    """A table has room for the rest of the last chunk; programs leave there what was."""
    content = vhdx(**DIFFERENCING)
    put_entry(content, 4, 900 << 40, FULL)
    put_entry(content, 5, 0, 5)
    put_entry(content, 4097, 900 << 40, BitmapState.PRESENT)
    opened(content).close()


@pytest.mark.parametrize("state", [1, 5, 7])
def test_sector_bitmaps_in_no_state_they_can_have(state: int) -> None:
    content = vhdx(**DIFFERENCING)
    put_entry(content, 4096, 4 * MIB, state)
    assert f"sector bitmap 0 in state {state}" in refusal(content)


def test_a_block_in_part_wants_a_bitmap() -> None:
    content = vhdx(**DIFFERENCING) + bytes(2 * MIB)
    put_entry(content, 0, 4 * MIB, PayloadState.PARTIALLY_PRESENT)
    assert "in part, but not what says which" in refusal(content)
    put_entry(content, 4096, 5 * MIB, BitmapState.PRESENT)
    opened(content).close()


def test_places_of_blocks_that_are_not_there_any_more() -> None:
    """[MS-VHDX] 2.5.1.1: the offset of an unmapped block may still say where it was."""
    content = vhdx()
    for index, state in enumerate((PayloadState.UNDEFINED, PayloadState.UNMAPPED)):
        put_entry(content, index, 900 << 40, state)
    disk = opened(content)
    buffer = memoryview(bytearray(b"x" * 512))
    disk.readv(0, [buffer])
    assert buffer == bytes(512)


def test_opening_a_table_as_big_as_it_can_be_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 TiB in blocks of 1 MiB: of half a GiB of entries, only those are read that are there."""
    path = tmp_path / "a.vhdx"
    disk = create_disk(path, VhdxOptions(64 << 40, block_size=MIB))
    disk.writev((64 << 40) - 4096, [memoryview(b"x" * 4096)])
    disk.close()
    honest, moved = os.preadv, 0

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal moved
        moved += sum(map(len, buffers))
        return honest(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    disk = open_disk(path, read_only=True)
    assert 65536 < moved < MIB
    buffer = memoryview(bytearray(4096))
    disk.readv((64 << 40) - 4096, [buffer])
    assert buffer == b"x" * 4096
    disk.close()


def test_what_a_log_wants_written_counts_as_data() -> None:
    pages = {place * 4096: b"" for place in (3, 4, 9)}
    replayed = ReplayedFile(MemoryFile(bytes(65536)), Replay(pages))
    ranges = [(0, 3), (0, 4), (3, 1), (5, 4), (5, 5), (9, 1), (10, 20), (100, 5)]
    found = [replayed.may_have_data(first * 4096, count * 4096) for first, count in ranges]
    assert found == [False, True, True, False, True, True, False, False]
    assert ReplayedFile(MemoryFile(b"x" * 4096), Replay()).may_have_data(0, 4096)


# --- what is asked of it ------------------------------------------------------------------------

OPTIONS: list[tuple[Callable[[], VhdxOptions], str]] = [
    (lambda: VhdxOptions(4 * MIB, block_size=0), "a block of 0 bytes cannot be"),
    (lambda: VhdxOptions(4 * MIB, block_size=MIB // 2), "a block of .* cannot be"),
    (lambda: VhdxOptions(4 * MIB, block_size=3 * MIB), "a block of .* cannot be"),
    (lambda: VhdxOptions(4 * MIB, block_size=512 * MIB), "a block of .* cannot be"),
    (lambda: VhdxOptions(4 * MIB, logical_sector_size=1024), "sectors have 512 or 4096"),
    (lambda: VhdxOptions(4 * MIB, physical_sector_size=8192), "sectors have 512 or 4096"),
    (lambda: VhdxOptions(0), "a VHDX of 0 bytes cannot be"),
    (lambda: VhdxOptions(-512), "a VHDX of -512 bytes cannot be"),
    (lambda: VhdxOptions(4 * MIB + 100), "a VHDX of .* cannot be"),
    (lambda: VhdxOptions(4 * MIB + 512, logical_sector_size=4096), "a multiple of 4096"),
    (lambda: VhdxOptions((64 << 40) + 512), "a VHDX of .* cannot be"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS)
def test_images_that_cannot_be_made(options: Callable[[], VhdxOptions], said: str) -> None:
    file = MemoryFile()
    with pytest.raises(HvHostError, match=said):
        create_vhdx(file, options())
    assert not file.recorded


def test_a_user_s_item_of_the_same_name_stays_as_it_is() -> None:
    """[MS-VHDX] 2.6.1.2: only a name and whose it is, together, are there once."""
    content = vhdx()
    place = METADATA_OFFSET + 32
    entries = [MetadataTableEntry.unpack(content, place + 32 * number) for number in range(5)]
    content[METADATA_OFFSET + MIB - 8 : METADATA_OFFSET + MIB] = b"somebody"
    user = MetadataTableEntry(VIRTUAL_DISK_SIZE, MIB - 8, 8, ItemFlags.IS_USER)
    for number, entry in enumerate([user, *entries]):
        content = with_item(
            number,
            content,
            item_id=entry.item_id,
            offset=entry.offset,
            length=entry.length,
            flags=entry.flags,
        )
    disk = opened(content, read_only=False)
    disk.resize(6 * MIB)
    disk.close()
    assert isinstance(disk.file, MemoryFile)
    again = opened(disk.file.content)
    assert again.size == 6 * MIB
    assert disk.file.content[METADATA_OFFSET + MIB - 8 : METADATA_OFFSET + MIB] == b"somebody"


def test_no_room_for_a_longer_locator() -> None:
    """A user's item takes all of the region, so the child cannot be told its parent's new name."""
    content = vhdx(**DIFFERENCING)
    content = with_item(
        LOCATOR + 1, content, item_id=uuid4(), offset=MIB - 8, length=8, flags=ItemFlags.IS_USER
    )
    disk = opened(content, read_only=False)
    with pytest.raises(DiskError, match="no room for its metadata"):
        set_item(disk, PARENT_LOCATOR, make_locator({"parent_linkage": "y" * 100}))
    set_item(disk, PARENT_LOCATOR, make_locator({"parent_linkage": "y"}))
    disk.close()
    assert isinstance(disk.file, MemoryFile)
    assert opened(disk.file.content).layout.locator == {"parent_linkage": "y"}


def test_region_tables_that_were_damaged_meanwhile() -> None:
    disk = opened(vhdx(), read_only=False)
    assert isinstance(disk.file, MemoryFile)
    for offset in REGION_TABLE_OFFSETS:
        disk.file.content[offset + 20] ^= 1
    with pytest.raises(DiskError, match="no valid region table any more"):
        disk.resize(1 << 40)
    disk.resize(8 * MIB)  # which needs no other table
