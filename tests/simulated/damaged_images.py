"""VHDX and VHD images that are not as they should be, with checksums that are right."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from hvhost.errors import DiskError
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, create_vhd
from hvhost.storage.vhd_format import DynamicHeader, Footer, packed
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_create import (
    BAT_OFFSET,
    LOG_OFFSET,
    METADATA_OFFSET,
    VhdxOptions,
    create_vhdx,
    region_table,
)
from hvhost.storage.vhdx_format import (
    HEADER_OFFSETS,
    HEADER_SIZE,
    LOG_SECTOR,
    MIB,
    REGION_TABLE_OFFSETS,
    Header,
    LogEntryHeader,
    MetadataTableEntry,
    RegionTableEntry,
    with_checksum,
)
from hvhost.storage.vhdx_log import make_entry
from simulated.image_files import MemoryFile

LOG_GUID = UUID(int=7)
#: Items in the order in which they are in the metadata table.
PARAMETERS, SIZE, PAGE_83, LOGICAL, PHYSICAL, LOCATOR = range(6)


def refusal(content: bytes | bytearray) -> str:
    """The sentence with which an image is refused."""
    kind = VhdxDisk if content[:8] == b"vhdxfile" else VhdDisk
    with pytest.raises(DiskError) as caught:
        kind(MemoryFile(content), read_only=True)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


# --- VHDX ---------------------------------------------------------------------------------------


def vhdx(**options: bool | int | dict[str, str]) -> bytearray:
    """A disk of 4 MiB in blocks of 1 MiB."""
    file = MemoryFile()
    create_vhdx(file, replace(VhdxOptions(4 * MIB, block_size=MIB), **options))  # type: ignore[arg-type]
    return file.content


def put_entry(content: bytearray, index: int, place: int, state: int) -> None:
    """Put an entry into the block allocation table."""
    at = BAT_OFFSET + 8 * index
    content[at : at + 8] = (place | state).to_bytes(8, "little")


def with_header(content: bytearray, **changes: int | UUID) -> bytearray:
    """*content* with both headers changed."""
    for offset in HEADER_OFFSETS:
        header = replace(Header.unpack(content, offset), **changes)  # type: ignore[arg-type]
        content[offset : offset + HEADER_SIZE] = with_checksum(header.pack(), HEADER_SIZE)
    return content


def regions(content: bytearray) -> list[RegionTableEntry]:
    """The two that hvhost writes: block allocation table, metadata."""
    place = REGION_TABLE_OFFSETS[0] + 16
    return [RegionTableEntry.unpack(content, place + 32 * number) for number in range(2)]


def with_regions(content: bytearray, *entries: RegionTableEntry) -> bytearray:
    """*content* with these regions in both tables."""
    for offset in REGION_TABLE_OFFSETS:
        table = region_table(entries)
        content[offset : offset + len(table)] = table
    return content


def with_region(number: int, **changes: int | UUID) -> bytearray:
    """An image with one region changed."""
    content = vhdx()
    entries = regions(content)
    entries[number] = replace(entries[number], **changes)  # type: ignore[arg-type]
    return with_regions(content, *entries)


def with_item(number: int, content: bytearray | None = None, **changes: int | UUID) -> bytearray:
    """An image with one entry of its metadata table changed, or added."""
    content = vhdx() if content is None else content
    place = METADATA_OFFSET + 32 + 32 * number
    entry = replace(MetadataTableEntry.unpack(content, place), **changes)  # type: ignore[arg-type]
    content[place : place + 32] = entry.pack()
    count = slice(METADATA_OFFSET + 10, METADATA_OFFSET + 12)
    before = int.from_bytes(content[count], "little")
    content[count] = max(before, number + 1).to_bytes(2, "little")
    return content


def with_value(number: int, value: bytes, content: bytearray | None = None) -> bytearray:
    """An image with the beginning of one item's value changed."""
    content = vhdx() if content is None else content
    entry = MetadataTableEntry.unpack(content, METADATA_OFFSET + 32 + 32 * number)
    place = METADATA_OFFSET + entry.offset
    content[place : place + len(value)] = value
    return content


def log_entry(position: int = 0, number: int = 1, **changes: int) -> bytes:
    """An entry of the log that writes a page of *number* to the block allocation table."""
    made = make_entry(
        {3 * MIB: bytes([number]) * LOG_SECTOR},
        position=position,
        sequence_number=number,
        log_guid=LOG_GUID,
        flushed_file_offset=4 * MIB,
        last_file_offset=4 * MIB,
    )
    header = replace(LogEntryHeader.unpack(made), **changes)  # type: ignore[arg-type]
    return with_checksum(header.pack() + made[64:], len(made))


def with_log(log: bytes, **changes: int) -> bytearray:
    """An image whose log is in use and begins with *log*, and its headers changed."""
    content = vhdx()
    content[LOG_OFFSET : LOG_OFFSET + len(log)] = log
    return with_header(content, log_guid=LOG_GUID, **changes)


# --- VHD ----------------------------------------------------------------------------------------


def vhd(size: int = 4 * MIB, *, fixed: bool = False) -> bytearray:
    """A disk in blocks of 1 MiB."""
    file = MemoryFile()
    create_vhd(file, VhdOptions(size, fixed, MIB))
    return file.content


def with_footer(content: bytearray, **changes: int | bytes) -> bytearray:
    """*content* with its footers changed; of a fixed disk it has one only."""
    footer = replace(Footer.unpack(content, len(content) - 512), **changes)  # type: ignore[arg-type]
    content[-512:] = packed(footer)
    if content[:8] == b"conectix":
        content[:512] = packed(footer)
    return content


def with_dynamic_header(content: bytearray, **changes: int | bytes) -> bytearray:
    """*content* with its dynamic disk header changed."""
    header = replace(DynamicHeader.unpack(content, 512), **changes)  # type: ignore[arg-type]
    content[512:1536] = packed(header)
    return content


def put_vhd_entry(content: bytearray, block: int, sector: int) -> None:
    """Put an entry into the block allocation table."""
    content[1536 + 4 * block : 1540 + 4 * block] = sector.to_bytes(4, "big")
