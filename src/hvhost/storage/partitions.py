"""Where the last partition of a disk ends: how far the disk can shrink.

MBR (and GPT as in the UEFI specification, section 5.3). Tables are of the guest's making: what does
not make sense counts as no table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hvhost.storage.disk import Disk
from hvhost.wire import U8, U32, U64, Bytes8, Bytes16, Guid, Record

_MBR_SIGNATURE = 0xAA55
_GPT_SIGNATURE = b"EFI PART"
_MAXIMUM_TABLE = 1 << 20
_BACKUP_SECTORS = 33


@dataclass(frozen=True, slots=True)
class MbrPartition(Record):
    """An entry of the master boot record; in sectors."""

    boot_indicator: U8
    first_chs: Annotated[bytes, "3s"]
    type: U8
    last_chs: Annotated[bytes, "3s"]
    start: U32
    count: U32


@dataclass(frozen=True, slots=True)
class GptHeader(Record):
    """The GPT header, as far as the table is described; in sectors."""

    signature: Bytes8
    revision: U32
    header_size: U32
    checksum: U32
    reserved: U32
    my_sector: U64
    alternate_sector: U64
    first_usable: U64
    last_usable: U64
    disk_guid: Guid
    table_sector: U64
    entry_count: U32
    entry_size: U32


@dataclass(frozen=True, slots=True)
class GptPartition(Record):
    """The start of a GPT entry; in sectors, the last one included."""

    type_guid: Bytes16
    unique_guid: Bytes16
    first: U64
    last: U64


def end_of_partitions(disk: Disk) -> int:
    """Bytes that the partitions need, a GPT's copy at the end included; 0 without any."""
    sector = disk.logical_sector_size
    if disk.size < 2 * sector:
        return 0
    data = _read(disk, 0, 2 * sector)
    if int.from_bytes(data[510:512], "little") != _MBR_SIGNATURE:
        return 0
    header = GptHeader.unpack(data, sector)
    if header.signature == _GPT_SIGNATURE:
        return _end_of_gpt(disk, header)
    entries = [MbrPartition.unpack(data, 446 + 16 * number) for number in range(4)]
    return sector * max(each.start + each.count if each.type else 0 for each in entries)


def _end_of_gpt(disk: Disk, header: GptHeader) -> int:
    sector = disk.logical_sector_size
    length = header.entry_count * header.entry_size
    start = header.table_sector * sector
    rounded = -(-length // sector) * sector
    if (
        not 128 <= header.entry_size <= 4096
        or length > _MAXIMUM_TABLE
        or start + rounded > disk.size
    ):
        return 0
    data = _read(disk, start, rounded)
    entries = [
        GptPartition.unpack(data, number * header.entry_size)
        for number in range(header.entry_count)
    ]
    last = max((each.last for each in entries if any(each.type_guid)), default=0)
    return sector * (last + 1 + _BACKUP_SECTORS) if last else 0


def _read(disk: Disk, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk.readv(offset, [memoryview(data)])
    return bytes(data)
