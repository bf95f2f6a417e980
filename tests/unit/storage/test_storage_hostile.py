"""Damaged and hostile images are refused with a sentence: no traceback, no endless work."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.operations import check
from hvhost.storage.vhd_create import VhdOptions
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_check import check_vhdx
from hvhost.storage.vhdx_create import BAT_OFFSET, VhdxOptions, create_vhdx
from hvhost.storage.vhdx_format import (
    HEADER_OFFSETS,
    LOG_SECTOR,
    MIB,
    REGION_TABLE_OFFSETS,
    BitmapState,
    LogEntryHeader,
    PayloadState,
)
from hvhost.storage.vhdx_log import read_log
from simulated.damaged_images import (
    LOG_GUID,
    log_entry,
    put_entry,
    refusal,
    vhdx,
    with_log,
    with_region,
)
from simulated.disk_targets import VHDX_PLACES, fuzz_vhd, fuzz_vhdx
from simulated.image_files import MemoryFile

DAMAGE = st.lists(
    st.tuples(
        st.integers(0, len(VHDX_PLACES) - 1),
        st.one_of(st.integers(0, 160), st.integers(0, 4095)),
        st.binary(min_size=1, max_size=16),
    ),
    max_size=4,
)


def as_bytes(first: int, damage: list[tuple[int, int, bytes]]) -> bytes:
    pieces = [
        bytes([place]) + offset.to_bytes(2, "little") + bytes([len(data)]) + data
        for place, offset, data in damage
    ]
    return bytes([first]) + b"".join(pieces)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 15), DAMAGE)
def test_damaged_vhdx(first: int, damage: list[tuple[int, int, bytes]]) -> None:
    fuzz_vhdx(as_bytes(first, damage))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 15), DAMAGE)
def test_damaged_vhd(first: int, damage: list[tuple[int, int, bytes]]) -> None:
    fuzz_vhd(as_bytes(first, damage))


@pytest.mark.parametrize(
    ("place", "state", "said"),
    [
        (900 << 40, PayloadState.FULLY_PRESENT, "outside the file"),
        (4 * MIB, PayloadState.FULLY_PRESENT, "outside the file"),
        (2 * MIB, PayloadState.FULLY_PRESENT, "two things at one place"),
        (0, PayloadState.FULLY_PRESENT, "two things at one place"),
        (0, PayloadState.PARTIALLY_PRESENT, "in part, but not what says which"),
        (0, 5, "in state 5"),
    ],
)
def test_blocks_that_cannot_be(place: int, state: int, said: str) -> None:
    content = vhdx()
    put_entry(content, 1, place, state)
    assert said in refusal(content)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (900 << 40, "sector bitmap 0 outside the file"),
        (5 * MIB, "sector bitmap 0 outside the file"),
        (3 * MIB, "two things at one place"),
    ],
)
def test_sector_bitmaps_that_cannot_be(place: int, said: str) -> None:
    """What lies outside would read as zeros: as if nothing were the file's own."""
    file = MemoryFile()
    options = VhdxOptions(4 * MIB, block_size=MIB, locator={"parent_linkage": "x"})
    create_vhdx(file, options)
    file.truncate(5 * MIB)
    put_entry(file.content, 4096, 4 * MIB, BitmapState.PRESENT)
    assert check_vhdx(VhdxDisk(MemoryFile(file.content), read_only=True)).clean
    put_entry(file.content, 4096, place, BitmapState.PRESENT)
    assert said in refusal(file.content)


def test_two_blocks_at_one_place() -> None:
    content = vhdx(fixed=True)
    entry = content[BAT_OFFSET : BAT_OFFSET + 8]
    content[BAT_OFFSET + 8 : BAT_OFFSET + 16] = entry
    assert "two things at one place" in refusal(content)


def test_regions_that_cannot_be() -> None:
    assert "overlap" in refusal(with_region(0, file_offset=2 * MIB))
    assert "overlap" in refusal(with_region(0, file_offset=MIB))
    assert "no place" in refusal(with_region(0, file_offset=3 * MIB + 512))
    assert "no place" in refusal(with_region(1, file_offset=1 << 60))
    assert "no place" in refusal(with_region(1, length=0))
    assert "does not know" in refusal(with_region(0, guid=uuid4()))
    content = vhdx()
    for offset in (*REGION_TABLE_OFFSETS, *HEADER_OFFSETS):
        content[offset + 20] ^= 1
    assert "no valid header" in refusal(content)


def test_one_valid_copy_is_enough() -> None:
    content = vhdx()
    content[REGION_TABLE_OFFSETS[0] + 20] ^= 1
    content[HEADER_OFFSETS[1] + 20] ^= 1
    disk = VhdxDisk(MemoryFile(content), read_only=True)
    assert len(disk.notes) == 2


# --- logs ---------------------------------------------------------------------------------------


def test_headers_that_leave_no_number_for_the_next() -> None:
    assert "cannot be counted on" in refusal(with_log(b"", sequence_number=2**64 - 1))


def test_a_log_that_cannot_be() -> None:
    assert "a log of" in refusal(with_log(b"", log_length=1 << 31))
    assert "outside the file" in refusal(with_log(b"", log_offset=1 << 40))
    assert "log of version 3" in refusal(with_log(b"", log_version=3))
    assert "was cut" in refusal(with_log(log_entry(flushed_file_offset=1 << 30)))
    assert "extends it without end" in refusal(with_log(log_entry(last_file_offset=1 << 60)))
    assert "writes outside" in refusal(with_log(log_entry(last_file_offset=MIB)))


def test_only_a_whole_sequence_is_replayed() -> None:
    """The highest number whose entries are all there, from its tail on; not a torn one above."""
    log = bytearray(MIB)

    def place(position: int, data: bytes) -> None:
        log[position : position + len(data)] = data

    place(0, log_entry(0, 1))
    place(16384, log_entry(16384, 5))
    place(32768, log_entry(32768, 6, tail=16384))  # not behind the one at its tail
    place(65536, log_entry(65536, 9)[:-1] + b"\1")  # torn
    place(131072, log_entry(131072, 8, tail=98304))  # leads nowhere
    assert read_log(log, LOG_GUID, "x").pages == {3 * MIB: bytes([5]) * LOG_SECTOR}
    assert not read_log(log, uuid4(), "x").pages
    size = len(log_entry())
    place(16384 + size, log_entry(16384 + size, 6, tail=16384))
    assert read_log(log, LOG_GUID, "x").pages == {3 * MIB: bytes([6]) * LOG_SECTOR}


def test_a_log_made_to_be_slow() -> None:
    """Entries that each claim the whole log, all with right checksums, are not all summed up."""
    log = bytearray(MIB)
    for position in range(0, MIB, LOG_SECTOR):
        claim = LogEntryHeader(b"loge", 0, MIB, 0, 1, 0, 0, LOG_GUID, 0, 0)
        log[position : position + 64] = claim.pack()
    with pytest.raises(DiskError, match="many times what it holds"):
        read_log(log, LOG_GUID, "x")


def test_a_wrapped_entry_is_read() -> None:
    log = bytearray(MIB)
    data = log_entry(MIB - LOG_SECTOR, 3)
    log[MIB - LOG_SECTOR :] = data[:LOG_SECTOR]
    log[: len(data) - LOG_SECTOR] = data[LOG_SECTOR:]
    assert read_log(log, LOG_GUID, "x").pages


# --- chains -------------------------------------------------------------------------------------


def test_a_loop_of_parents(tmp_path: Path) -> None:
    one, other = tmp_path / "one.vhdx", tmp_path / "other.vhdx"
    create_disk(one, VhdxOptions(4 * MIB)).close()
    create_disk(other, differencing_options(other, one)).close()
    one.unlink()
    os.link(other, one)
    with pytest.raises(DiskError, match="its own parent"):
        open_disk(other)
    assert not check(other).clean


@pytest.mark.parametrize("suffix", ["vhdx", "vhd"])
def test_a_longer_loop_of_parents(tmp_path: Path, suffix: str) -> None:
    """One names two, two names three, and three names one."""
    options = VhdxOptions(4 * MIB) if suffix == "vhdx" else VhdOptions(4 * MIB)
    base, *links = (tmp_path / f"{name}.{suffix}" for name in ("base", "one", "two", "three"))
    create_disk(base, options).close()
    below = base
    for path in links:
        create_disk(path, differencing_options(path, below)).close()
        below = path
    base.unlink()
    base.symlink_to(links[-1])
    for path in links:
        with pytest.raises(DiskError, match="its own parent"):
            open_disk(path, read_only=True)
        (error,) = check(path).errors
        assert "its own parent" in error


def test_a_chain_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvhost.storage.images.MAXIMUM_CHAIN", 3)
    links = [tmp_path / f"{number}.vhdx" for number in range(4)]
    create_disk(links[0], VhdxOptions(4 * MIB)).close()
    for below, path in pairwise(links[:3]):
        create_disk(path, differencing_options(path, below)).close()
    open_disk(links[2], read_only=True).close()
    with pytest.raises(DiskError, match="parent of more than 3 images"):
        create_disk(links[3], differencing_options(links[3], links[2]))
    assert not links[3].exists()


def test_a_parent_that_changed_or_is_gone(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    create_disk(base, VhdxOptions(4 * MIB)).close()
    create_disk(child, differencing_options(child, base)).close()
    disk = open_disk(child)
    with pytest.raises(HvHostError, match="cannot be written to now"):
        open_disk(base)
    reader = open_disk(base, read_only=True)
    reader.close()
    disk.close()
    disk = open_disk(base)
    disk.writev(0, [memoryview(bytes(512))])
    disk.close()
    with pytest.raises(DiskError, match="has changed since"):
        open_disk(child)
    base.unlink()
    with pytest.raises(DiskError, match="needs its parent"):
        open_disk(child)


def test_a_guest_cannot_turn_its_raw_disk_into_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(vhdx())
    disk = open_disk(path)
    assert disk.size == path.stat().st_size
    disk.close()
    unnamed = tmp_path / "a"
    unnamed.write_bytes(bytes(MIB))
    with pytest.raises(HvHostError, match="nothing says so"):
        open_disk(unnamed)


def test_a_table_as_big_as_it_can_be_costs_nothing(tmp_path: Path) -> None:
    """64 TiB in blocks of 1 MiB: a table of half a GiB, of which nothing is used."""
    path = tmp_path / "a.vhdx"
    disk = create_disk(path, VhdxOptions(64 << 40, block_size=MIB))
    assert isinstance(disk, VhdxDisk)
    disk.writev((64 << 40) - 4096, [memoryview(bytes(4096))])
    assert len({id(piece) for piece in disk.table.pieces}) == 2
    disk.close()
