"""Structures of VHDX files, as in [MS-VHDX] sections 2.2 to 2.6; sizes and offsets are bytes.

Checksums are CRC-32C over the whole structure, with the checksum's own field as zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated
from uuid import UUID

from crc32c import crc32c

from hvhost.wire import U16, U32, U64, Bytes8, Guid, Record

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
Bytes20 = Annotated[bytes, "20s"]

# 2.2: the header section, the first MiB of the file.
FILE_IDENTIFIER_SIGNATURE = b"vhdxfile"
CREATOR = "hvhost"
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_SIZE = 4 * KIB
REGION_TABLE_OFFSETS = (192 * KIB, 256 * KIB)
REGION_TABLE_SIZE = 64 * KIB
HEADER_SECTION_SIZE = MIB
ALIGNMENT = MIB
CHECKSUM_OFFSET = 4
HEADER_SIGNATURE = b"head"
REGION_TABLE_SIGNATURE = b"regi"
VERSION, LOG_VERSION = 1, 0
MAXIMUM_ENTRIES = 2047

BAT_REGION = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

# 2.3: the log.
LOG_SECTOR = 4 * KIB
LOG_ENTRY_SIGNATURE = b"loge"
DATA_DESCRIPTOR_SIGNATURE = b"desc"
ZERO_DESCRIPTOR_SIGNATURE = b"zero"
DATA_SECTOR_SIGNATURE = b"data"

# 2.5: the BAT. An entry's upper 44 bits are an offset in MiB: masked, they are one in bytes.
BAT_ENTRY_SIZE = 8
STATE_MASK = 7
OFFSET_MASK = ~(MIB - 1) & 0xFFFFFFFFFFFFFFFF
SECTORS_PER_BITMAP = 1 << 23
BITMAP_SIZE = MIB

# 2.6: metadata.
METADATA_SIGNATURE = b"metadata"
METADATA_TABLE_SIZE = 64 * KIB
MAXIMUM_ITEM_SIZE = MIB
FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
PAGE_83_DATA = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
VHDX_PARENT_LOCATOR_TYPE = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
MINIMUM_BLOCK_SIZE, MAXIMUM_BLOCK_SIZE = MIB, 256 * MIB
MAXIMUM_DISK_SIZE = 64 * TIB
SECTOR_SIZES = (512, 4096)

NO_GUID = UUID(int=0)


class PayloadState(IntEnum):
    """2.5.1.1: payload block entry states."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class BitmapState(IntEnum):
    """2.5.1.2: sector bitmap block entry states."""

    NOT_PRESENT = 0
    PRESENT = 6


class ItemFlags(IntFlag):
    """2.6.1.2: flags of a metadata item."""

    IS_USER = 1
    IS_VIRTUAL_DISK = 2
    IS_REQUIRED = 4


class FileFlags(IntFlag):
    """2.6.2.1: flags of the file parameters."""

    LEAVE_BLOCK_ALLOCATED = 1
    HAS_PARENT = 2


@dataclass(frozen=True, slots=True)
class Header(Record):
    """2.2.2; the rest of its 4 KiB is reserved."""

    signature: Annotated[bytes, "4s"]
    checksum: U32
    sequence_number: U64
    file_write_guid: Guid
    data_write_guid: Guid
    log_guid: Guid
    log_version: U16
    version: U16
    log_length: U32
    log_offset: U64


@dataclass(frozen=True, slots=True)
class RegionTableHeader(Record):
    """2.2.3.1."""

    signature: Annotated[bytes, "4s"]
    checksum: U32
    entry_count: U32
    reserved: U32 = 0


@dataclass(frozen=True, slots=True)
class RegionTableEntry(Record):
    """2.2.3.2."""

    guid: Guid
    file_offset: U64
    length: U32
    required: U32


@dataclass(frozen=True, slots=True)
class LogEntryHeader(Record):
    """2.3.1.1."""

    signature: Annotated[bytes, "4s"]
    checksum: U32
    entry_length: U32
    tail: U32
    sequence_number: U64
    descriptor_count: U32
    reserved: U32
    log_guid: Guid
    flushed_file_offset: U64
    last_file_offset: U64


@dataclass(frozen=True, slots=True)
class ZeroDescriptor(Record):
    """2.3.1.2."""

    signature: Annotated[bytes, "4s"]
    reserved: U32
    zero_length: U64
    file_offset: U64
    sequence_number: U64


@dataclass(frozen=True, slots=True)
class DataDescriptor(Record):
    """2.3.1.3: the first 8 and last 4 bytes of a sector, the others being in its data sector."""

    signature: Annotated[bytes, "4s"]
    trailing_bytes: Annotated[bytes, "4s"]
    leading_bytes: Bytes8
    file_offset: U64
    sequence_number: U64


@dataclass(frozen=True, slots=True)
class DataSector(Record):
    """2.3.1.4."""

    signature: Annotated[bytes, "4s"]
    sequence_high: U32
    data: Annotated[bytes, "4084s"]
    sequence_low: U32


@dataclass(frozen=True, slots=True)
class MetadataTableHeader(Record):
    """2.6.1.1."""

    signature: Bytes8
    reserved: U16
    entry_count: U16
    reserved2: Bytes20 = bytes(20)


@dataclass(frozen=True, slots=True)
class MetadataTableEntry(Record):
    """2.6.1.2; the offset is from the start of the metadata region."""

    item_id: Guid
    offset: U32
    length: U32
    flags: U32
    reserved: U32 = 0


@dataclass(frozen=True, slots=True)
class FileParameters(Record):
    """2.6.2.1."""

    block_size: U32
    flags: U32


@dataclass(frozen=True, slots=True)
class ParentLocatorHeader(Record):
    """2.6.2.6.1."""

    locator_type: Guid
    reserved: U16
    key_value_count: U16


@dataclass(frozen=True, slots=True)
class ParentLocatorEntry(Record):
    """2.6.2.6.2; offsets are from the start of the item, texts are UTF-16."""

    key_offset: U32
    value_offset: U32
    key_length: U16
    value_length: U16


def with_checksum(data: bytes, size: int) -> bytes:
    """*data* filled up to *size* bytes, with its checksum in place."""
    whole = bytearray(data.ljust(size, b"\0"))
    struct.pack_into("<I", whole, CHECKSUM_OFFSET, 0)
    struct.pack_into("<I", whole, CHECKSUM_OFFSET, crc32c(whole))
    return bytes(whole)


def checksum_is_right(data: bytes | bytearray | memoryview) -> bool:
    """Whether the checksum in *data* is that of *data*."""
    (stored,) = struct.unpack_from("<I", data, CHECKSUM_OFFSET)
    first = crc32c(bytes(data[:CHECKSUM_OFFSET]) + bytes(4))
    return bool(crc32c(data[CHECKSUM_OFFSET + 4 :], first) == stored)


def chunk_ratio(block_size: int, logical_sector_size: int) -> int:
    """Payload blocks for each sector bitmap block."""
    return SECTORS_PER_BITMAP * logical_sector_size // block_size


def bat_entry_count(size: int, block_size: int, logical_sector_size: int, has_parent: bool) -> int:
    """2.5: entries of the BAT, sector bitmap entries among them."""
    ratio = chunk_ratio(block_size, logical_sector_size)
    blocks = -(-size // block_size)
    if has_parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio
