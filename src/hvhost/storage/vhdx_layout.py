"""What a VHDX file says of itself, [MS-VHDX] 2.2 and 2.6, read and checked before any use.

A file can be anything: every offset, length and count in it is checked here, and what is wrong is
said with :class:`DiskError`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise
from uuid import UUID

from hvhost.errors import DiskError
from hvhost.storage.file import ImageFile, read_exactly
from hvhost.storage.vhdx_format import (
    ALIGNMENT,
    BAT_ENTRY_SIZE,
    BAT_REGION,
    FILE_IDENTIFIER_SIGNATURE,
    FILE_PARAMETERS,
    HEADER_OFFSETS,
    HEADER_SECTION_SIZE,
    HEADER_SIGNATURE,
    HEADER_SIZE,
    LOG_VERSION,
    LOGICAL_SECTOR_SIZE,
    MAXIMUM_BLOCK_SIZE,
    MAXIMUM_DISK_SIZE,
    MAXIMUM_ENTRIES,
    MAXIMUM_ITEM_SIZE,
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
    VHDX_PARENT_LOCATOR_TYPE,
    VIRTUAL_DISK_SIZE,
    FileFlags,
    FileParameters,
    Header,
    ItemFlags,
    MetadataTableEntry,
    MetadataTableHeader,
    ParentLocatorEntry,
    ParentLocatorHeader,
    RegionTableEntry,
    RegionTableHeader,
    bat_entry_count,
    checksum_is_right,
    chunk_ratio,
)
from hvhost.storage.vhdx_log import MAXIMUM_LOG_LENGTH, Replay, read_log

PAGE = 4096
# Beyond any file of a 64 TiB disk; a log that asks for more would only fill the host's disk.
MAXIMUM_FILE_SIZE = 2 * MAXIMUM_DISK_SIZE
MAXIMUM_LOCATOR_ENTRIES = 64
MAXIMUM_SEQUENCE_NUMBER = 1 << 63


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in one VHDX file, and what disk it holds. Sizes and offsets: bytes."""

    header: Header
    header_slot: int
    bat: RegionTableEntry
    metadata: RegionTableEntry
    items: dict[UUID, MetadataTableEntry]
    size: int
    block_size: int
    leave_block_allocated: bool
    has_parent: bool
    logical_sector_size: int
    physical_sector_size: int
    identifier: UUID
    locator: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks for each sector bitmap block."""
        return chunk_ratio(self.block_size, self.logical_sector_size)

    @property
    def block_count(self) -> int:
        """Payload blocks."""
        return -(-self.size // self.block_size)

    @property
    def entry_count(self) -> int:
        """Entries of the BAT."""
        return bat_entry_count(
            self.size, self.block_size, self.logical_sector_size, self.has_parent
        )


class ReplayedFile:
    """Reads of metadata that see what the log wants written, whether or not it has been."""

    def __init__(self, file: ImageFile, replay: Replay) -> None:
        self._file = file
        self._replay = replay
        self._places = sorted(replay.pages)

    def may_have_data(self, offset: int, length: int) -> bool:
        """Whether the range may be something else than zeros."""
        first, behind = (bisect_left(self._places, each) for each in (offset, offset + length))
        return self._file.may_have_data(offset, length) or first < behind

    def read(self, offset: int, length: int) -> bytearray:
        """*length* bytes at *offset*, zeros beyond the file's end; multiples of 4 KiB."""
        inside = max(0, min(length, self._file.size() - offset))
        data = read_exactly(self._file, offset, inside)
        data.extend(bytes(length - inside))
        for start, count in self._replay.cleared:
            first, last = max(start, offset), min(start + count, offset + length)
            if first < last:
                data[first - offset : last - offset] = bytes(last - first)
        if self._replay.pages:
            for page in range(offset, offset + length, PAGE):
                content = self._replay.pages.get(page)
                if content is not None:
                    data[page - offset : page - offset + PAGE] = content
        return data


def read_headers(file: ImageFile) -> tuple[Header, int, list[str]]:
    """The current header, which of the two it is, and what is wrong with the other."""
    if file.size() < HEADER_SECTION_SIZE:
        raise DiskError(f"{file.name} is too short to be a VHDX file; it was cut.")
    if read_exactly(file, 0, 8) != FILE_IDENTIFIER_SIGNATURE:
        raise DiskError(f"{file.name} is not a VHDX file.")
    found: list[tuple[Header, int]] = []
    notes: list[str] = []
    for slot, offset in enumerate(HEADER_OFFSETS):
        data = read_exactly(file, offset, HEADER_SIZE)
        header = Header.unpack(data)
        if header.signature == HEADER_SIGNATURE and checksum_is_right(data):
            found.append((header, slot))
        else:
            notes.append(f"header {slot + 1} is not valid; the other one is used")
    if not found:
        raise DiskError(f"{file.name} has no valid header; it is damaged beyond use.")
    header, slot = max(found, key=lambda each: each[0].sequence_number)
    if header.sequence_number > MAXIMUM_SEQUENCE_NUMBER:
        raise DiskError(f"{file.name} has headers that cannot be counted on; it is damaged.")
    if header.version != VERSION:
        raise DiskError(
            f"{file.name} is of VHDX version {header.version}; hvhost knows version {VERSION}."
        )
    return header, slot, notes


def read_replay(file: ImageFile, header: Header) -> Replay:
    """What the log of the file wants done, if it is in use."""
    if header.log_guid == NO_GUID:
        return Replay()
    length, offset = header.log_length, header.log_offset
    if header.log_version != LOG_VERSION:
        raise DiskError(
            f"{file.name} has a log of version {header.log_version}; hvhost knows {LOG_VERSION}."
        )
    if not 0 < length <= MAXIMUM_LOG_LENGTH or length % MIB:
        raise DiskError(f"{file.name} has a log of {length} bytes; it is damaged.")
    if offset % ALIGNMENT or offset < HEADER_SECTION_SIZE or offset + length > file.size():
        raise DiskError(f"{file.name} has its log outside the file; it is damaged.")
    replay = read_log(read_exactly(file, offset, length), header.log_guid, file.name)
    if replay.flushed_file_offset > file.size():
        raise DiskError(f"{file.name} was cut after its last use; data is missing.")
    if replay.last_file_offset > MAXIMUM_FILE_SIZE:
        raise DiskError(f"{file.name} has a log that extends it without end; it is damaged.")
    return replay


def read_layout(file: ImageFile, header: Header, slot: int, replayed: ReplayedFile) -> Layout:
    """The rest, with the log's changes seen; :class:`DiskError` for what cannot be."""
    name = file.name
    regions, notes = _read_regions(name, replayed)
    _check_places(name, header, regions)
    for guid, what in ((BAT_REGION, "block allocation table"), (METADATA_REGION, "metadata")):
        if guid not in regions:
            raise DiskError(f"{name} has no {what}; it is damaged.")
    metadata = regions[METADATA_REGION]
    items = _read_metadata_table(name, metadata, replayed)

    def item(guid: UUID, length: int) -> bytearray:
        if guid not in items or items[guid].length < length:
            raise DiskError(f"{name} lacks metadata item {guid}; it is damaged.")
        return _read_item(metadata, items[guid], replayed)

    parameters = FileParameters.unpack(item(FILE_PARAMETERS, 8))
    has_parent = bool(parameters.flags & FileFlags.HAS_PARENT)
    layout = Layout(
        header=header,
        header_slot=slot,
        bat=regions[BAT_REGION],
        metadata=metadata,
        items=items,
        size=int.from_bytes(item(VIRTUAL_DISK_SIZE, 8)[:8], "little"),
        block_size=parameters.block_size,
        leave_block_allocated=bool(parameters.flags & FileFlags.LEAVE_BLOCK_ALLOCATED),
        has_parent=has_parent,
        logical_sector_size=int.from_bytes(item(LOGICAL_SECTOR_SIZE, 4)[:4], "little"),
        physical_sector_size=int.from_bytes(item(PHYSICAL_SECTOR_SIZE, 4)[:4], "little"),
        identifier=UUID(bytes_le=bytes(item(PAGE_83_DATA, 16)[:16])),
        locator=parse_locator(name, bytes(item(PARENT_LOCATOR, 20))) if has_parent else {},
        notes=tuple(notes),
    )
    _check_geometry(name, layout)
    return layout


def _read_regions(
    name: str, replayed: ReplayedFile
) -> tuple[dict[UUID, RegionTableEntry], list[str]]:
    notes: list[str] = []
    for number, offset in enumerate(REGION_TABLE_OFFSETS):
        data = replayed.read(offset, REGION_TABLE_SIZE)
        header = RegionTableHeader.unpack(data)
        if header.signature != REGION_TABLE_SIGNATURE or not checksum_is_right(data):
            notes.append(f"region table {number + 1} is not valid")
            continue
        if header.entry_count > MAXIMUM_ENTRIES:
            raise DiskError(f"{name} has {header.entry_count} regions; it is damaged.")
        regions: dict[UUID, RegionTableEntry] = {}
        for index in range(header.entry_count):
            entry = RegionTableEntry.unpack(data, 16 + 32 * index)
            if entry.guid in regions:
                raise DiskError(f"{name} has region {entry.guid} twice; it is damaged.")
            if entry.required & 1 and entry.guid not in (BAT_REGION, METADATA_REGION):
                raise DiskError(
                    f"{name} has a region {entry.guid} that hvhost does not know but must; "
                    "it cannot be used."
                )
            regions[entry.guid] = entry
        return regions, notes
    raise DiskError(f"{name} has no valid region table; it is damaged beyond use.")


def _check_places(name: str, header: Header, regions: dict[UUID, RegionTableEntry]) -> None:
    """Nothing outside, nothing on top of another."""
    places = [(0, HEADER_SECTION_SIZE)]
    if header.log_length:
        places.append((header.log_offset, header.log_length))
    places += [(entry.file_offset, entry.length) for entry in regions.values()]
    for offset, length in places:
        if offset % ALIGNMENT or length % ALIGNMENT or not length or offset > MAXIMUM_FILE_SIZE:
            raise DiskError(f"{name} has a region at no place a region can be; it is damaged.")
    for (first, length), (second, _) in pairwise(sorted(places)):
        if first + length > second:
            raise DiskError(f"{name} has regions that overlap; it is damaged.")


def _read_metadata_table(
    name: str, region: RegionTableEntry, replayed: ReplayedFile
) -> dict[UUID, MetadataTableEntry]:
    data = replayed.read(region.file_offset, METADATA_TABLE_SIZE)
    header = MetadataTableHeader.unpack(data)
    if header.signature != METADATA_SIGNATURE or header.entry_count > MAXIMUM_ENTRIES:
        raise DiskError(f"{name} has no valid metadata table; it is damaged.")
    known = (
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        PAGE_83_DATA,
        LOGICAL_SECTOR_SIZE,
        PHYSICAL_SECTOR_SIZE,
        PARENT_LOCATOR,
    )
    items: dict[UUID, MetadataTableEntry] = {}
    for index in range(header.entry_count):
        entry = MetadataTableEntry.unpack(data, 32 + 32 * index)
        if entry.flags & ItemFlags.IS_USER:
            continue
        if entry.item_id not in known:
            if entry.flags & ItemFlags.IS_REQUIRED:
                raise DiskError(
                    f"{name} has a metadata item {entry.item_id} that hvhost does not know but "
                    "must; it cannot be used."
                )
            continue
        if entry.item_id in items:
            raise DiskError(f"{name} has metadata item {entry.item_id} twice; it is damaged.")
        end = entry.offset + entry.length
        if (
            entry.offset < METADATA_TABLE_SIZE
            or end > region.length
            or entry.length > MAXIMUM_ITEM_SIZE
        ):
            raise DiskError(f"{name} has a metadata item outside its region; it is damaged.")
        items[entry.item_id] = entry
    return items


def _read_item(
    region: RegionTableEntry, entry: MetadataTableEntry, replayed: ReplayedFile
) -> bytearray:
    start = entry.offset // PAGE * PAGE
    end = -(-(entry.offset + entry.length) // PAGE) * PAGE
    data = replayed.read(region.file_offset + start, end - start)
    return data[entry.offset - start : entry.offset - start + entry.length]


def _check_geometry(name: str, layout: Layout) -> None:
    block, size = layout.block_size, layout.size
    if not MINIMUM_BLOCK_SIZE <= block <= MAXIMUM_BLOCK_SIZE or block & (block - 1):
        raise DiskError(f"{name} has blocks of {block} bytes; it is damaged.")
    sectors = (layout.logical_sector_size, layout.physical_sector_size)
    if not set(sectors) <= set(SECTOR_SIZES):
        raise DiskError(
            f"{name} has sectors of {sectors[0]} and {sectors[1]} bytes; it is damaged."
        )
    if not 0 < size <= MAXIMUM_DISK_SIZE or size % layout.logical_sector_size:
        raise DiskError(f"{name} holds a disk of {size} bytes; no VHDX can.")
    if layout.entry_count * BAT_ENTRY_SIZE > layout.bat.length:
        raise DiskError(f"{name} has a block allocation table too short for it; it is damaged.")


def parse_locator(name: str, item: bytes) -> dict[str, str]:
    """2.6.2.6: keys and values of a parent locator."""
    header = ParentLocatorHeader.unpack(item)
    if header.locator_type != VHDX_PARENT_LOCATOR_TYPE:
        raise DiskError(f"{name} names its parent in a way ({header.locator_type}) unknown here.")
    if header.key_value_count > MAXIMUM_LOCATOR_ENTRIES:
        raise DiskError(f"{name} has a parent locator of too many entries; it is damaged.")
    found: dict[str, str] = {}
    for index in range(header.key_value_count):
        place = 20 + 12 * index
        if place + 12 > len(item):
            raise DiskError(f"{name} has a parent locator that was cut; it is damaged.")
        entry = ParentLocatorEntry.unpack(item, place)
        texts: list[str] = []
        for offset, length in (
            (entry.key_offset, entry.key_length),
            (entry.value_offset, entry.value_length),
        ):
            if offset + length > len(item):
                raise DiskError(f"{name} has a parent locator that was cut; it is damaged.")
            texts.append(item[offset : offset + length].decode("utf-16-le", "replace"))
        found[texts[0]] = texts[1]
    return found


def make_locator(entries: dict[str, str]) -> bytes:
    """2.6.2.6: the item for these keys and values."""
    position = 20 + 12 * len(entries)
    table, texts = b"", b""
    for key, value in entries.items():
        first, second = key.encode("utf-16-le"), value.encode("utf-16-le")
        at = position + len(texts)
        table += ParentLocatorEntry(at, at + len(first), len(first), len(second)).pack()
        texts += first + second
    return ParentLocatorHeader(VHDX_PARENT_LOCATOR_TYPE, 0, len(entries)).pack() + table + texts
