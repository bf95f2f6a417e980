"""The log of a VHDX file, [MS-VHDX] 2.3: entries to bytes, and bytes to what must be replayed.

No I/O here: a log is one buffer of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from hvhost.errors import DiskError
from hvhost.storage.vhdx_format import (
    DATA_DESCRIPTOR_SIGNATURE,
    DATA_SECTOR_SIGNATURE,
    LOG_ENTRY_SIGNATURE,
    LOG_SECTOR,
    ZERO_DESCRIPTOR_SIGNATURE,
    DataDescriptor,
    DataSector,
    LogEntryHeader,
    ZeroDescriptor,
    checksum_is_right,
    with_checksum,
)

_HEADER_SIZE = LogEntryHeader.wire_size()
_DESCRIPTOR_SIZE = DataDescriptor.wire_size()
MAXIMUM_LOG_LENGTH = 64 << 20
# Leftovers may overlap each other, but nobody shall spend minutes, or all memory, on a log made for
# that: it is looked at so many times over, a descriptor being as much as the sector it stands for.
_BUDGET = 16
_STEP_BUDGET = 1 << 20
_MAXIMUM_CLEARED_RANGES = 1024


@dataclass(frozen=True, slots=True)
class Replay:
    """What a log wants done: pages to write, ranges to clear, and how long the file must be."""

    pages: dict[int, bytes] = field(default_factory=dict)
    cleared: list[tuple[int, int]] = field(default_factory=list)
    flushed_file_offset: int = 0
    last_file_offset: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    header: LogEntryHeader
    position: int
    descriptors: tuple[ZeroDescriptor | DataDescriptor, ...]
    sectors_at: int


def entry_length(pages: int) -> int:
    """Bytes of an entry with that many pages."""
    return LOG_SECTOR * (_descriptor_sectors(pages) + pages)


def _descriptor_sectors(descriptors: int) -> int:
    return max(1, -(-(_HEADER_SIZE + descriptors * _DESCRIPTOR_SIZE) // LOG_SECTOR))


def make_entry(
    pages: Mapping[int, bytes],
    *,
    position: int,
    sequence_number: int,
    log_guid: UUID,
    flushed_file_offset: int,
    last_file_offset: int,
) -> bytes:
    """An entry that is a sequence of its own, for *position* in the log.

    *pages* are 4 KiB each, by their offset in the file.
    """
    size = entry_length(len(pages))
    header = LogEntryHeader(
        LOG_ENTRY_SIGNATURE,
        0,
        size,
        position,
        sequence_number,
        len(pages),
        0,
        log_guid,
        flushed_file_offset,
        last_file_offset,
    )
    descriptors = [
        DataDescriptor(
            DATA_DESCRIPTOR_SIGNATURE, page[-4:], page[:8], offset, sequence_number
        ).pack()
        for offset, page in pages.items()
    ]
    high, low = sequence_number >> 32, sequence_number & 0xFFFFFFFF
    sectors = [
        DataSector(DATA_SECTOR_SIGNATURE, high, page[8:-4], low).pack() for page in pages.values()
    ]
    front = b"".join([header.pack(), *descriptors])
    front = front.ljust(LOG_SECTOR * _descriptor_sectors(len(pages)), b"\0")
    return with_checksum(front + b"".join(sectors), size)


def read_log(log: bytes | bytearray, log_guid: UUID, name: str) -> Replay:
    """What the active sequence of *log* wants done; nothing if there is none.

    :class:`DiskError` for a log whose active sequence cannot be replayed.
    """
    sequence = _active_sequence(_valid_entries(log, log_guid, name), len(log), name)
    pages: dict[int, bytes] = {}
    cleared: list[tuple[int, int]] = []
    for entry in sequence:
        _collect(entry, _bytes_of(log, entry), pages, cleared, name)
    if not sequence:
        return Replay()
    last = sequence[-1].header
    return Replay(pages, cleared, last.flushed_file_offset, last.last_file_offset)


def _valid_entries(log: bytes | bytearray, log_guid: UUID, name: str) -> dict[int, _Entry]:
    """All entries that are whole and of this log, by position."""
    found: dict[int, _Entry] = {}
    budget = _BUDGET * len(log)
    for position in range(0, len(log), LOG_SECTOR):
        if log[position : position + 4] != LOG_ENTRY_SIGNATURE:
            continue
        header = LogEntryHeader.unpack(log, position)
        size = header.entry_length
        if (
            header.log_guid != log_guid
            or not header.sequence_number
            or size % LOG_SECTOR
            or size > len(log)
            or header.tail % LOG_SECTOR
            or header.tail >= len(log)
            or _descriptor_sectors(header.descriptor_count) * LOG_SECTOR > size
        ):
            continue
        budget -= max(size, header.descriptor_count * LOG_SECTOR)
        if budget < 0:
            raise DiskError(f"{name} has a log that says many times what it holds; it is damaged.")
        data = _circular(log, position, size)
        entry = _parse(header, position, data) if checksum_is_right(data) else None
        if entry is not None:
            found[position] = entry
    return found


def _circular(log: bytes | bytearray, position: int, size: int) -> bytes:
    """*size* bytes at *position*; they may go on at the log's start."""
    data = bytes(log[position : position + size])
    return data + bytes(log[: size - len(data)])


def _bytes_of(log: bytes | bytearray, entry: _Entry) -> bytes:
    return _circular(log, entry.position, entry.header.entry_length)


def _parse(header: LogEntryHeader, position: int, data: bytes) -> _Entry | None:
    """The entry, or None where a part of it is of another write."""
    descriptors: list[ZeroDescriptor | DataDescriptor] = []
    first_sector = at = _descriptor_sectors(header.descriptor_count) * LOG_SECTOR
    for number in range(header.descriptor_count):
        place = _HEADER_SIZE + number * _DESCRIPTOR_SIZE
        signature = data[place : place + 4]
        descriptor: ZeroDescriptor | DataDescriptor
        if signature == ZERO_DESCRIPTOR_SIGNATURE:
            descriptor = ZeroDescriptor.unpack(data, place)
        elif signature == DATA_DESCRIPTOR_SIGNATURE and at + LOG_SECTOR <= len(data):
            descriptor = DataDescriptor.unpack(data, place)
            sector = DataSector.unpack(data, at)
            number_there = sector.sequence_high << 32 | sector.sequence_low
            if sector.signature != DATA_SECTOR_SIGNATURE or number_there != header.sequence_number:
                return None
            at += LOG_SECTOR
        else:
            return None
        if descriptor.sequence_number != header.sequence_number:
            return None
        descriptors.append(descriptor)
    return _Entry(header, position, tuple(descriptors), first_sector)


def _active_sequence(entries: dict[int, _Entry], log_length: int, name: str) -> list[_Entry]:
    """2.3.2: the entries, one behind the other, up to the one with the highest number."""
    before: dict[tuple[int, int], _Entry] = {}  # by next number and position
    for entry in entries.values():
        end = (entry.position + entry.header.entry_length) % log_length
        before.setdefault((entry.header.sequence_number + 1, end), entry)
    steps = 0
    for head in sorted(entries.values(), key=lambda each: -each.header.sequence_number):
        sequence = [head]
        while sequence[-1].position != head.header.tail:
            steps += 1
            if steps > _STEP_BUDGET:
                raise DiskError(f"{name} has a log whose entries lead nowhere; it is damaged.")
            last = sequence[-1]
            previous = before.get((last.header.sequence_number, last.position))
            if previous is None:
                break
            sequence.append(previous)
        else:
            return sequence[::-1]
    return []


def _collect(
    entry: _Entry,
    data: bytes,
    pages: dict[int, bytes],
    cleared: list[tuple[int, int]],
    name: str,
) -> None:
    """Add what *entry* wants done to what the ones before it want: clear first, then write."""
    at = entry.sectors_at
    for descriptor in entry.descriptors:
        length = descriptor.zero_length if isinstance(descriptor, ZeroDescriptor) else LOG_SECTOR
        start, end = descriptor.file_offset, descriptor.file_offset + length
        if (start | length) % LOG_SECTOR or end > entry.header.last_file_offset:
            raise DiskError(f"{name} has a log that writes outside the file; it is damaged.")
        if isinstance(descriptor, ZeroDescriptor):
            cleared.append((start, length))
            if len(cleared) > _MAXIMUM_CLEARED_RANGES:
                raise DiskError(f"{name} has a log that clears too many ranges; it is damaged.")
            for page in [each for each in pages if start <= each < end]:
                del pages[page]
            continue
        sector = DataSector.unpack(data, at)
        pages[start] = descriptor.leading_bytes + sector.data + descriptor.trailing_bytes
        at += LOG_SECTOR
