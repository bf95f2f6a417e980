"""Where the last partition ends, in tables that a guest writes as it likes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvhost.storage.partitions import end_of_partitions
from simulated.storage import MemoryDisk

MIB = 1 << 20
SECTOR = 512


def put(disk: MemoryDisk, sector: int, data: bytes) -> None:
    place = sector * disk.logical_sector_size
    disk.content[place : place + len(data)] = data


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """A record of partitions: type, first sector, sectors."""
    table = b"".join(
        struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in entries
    )
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt_header(table: int = 2, count: int = 128, size: int = 128) -> bytes:
    return b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", table, count, size)


def gpt_entry(first: int, last: int, kind: bytes = b"t" * 16) -> bytes:
    return kind + bytes(16) + struct.pack("<QQ", first, last)


def gpt(sector: int = SECTOR, **header: int) -> MemoryDisk:
    """A disk with one partition, to sector 2,047."""
    disk = MemoryDisk(8 * MIB, sector=sector)
    put(disk, 0, mbr((0xEE, 1, 100)))
    put(disk, 1, gpt_header(**header))
    put(disk, 2, gpt_entry(40, 2047))
    return disk


def test_disks_without_a_table() -> None:
    for size in (0, SECTOR, 2 * SECTOR, MIB):
        assert end_of_partitions(MemoryDisk(size)) == 0
    disk = MemoryDisk(MIB)
    put(disk, 0, mbr((0x83, 1, 100))[:-1] + b"\0")
    assert end_of_partitions(disk) == 0, "not signed"


def test_a_disk_of_one_sector_is_too_small_for_what_follows_a_table() -> None:
    disk = MemoryDisk(SECTOR)
    put(disk, 0, mbr((0x83, 0, 1)))
    assert end_of_partitions(disk) == 0


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_master_boot_record(sector: int) -> None:
    disk = MemoryDisk(MIB, sector=sector)
    put(disk, 0, mbr((0x83, 8, 40), (0x82, 100, 7), (0, 200, 50), (0x83, 0, 90)))
    assert end_of_partitions(disk) == 107 * sector
    put(disk, 0, mbr((0, 1, 10)))
    assert end_of_partitions(disk) == 0
    put(disk, 0, mbr((0x83, 0xFFFFFFFF, 0xFFFFFFFF)))
    assert end_of_partitions(disk) == 2 * 0xFFFFFFFF * sector, "it is not looked for there"


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("size", [128, 256, 4096])
def test_a_guid_partition_table(sector: int, size: int) -> None:
    disk = gpt(sector, count=4, size=size)
    assert end_of_partitions(disk) == (2048 + 33) * sector, "the table's copy is behind the last"
    place = 2 * sector + 3 * size
    disk.content[place : place + 48] = gpt_entry(3000, 3999)
    assert end_of_partitions(disk) == (4000 + 33) * sector
    disk.content[place : place + 48] = gpt_entry(3000, 3999, bytes(16))
    assert end_of_partitions(disk) == (2048 + 33) * sector, "an entry that is not in use"


@pytest.mark.parametrize(
    "header",
    [
        {"size": 0},
        {"size": 64},
        {"size": 127},
        {"size": 8192, "count": 2},
        {"size": 0xFFFFFFFF, "count": 1},
        {"count": 16384},
        {"count": 0xFFFFFFFF},
        {"table": 16384 - 31},
        {"table": 16384},
        {"table": 0xFFFFFFFFFFFFFFFF},
        {"count": 0},
    ],
)
def test_tables_that_make_no_sense(header: dict[str, int]) -> None:
    """None is read that is longer than tables are, or not all on the disk."""
    disk = gpt(**header)
    put(disk, 16384 - 31, gpt_entry(40, 2047))
    assert end_of_partitions(disk) == 0


def test_the_longest_table_there_is() -> None:
    disk = gpt(count=8192)
    assert end_of_partitions(disk) == (2048 + 33) * SECTOR
    put(disk, 2 + 2047, bytes(384) + gpt_entry(3000, 3999))
    assert end_of_partitions(disk) == (4000 + 33) * SECTOR


@given(st.binary(max_size=100), st.binary(max_size=400), st.booleans())
@example(gpt_header(), gpt_entry(1, 2), True)
def test_whatever_is_in_a_table_is_a_number(header: bytes, entries: bytes, is_gpt: bool) -> None:
    disk = MemoryDisk(64 * 1024)
    put(disk, 0, bytes(446) + entries[:64].ljust(64, b"\0") + b"\x55\xaa")
    put(disk, 1, (b"EFI PART" + header[8:]) if is_gpt else header)
    put(disk, 2, entries)
    assert end_of_partitions(disk) >= 0
