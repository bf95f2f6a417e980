"""Structures of VHD files, as in Microsoft's Virtual Hard Disk Image Format Specification 1.0.

Numbers have their most significant byte first. A checksum is the complement of the sum of the
structure's bytes, with the checksum's own field as zero. Sizes are bytes unless they say sectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated

from hvhost.wire import U8, U16, U32, U64, BigEndianRecord, Bytes16

SECTOR = 512
FOOTER_SIZE = 512
DYNAMIC_HEADER_SIZE = 1024
FOOTER_COOKIE = b"conectix"
DYNAMIC_COOKIE = b"cxsparse"
VERSION = 0x00010000
NO_OFFSET = 0xFFFFFFFFFFFFFFFF
UNUSED_BLOCK = 0xFFFFFFFF
EPOCH = 946684800  # 2000-01-01 in Unix time
# Programs take the size from the geometry, which cannot say every size, unless they know the
# creator as one that means current_size. Windows is known to all.
CREATOR_APPLICATION = b"win "
CREATOR_VERSION = 0x000A0000
CREATOR_HOST_OS = b"Wi2k"
MAXIMUM_SIZE = 2040 << 30
DEFAULT_BLOCK_SIZE = 2 << 20
MAXIMUM_BLOCK_SIZE = 256 << 20
RELATIVE_PATH, ABSOLUTE_PATH = b"W2ru", b"W2ku"
LOCATORS = 8


class DiskType(IntEnum):
    """Types of disk that are in use."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


@dataclass(frozen=True, slots=True)
class Footer(BigEndianRecord):
    """The hard disk footer: the last sector, and of all but fixed disks also the first."""

    cookie: Annotated[bytes, "8s"]
    features: U32
    version: U32
    data_offset: U64
    timestamp: U32
    creator_application: Annotated[bytes, "4s"]
    creator_version: U32
    creator_host_os: Annotated[bytes, "4s"]
    original_size: U64
    current_size: U64
    cylinders: U16
    heads: U8
    sectors_per_track: U8
    disk_type: U32
    checksum: U32
    unique_id: Bytes16
    saved_state: U8 = 0
    reserved: Annotated[bytes, "427s"] = bytes(427)


@dataclass(frozen=True, slots=True)
class DynamicHeader(BigEndianRecord):
    """The dynamic disk header; its parent locators stand in *locators*."""

    cookie: Annotated[bytes, "8s"]
    data_offset: U64
    table_offset: U64
    header_version: U32
    maximum_table_entries: U32
    block_size: U32
    checksum: U32
    parent_unique_id: Bytes16 = bytes(16)
    parent_timestamp: U32 = 0
    reserved: U32 = 0
    parent_unicode_name: Annotated[bytes, "512s"] = bytes(512)
    locators: Annotated[bytes, "192s"] = bytes(192)
    reserved2: Annotated[bytes, "256s"] = field(default=bytes(256))


@dataclass(frozen=True, slots=True)
class ParentLocator(BigEndianRecord):
    """Where one spelling of the parent's path is in the file."""

    platform_code: Annotated[bytes, "4s"]
    platform_data_space: U32
    platform_data_length: U32
    reserved: U32
    platform_data_offset: U64


def packed(record: Footer | DynamicHeader) -> bytes:
    """The bytes, with the right checksum."""
    total = sum(replace(record, checksum=0).pack())
    return replace(record, checksum=~total & 0xFFFFFFFF).pack()


def checksum_is_right(record: Footer | DynamicHeader) -> bool:
    """Whether the record's checksum is that of its bytes."""
    return ~sum(replace(record, checksum=0).pack()) & 0xFFFFFFFF == record.checksum


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors per track: the specification's appendix."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    sectors, heads = 17, max(4, -(-(total // 17) // 1024))
    if total // 17 >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
    if total // sectors >= heads * 1024:
        sectors, heads = 63, 16
    return total // sectors // heads, heads, sectors


def bitmap_size(block_size: int) -> int:
    """Bytes of a block's sector bitmap, which stands before its data."""
    return -(-block_size // SECTOR // 8 // SECTOR) * SECTOR
