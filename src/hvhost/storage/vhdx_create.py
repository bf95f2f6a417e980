"""New VHDX files, [MS-VHDX] 2.1: headers, an empty log, metadata, table, and blocks if fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from hvhost.errors import HvHostError
from hvhost.storage.file import ImageFile, write_all
from hvhost.storage.vhdx_blocks import PIECE_ENTRIES, BlockTable
from hvhost.storage.vhdx_format import (
    BAT_ENTRY_SIZE,
    BAT_REGION,
    CREATOR,
    FILE_IDENTIFIER_SIGNATURE,
    FILE_PARAMETERS,
    HEADER_OFFSETS,
    HEADER_SIGNATURE,
    HEADER_SIZE,
    LOG_VERSION,
    LOGICAL_SECTOR_SIZE,
    MAXIMUM_BLOCK_SIZE,
    MAXIMUM_DISK_SIZE,
    METADATA_REGION,
    METADATA_SIGNATURE,
    METADATA_TABLE_SIZE,
    MIB,
    MINIMUM_BLOCK_SIZE,
    NO_GUID,
    PAGE_83_DATA,
    PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIGNATURE,
    REGION_TABLE_SIZE,
    SECTOR_SIZES,
    VERSION,
    VIRTUAL_DISK_SIZE,
    FileFlags,
    FileParameters,
    Header,
    ItemFlags,
    MetadataTableEntry,
    MetadataTableHeader,
    PayloadState,
    RegionTableEntry,
    RegionTableHeader,
    bat_entry_count,
    chunk_ratio,
    with_checksum,
)
from hvhost.storage.vhdx_layout import make_locator

LOG_OFFSET, LOG_LENGTH = MIB, MIB
METADATA_OFFSET, METADATA_LENGTH = 2 * MIB, MIB
BAT_OFFSET = 3 * MIB
DEFAULT_BLOCK_SIZE = 32 * MIB
DIFFERENCING_BLOCK_SIZE = 2 * MIB


@dataclass(frozen=True, slots=True)
class VhdxOptions:
    """What a new VHDX is to be. Sizes are bytes; *locator* makes it a differencing one.

    *identifier* is what the guest knows the disk by, a new one if there is none.
    """

    size: int
    fixed: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    logical_sector_size: int = 512
    physical_sector_size: int = 4096
    locator: dict[str, str] = field(default_factory=dict)
    identifier: UUID | None = None

    def check(self) -> None:
        """:class:`HvHostError` for what no VHDX can be."""
        block = self.block_size
        if not MINIMUM_BLOCK_SIZE <= block <= MAXIMUM_BLOCK_SIZE or block & (block - 1):
            raise HvHostError(
                f"a block of {block} bytes cannot be; name a power of two from 1M to 256M."
            )
        if not {self.logical_sector_size, self.physical_sector_size} <= set(SECTOR_SIZES):
            raise HvHostError("sectors have 512 or 4096 bytes; name one of these.")
        if not 0 < self.size <= MAXIMUM_DISK_SIZE or self.size % self.logical_sector_size:
            raise HvHostError(
                f"a VHDX of {self.size} bytes cannot be; name a multiple of "
                f"{self.logical_sector_size} up to 64T."
            )


def create_vhdx(
    file: ImageFile, options: VhdxOptions, new_guid: Callable[[], UUID] = uuid4
) -> None:
    """Make the empty *file* a VHDX; it is on stable storage when this returns."""
    options.check()
    entries = bat_entry_count(
        options.size, options.block_size, options.logical_sector_size, bool(options.locator)
    )
    bat_length = -(-entries * BAT_ENTRY_SIZE // MIB) * MIB
    start = BAT_OFFSET + bat_length
    file.truncate(start)
    if options.fixed:
        _write_blocks(file, options, start, entries)
    write_all(file, METADATA_OFFSET, _metadata(options, options.identifier or new_guid()))
    regions = _region_table(bat_length)
    for offset in REGION_TABLE_OFFSETS:
        write_all(file, offset, regions)
    header = Header(
        signature=HEADER_SIGNATURE,
        checksum=0,
        sequence_number=0,
        file_write_guid=new_guid(),
        data_write_guid=new_guid(),
        log_guid=NO_GUID,
        log_version=LOG_VERSION,
        version=VERSION,
        log_length=LOG_LENGTH,
        log_offset=LOG_OFFSET,
    )
    for number, offset in enumerate(HEADER_OFFSETS):
        data = Header.pack(header)
        data = data[:8] + (number + 1).to_bytes(8, "little") + data[16:]
        write_all(file, offset, with_checksum(data, HEADER_SIZE))
    file.flush()
    # What makes it a VHDX comes last: half a file is none.
    identifier = FILE_IDENTIFIER_SIGNATURE + CREATOR.encode("utf-16-le")
    write_all(file, 0, identifier.ljust(4096, b"\0"))
    file.flush()


def _write_blocks(file: ImageFile, options: VhdxOptions, start: int, entries: int) -> None:
    """All blocks of a fixed disk, one behind the other."""
    blocks = -(-options.size // options.block_size)
    file.reserve(start, blocks * options.block_size)
    table = BlockTable(entries)
    ratio = chunk_ratio(options.block_size, options.logical_sector_size)
    for block in range(blocks):
        place = start + block * options.block_size
        table.set(block + block // ratio, place | PayloadState.FULLY_PRESENT)
    for number, piece in enumerate(table.pieces):
        write_all(file, BAT_OFFSET + number * PIECE_ENTRIES * BAT_ENTRY_SIZE, piece.tobytes())


def _region_table(bat_length: int) -> bytes:
    entries = (
        RegionTableEntry(BAT_REGION, BAT_OFFSET, bat_length, 1),
        RegionTableEntry(METADATA_REGION, METADATA_OFFSET, METADATA_LENGTH, 1),
    )
    return region_table(entries)


def region_table(entries: tuple[RegionTableEntry, ...]) -> bytes:
    """2.2.3: the table of these regions."""
    header = RegionTableHeader(REGION_TABLE_SIGNATURE, 0, len(entries)).pack()
    return with_checksum(header + b"".join(each.pack() for each in entries), REGION_TABLE_SIZE)


def _metadata(options: VhdxOptions, identifier: UUID) -> bytes:
    flags = FileFlags(0)
    if options.fixed:
        flags |= FileFlags.LEAVE_BLOCK_ALLOCATED
    if options.locator:
        flags |= FileFlags.HAS_PARENT
    disk = ItemFlags.IS_VIRTUAL_DISK | ItemFlags.IS_REQUIRED
    items = [
        (
            FILE_PARAMETERS,
            FileParameters(options.block_size, flags).pack(),
            ItemFlags.IS_REQUIRED,
        ),
        (VIRTUAL_DISK_SIZE, options.size.to_bytes(8, "little"), disk),
        (PAGE_83_DATA, identifier.bytes_le, disk),
        (LOGICAL_SECTOR_SIZE, options.logical_sector_size.to_bytes(4, "little"), disk),
        (PHYSICAL_SECTOR_SIZE, options.physical_sector_size.to_bytes(4, "little"), disk),
    ]
    if options.locator:
        items.append((PARENT_LOCATOR, make_locator(options.locator), ItemFlags.IS_REQUIRED))
    table = MetadataTableHeader(METADATA_SIGNATURE, 0, len(items)).pack()
    contents = b""
    for guid, data, item_flags in items:
        offset = METADATA_TABLE_SIZE + len(contents)
        table += MetadataTableEntry(guid, offset, len(data), item_flags).pack()
        contents += data.ljust(-(-len(data) // 8) * 8, b"\0")
    return table.ljust(METADATA_TABLE_SIZE, b"\0") + contents
