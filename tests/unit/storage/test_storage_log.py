"""Logs of VHDX files, as torn writes leave them and as somebody could make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hvhost.errors import DiskError
from hvhost.storage import vhdx_log
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_format import (
    LOG_SECTOR,
    MIB,
    DataDescriptor,
    DataSector,
    LogEntryHeader,
    ZeroDescriptor,
    with_checksum,
)
from hvhost.storage.vhdx_log import Replay, read_log
from simulated.damaged_images import LOG_GUID, with_log
from simulated.image_files import MemoryFile

BAT = 3 * MIB


def data(place: int = BAT, number: int = 1) -> DataDescriptor:
    return DataDescriptor(b"desc", b"last", b"firstone", place, number)


def zero(place: int = BAT, length: int = LOG_SECTOR, number: int = 1) -> ZeroDescriptor:
    return ZeroDescriptor(b"zero", 0, length, place, number)


def sector(number: int = 1) -> DataSector:
    return DataSector(b"data", 0, b"x" * 4084, number)


PAGE = b"firstone" + b"x" * 4084 + b"last"


def made(
    descriptors: Sequence[DataDescriptor | ZeroDescriptor] = (),
    sectors: Sequence[DataSector] = (),
    **changes: int | bytes,
) -> bytes:
    """An entry of these parts with a right checksum; *changes* of its header."""
    table = b"".join(each.pack() for each in descriptors)
    front = -(-(64 + len(table)) // LOG_SECTOR) * LOG_SECTOR
    size = front + LOG_SECTOR * len(sectors)
    header = replace(
        LogEntryHeader(b"loge", 0, size, 0, 1, len(descriptors), 0, LOG_GUID, 4 * MIB, 4 * MIB),
        **changes,  # type: ignore[arg-type]
    )
    content = (header.pack() + table).ljust(front, b"\0") + b"".join(s.pack() for s in sectors)
    size = header.entry_length
    return with_checksum(content.ljust(size, b"\0")[:size], size) if size >= 64 else content


def replay(*entries: bytes | tuple[int, bytes], length: int = MIB) -> Replay:
    """What a log of these wants done; an entry stands at its position, or at the start."""
    log = bytearray(length)
    for each in entries:
        position, content = each if isinstance(each, tuple) else (0, each)
        log[position : position + len(content)] = content
    return read_log(log, LOG_GUID, "x")


def test_what_is_made_here_is_replayed() -> None:
    found = replay(made([data(), zero(2 * MIB)], [sector()]))
    assert found == Replay({BAT: PAGE}, [(2 * MIB, LOG_SECTOR)], 4 * MIB, 4 * MIB)


# --- entries that are none ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        made([data()], [sector()], signature=b"log_"),
        made([data(number=0)], [sector(0)], sequence_number=0),
        made([data()], [sector()], entry_length=2 * LOG_SECTOR + 512),
        made([data()], [sector()], entry_length=0),
        made([data()], [sector()], descriptor_count=2),
        made([data()], [sector()], descriptor_count=0xFFFFFFFF),
        made([data()], [sector()], descriptor_count=130),
        made([data()], [replace(sector(), signature=b"dat_")]),
        made([data()], [sector(2)]),
        made([data()], [replace(sector(), sequence_high=1)]),
        made([data(number=2)], [sector()]),
        made([zero(number=2)]),
        made([replace(data(), signature=b"dest")], [sector()]),
        made([replace(zero(), signature=b"zer0")]),
        made([data(), data(2 * MIB)], [sector()]),
        made([data()]),
    ],
)
def test_an_entry_with_a_part_that_does_not_fit_is_none(entry: bytes) -> None:
    """The one before it counts then, as after a write that was torn."""
    assert replay(entry) == Replay()
    found = replay((MIB // 2, made([zero(MIB)], tail=MIB // 2)), entry)
    assert found.cleared == [(MIB, LOG_SECTOR)] and not found.pages
    disk = VhdxDisk(MemoryFile(with_log(entry)))
    assert disk.size == 4 * MIB


def test_an_entry_longer_than_its_log_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum can be made to fit anything."""
    monkeypatch.setattr(vhdx_log, "checksum_is_right", lambda data: True)
    entry = made([data()], [sector()])
    assert replay(entry, length=2 * LOG_SECTOR).pages
    longer = LogEntryHeader.unpack(entry)
    longer = replace(longer, entry_length=3 * LOG_SECTOR)
    assert not replay(longer.pack() + entry[64:], length=2 * LOG_SECTOR).pages


@pytest.mark.parametrize("tail", [512, MIB, 1 << 31])
def test_an_entry_whose_tail_is_nowhere_is_in_no_sequence(tail: int) -> None:
    second = made([data(number=2)], [sector(2)], sequence_number=2, tail=0)
    for first_tail, count in ((0, 1), (tail, 0)):
        first = made([zero()], tail=first_tail)
        found = replay(first, (len(first), second))
        assert len(found.cleared) == len(found.pages) == count


# --- logs made to be slow -----------------------------------------------------------------------


def test_more_descriptors_than_a_log_is_good_for() -> None:
    """Each has a sector with it, or clears a range: thousands of the latter fill memory only."""
    with pytest.raises(DiskError, match="many times what it holds"):
        replay(made([zero()] * 5000))
    with pytest.raises(DiskError, match="clears too many ranges"):
        replay(made([zero()] * 1025))
    assert len(replay(made([zero()] * 1024)).cleared) == 1024
    many = [data(place * LOG_SECTOR) for place in range(200)]
    assert len(replay(made(many, [sector()] * 200)).pages) == 200


def test_entries_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on with the one before it, and none of them ends at its tail."""
    size = LOG_SECTOR
    entries = [
        (size * number, made(sequence_number=number + 1, tail=size * 200)) for number in range(100)
    ]
    assert replay(*entries) == Replay()
    monkeypatch.setattr(vhdx_log, "_STEP_BUDGET", 1000)
    with pytest.raises(DiskError, match="lead nowhere"):
        replay(*entries)


# --- what cannot be done ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "descriptor",
    [
        data(BAT + 512),
        data(4 * MIB),
        zero(BAT + 512),
        zero(length=512),
        zero(length=2 * MIB),
        zero(1 << 63, 1 << 62),
    ],
)
def test_a_log_that_writes_where_it_must_not(descriptor: DataDescriptor | ZeroDescriptor) -> None:
    sectors = [sector()] if isinstance(descriptor, DataDescriptor) else []
    with pytest.raises(DiskError, match="writes outside the file"):
        replay(made([descriptor], sectors))


# --- what is done -------------------------------------------------------------------------------


def test_what_is_cleared_and_written_in_turn() -> None:
    """A later descriptor goes over an earlier one, also of an entry before."""
    first = made([data(), data(BAT + LOG_SECTOR)], [sector(), sector()])
    second = made(
        [zero(number=2), data(BAT + 2 * LOG_SECTOR, 2), zero(BAT + 2 * LOG_SECTOR, number=2)],
        [sector(2)],
        sequence_number=2,
    )
    found = replay(first, (len(first), second))
    assert found.pages == {BAT + LOG_SECTOR: PAGE}
    assert found.cleared == [(BAT, LOG_SECTOR), (BAT + 2 * LOG_SECTOR, LOG_SECTOR)]


@pytest.mark.parametrize("read_only", [True, False])
def test_what_the_log_clears_is_not_there(read_only: bool) -> None:
    """Of the table, the entry of a block whose place is another's now."""
    content = with_log(made([zero(BAT)]))
    content[BAT : BAT + 8] = (900 << 40 | 6).to_bytes(8, "little")
    disk = VhdxDisk(MemoryFile(content), read_only=read_only)
    buffer = memoryview(bytearray(b"x" * 512))
    disk.readv(0, [buffer])
    assert buffer == bytes(512)
    disk.close()
    assert isinstance(disk.file, MemoryFile)
    assert any(disk.file.content[BAT : BAT + 8]) is read_only


def test_a_log_that_is_longer_than_the_file_is() -> None:
    """The file had been extended, and a crash lost that."""
    place = 4 * MIB
    entry = (place | 6).to_bytes(8, "little").ljust(4096, b"\0")
    first = replace(data(), leading_bytes=entry[:8], trailing_bytes=entry[-4:])
    log = made([first], [replace(sector(), data=entry[8:-4])], last_file_offset=5 * MIB)
    for read_only in (True, False):
        disk = VhdxDisk(MemoryFile(with_log(log)), read_only=read_only)
        assert disk.file.size() == (4 if read_only else 5) * MIB
        disk.close()
    with pytest.raises(DiskError, match="outside the file"):
        VhdxDisk(MemoryFile(with_log(made([first], [replace(sector(), data=entry[8:-4])]))))
