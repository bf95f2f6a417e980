"""Disks and DVD drives as SCSI units: commands and answers, without a bus."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvhost.storage import inquiry, mode, scsi
from hvhost.storage.block import DiskUnit
from hvhost.storage.inquiry import DeviceType, Identity
from hvhost.storage.mode import ModeParameters
from hvhost.storage.optical import OpticalUnit
from hvhost.storage.raw import RawDisk
from hvhost.storage.scsi import CheckCondition
from hvhost.storage.unit import EVENT_EJECT_REQUEST, MAXIMUM_ATTENTIONS, UnitState
from simulated.storage import MemoryDisk

MIB = 1 << 20
SIZE = 2 * MIB
BLOCKS = SIZE // 512
ILLEGAL_FIELD, OUT_OF_RANGE = (5, 0x24, 0), (5, 0x21, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


@pytest.fixture
def unit(path: Path) -> Iterator[DiskUnit]:
    built = DiskUnit(RawDisk.create(path, SIZE))
    yield built
    built.close()


def run(unit: DiskUnit | OpticalUnit, cdb: bytes, data: bytes | int = 0) -> bytes:
    """A command with data, or with room for an answer: the data it was given or the room after."""
    room = bytearray(data)
    count = unit.execute(cdb.ljust(16, b"\0"), [memoryview(room)] if room else [])
    return bytes(room[:count])


def sense(unit: DiskUnit | OpticalUnit, cdb: bytes, data: bytes | int = 0) -> tuple[int, int, int]:
    with pytest.raises(CheckCondition) as failed:
        run(unit, cdb, data)
    found = failed.value.sense
    packed = found.pack()
    assert len(packed) == 18 and packed[0] == 0x70 and packed[7] == 10
    return packed[2], packed[12], packed[13]


def ten(code: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", code, flags, lba, 0, blocks, 0)


def twelve(code: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIIBB", code, flags, lba, blocks, 0, 0)


def sixteen(code: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", code, flags, lba, blocks, 0, 0)


def six(code: int, lba: int, blocks: int) -> bytes:
    return bytes((code,)) + lba.to_bytes(3, "big") + bytes((blocks & 0xFF, 0))


FORMS = {0x08: six, 0x28: ten, 0xA8: twelve, 0x88: sixteen}


@pytest.mark.parametrize(("read", "form"), FORMS.items())
def test_every_form_of_read_and_write(unit: DiskUnit, read: int, form: object) -> None:
    data = os.urandom(3 * 512)
    run(unit, form(read + 2, 77, 3), data)  # type: ignore[operator]
    assert run(unit, form(read, 77, 3), 3 * 512) == data  # type: ignore[operator]


def test_a_short_form_with_no_count_means_256_blocks(unit: DiskUnit) -> None:
    assert len(run(unit, six(0x08, 0, 0), 256 * 512)) == 256 * 512
    assert run(unit, ten(0x28, 0, 0), 0) == b""


@given(
    code=st.sampled_from([0x28, 0xA8, 0x88]),
    lba=st.integers(0, BLOCKS + 2) | st.integers(0, 2**32 - 1),
    blocks=st.integers(0, 20),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_ranges_end_with_the_disk(unit: DiskUnit, code: int, lba: int, blocks: int) -> None:
    cdb = FORMS[code](code, lba, blocks)
    if lba + blocks <= BLOCKS:
        assert len(run(unit, cdb, blocks * 512)) == blocks * 512
    else:
        assert sense(unit, cdb, blocks * 512) == OUT_OF_RANGE


def test_a_buffer_too_small_for_the_command(unit: DiskUnit) -> None:
    assert sense(unit, ten(0x28, 0, 2), 512) == ILLEGAL_FIELD
    assert sense(unit, ten(0x2A, 0, 2), bytes(512)) == ILLEGAL_FIELD
    assert run(unit, ten(0x28, 0, 1), 1024) == bytes(512)


def test_protection_information_is_not_there(unit: DiskUnit) -> None:
    assert sense(unit, ten(0x28, 0, 1, flags=0x20), 512) == ILLEGAL_FIELD


def test_read_only(path: Path) -> None:
    RawDisk.create(path, SIZE).close()
    unit = DiskUnit(RawDisk(path, read_only=True))
    for cdb, data in (
        (ten(0x2A, 0, 1), bytes(512)),
        (sixteen(0x93, 0, 1), bytes(512)),
        (struct.pack(">BB5xHB", 0x42, 0, 24, 0), struct.pack(">HHIQII", 22, 16, 0, 0, 1, 0)),
    ):
        assert sense(unit, cdb, data) == (7, 0x27, 0)
    assert run(unit, bytes((0x1A, 8, 0x3F, 0, 255)), 255)[2] & 0x80
    capacity = run(unit, bytes((0x9E, 0x10)) + bytes(8) + b"\0\0\0\x20", 32)
    assert capacity[14] == 0
    unit.close()


def test_unmap(unit: DiskUnit, path: Path) -> None:
    run(unit, ten(0x2A, 0, 4000), b"x" * 4000 * 512)
    before = path.stat().st_blocks
    ranges = struct.pack(">QII", 8, 1600, 0) + struct.pack(">QII", 3000, 0, 0)
    parameters = struct.pack(">HHI", len(ranges) + 6, len(ranges), 0) + ranges
    run(unit, struct.pack(">BB5xHB", 0x42, 0, len(parameters), 0), parameters)
    assert path.stat().st_blocks <= before - 1600
    assert run(unit, ten(0x28, 7, 3), 3 * 512) == b"x" * 512 + bytes(1024)


def test_an_unmap_beyond_the_end_changes_nothing(unit: DiskUnit) -> None:
    run(unit, ten(0x2A, 0, 1), b"x" * 512)
    ranges = struct.pack(">QII", 0, 1, 0) + struct.pack(">QII", BLOCKS, 1, 0)
    parameters = struct.pack(">HHI", len(ranges) + 6, len(ranges), 0) + ranges
    cdb = struct.pack(">BB5xHB", 0x42, 0, len(parameters), 0)
    assert sense(unit, cdb, parameters) == OUT_OF_RANGE
    assert run(unit, ten(0x28, 0, 1), 512) == b"x" * 512
    assert sense(unit, cdb, parameters[:10]) == (5, 0x1A, 0)
    assert run(unit, struct.pack(">BB5xHB", 0x42, 0, 0, 0)) == b""


@pytest.mark.parametrize("flags", [0, 8])
def test_write_same(unit: DiskUnit, flags: int) -> None:
    block = os.urandom(512)
    run(unit, sixteen(0x93, 4, 3000, flags), block)
    assert run(unit, ten(0x28, 4, 3000), 3000 * 512) == block * 3000
    run(unit, ten(0x41, 5, 2000, flags), bytes(512))
    assert run(unit, ten(0x28, 4, 3), 3 * 512) == block + bytes(1024)
    run(unit, sixteen(0x93, 4, 1, flags | 1))
    assert run(unit, ten(0x28, 4, 1), 512) == bytes(512)
    assert sense(unit, sixteen(0x93, 4, 0, flags), block) == ILLEGAL_FIELD


def test_write_same_with_unmap_gives_storage_back(unit: DiskUnit, path: Path) -> None:
    run(unit, ten(0x2A, 0, 4000), b"x" * 4000 * 512)
    before = path.stat().st_blocks
    run(unit, sixteen(0x93, 0, 3200, 8), bytes(512))
    assert path.stat().st_blocks <= before - 3200


def test_verify(unit: DiskUnit) -> None:
    data = os.urandom(1024)
    run(unit, ten(0x2A, 9, 2), data)
    run(unit, ten(0x2F, 9, 2, flags=2), data)
    assert run(unit, ten(0x2F, 9, 2)) == b""
    assert sense(unit, ten(0x2F, 9, 2, flags=2), bytes(1024)) == (14, 0x1D, 0)
    assert sense(unit, sixteen(0x8F, BLOCKS, 1)) == OUT_OF_RANGE
    run(unit, ten(0x2E, 9, 1), b"v" * 512)  # WRITE AND VERIFY
    assert run(unit, ten(0x28, 9, 1), 512) == b"v" * 512


def test_capacity(unit: DiskUnit) -> None:
    assert struct.unpack(">II", run(unit, bytes((0x25,)), 8)) == (BLOCKS - 1, 512)
    answer = run(unit, bytes((0x9E, 0x10)) + bytes(8) + b"\0\0\0\x20", 32)
    last, block, _, exponent, provisioning = struct.unpack(">QIBBB", answer[:15])
    assert (last, block, exponent, provisioning) == (BLOCKS - 1, 512, 3, 0xC0)
    assert len(run(unit, bytes((0x9E, 0x10)) + bytes(8) + b"\0\0\0\x0c", 32)) == 12
    assert sense(unit, bytes((0x9E, 0x11)), 32) == ILLEGAL_FIELD


@pytest.mark.parametrize("code", [0x5E, 0xA3, 0x8B, 0xFF, 0x43])
def test_commands_that_a_disk_does_not_have(unit: DiskUnit, code: int) -> None:
    assert sense(unit, bytes((code,))) == (5, 0x20, 0)


def test_start_stop_flushes_and_has_no_tray(unit: DiskUnit) -> None:
    assert run(unit, bytes((0x1B, 0, 0, 0, 0))) == run(unit, bytes((0x1B, 0, 0, 0, 1))) == b""
    assert sense(unit, bytes((0x1B, 0, 0, 0, 2))) == ILLEGAL_FIELD
    for hold in (1, 0):
        assert run(unit, bytes((0x1E, 0, 0, 0, hold))) == b"", "nothing that could be removed"


def test_request_sense_takes_an_attention_away(unit: DiskUnit) -> None:
    unit.capacity_changed()
    unit.capacity_changed()
    assert run(unit, bytes((3, 0, 0, 0, 18)), 18)[12:14] == b"\x2a\x09"
    assert run(unit, bytes((3, 1, 0, 0, 18)), 18) == b"\x72" + bytes(7)


def pages_of(unit: DiskUnit | OpticalUnit) -> dict[int, bytes]:
    def page(number: int) -> bytes:
        answer = run(unit, bytes((0x12, 1, number, 0, 255)), 255)
        assert answer[1] == number and len(answer) == 4 + int.from_bytes(answer[2:4], "big")
        return answer[4:]

    return {number: page(number) for number in page(0)}


def test_vital_product_data(unit: DiskUnit) -> None:
    pages = pages_of(unit)
    assert list(pages) == [0, 0x80, 0x83, 0xB0, 0xB1, 0xB2]
    assert pages[0x80] == unit.disk.identifier.hex.encode()
    assert pages[0x83][:4] == b"\x01\x03\x00\x10"
    assert pages[0x83][4:20] == unit.identity.naa
    assert len(pages[0xB0]) == 60 and len(pages[0xB1]) == 60
    assert pages[0xB0][0] == 1 and struct.unpack(">I", pages[0xB0][16:20])[0] == 0xFFFFFFFF
    assert pages[0xB2][1] == 0xE4
    assert sense(unit, bytes((0x12, 1, 0xC0, 0, 255)), 255) == ILLEGAL_FIELD
    assert sense(unit, bytes((0x12, 0, 0x80, 0, 255)), 255) == ILLEGAL_FIELD


@pytest.mark.parametrize(("sector", "in_page"), [(512, 8), (4096, 1)])
def test_pages_of_blocks(sector: int, in_page: int) -> None:
    """Limits in blocks: 2 MiB a command, 64 MiB a WRITE SAME, UNMAP best in pages of 4 KiB."""
    pages = pages_of(DiskUnit(MemoryDisk(MIB, sector=sector)))
    limits = struct.unpack(">BBHIIIIIIIQ", pages[0xB0][:40])
    transfer, write_same = 2 * MIB // sector, 64 * MIB // sector
    unmap = (0xFFFFFFFF, 256, in_page, 1 << 31)
    assert limits == (1, 0, in_page, transfer, 0, 0, *unmap, write_same)
    assert pages[0xB0][40:] == bytes(20)
    assert pages[0xB1] == b"\0\1" + bytes(58), "nothing rotates"
    assert pages[0xB2] == bytes((0, 0xE4, 2, 0)), "thin; UNMAP and WRITE SAME leave zeros"


def test_standard_inquiry(unit: DiskUnit) -> None:
    answer = run(unit, bytes((0x12, 0, 0, 0, 255)), 255)
    assert answer[:3] == b"\0\0\6" and len(answer) == answer[4] + 5
    assert answer[8:36] == b"Msft    Virtual Disk    1.0 "
    assert run(unit, bytes((0x12, 0, 0, 0, 36)), 255) == answer[:36]
    # Linux asks again for whatever is more than the least: at 1,024 places of fibre channel.
    assert (inquiry.absent()[0], inquiry.absent()[4], len(inquiry.absent())) == (0x7F, 31, 36)


@given(st.uuids(), st.uuids())
def test_names_differ_with_their_disks(first: UUID, second: UUID) -> None:
    names = [Identity(DeviceType.DISK, b"x", each).naa for each in (first, second)]
    assert all(len(name) == 16 and name.hex().startswith("6002248") for name in names)
    assert (names[0] == names[1]) == (first.int % 2**100 == second.int % 2**100)


@pytest.mark.parametrize("code", [0x1A, 0x5A])
def test_mode_pages(unit: DiskUnit, code: int) -> None:
    cdb = bytearray(10)
    cdb[0], cdb[2] = code, 0x3F
    if code == 0x1A:
        cdb[4] = 255
    else:
        cdb[7:9] = b"\0\xff"
    answer = run(unit, bytes(cdb), 255)
    if code == 0x1A:
        assert answer[0] == len(answer) - 1 and answer[3] == 8
        body = answer[12:]
    else:
        assert int.from_bytes(answer[:2], "big") == len(answer) - 2
        body = answer[16:]
    assert [body[0], body[20], body[32]] == [8, 10, 0x1C] and body[2] == 4
    cdb[2] = 0x05
    assert sense(unit, bytes(cdb), 255) == ILLEGAL_FIELD
    cdb[2] = 0xFF
    assert sense(unit, bytes(cdb), 255) == (5, 0x39, 0)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (bytes(4) + bytes((8, 18, 0x04)) + bytes(17), None),
        (bytes(4) + bytes((8, 18, 0x01)) + bytes(17), (5, 0x26, 0)),
        (bytes(4) + bytes((8, 17)) + bytes(17), (5, 0x26, 0)),
        (bytes(4) + bytes((8, 0)), (5, 0x26, 0)),
        (bytes(4) + bytes((8,)), (5, 0x1A, 0)),
        (bytes(4) + bytes((10, 10)) + bytes(10), None),
        (b"", None),
        (bytes(4) + bytes((8, 18)) + bytes(3), (5, 0x1A, 0)),
        (bytes((0, 0, 0, 8)) + bytes(3), (5, 0x1A, 0)),
        (bytes(4) + bytes((2, 10)) + bytes(10), (5, 0x26, 0)),
    ],
)
def test_mode_select_changes_the_write_cache_only(
    unit: DiskUnit, data: bytes, found: tuple[int, int, int] | None
) -> None:
    cdb = bytes((0x15, 0x10, 0, 0, len(data), 0))
    if found is None:
        run(unit, cdb, data)
    else:
        assert sense(unit, cdb, data) == found
    assert unit.state.write_cache


@given(st.binary(min_size=10, max_size=16), st.binary(max_size=64), st.booleans())
def test_any_mode_select_ends_in_a_state_or_sense(cdb: bytes, data: bytes, six: bool) -> None:
    command = bytes((0x15 if six else 0x55,)) + cdb
    try:
        assert mode.mode_select(command, data, ModeParameters()) in (True, False)
    except CheckCondition as condition:
        assert condition.sense.key == 5


@given(st.binary(min_size=16, max_size=16), st.integers(0, 4096))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_command_ends_in_data_or_sense(unit: DiskUnit, cdb: bytes, size: int) -> None:
    try:
        assert unit.execute(cdb, [memoryview(bytearray(size))] if size else []) <= max(size, 0)
    except CheckCondition as condition:
        assert len(condition.sense.pack()) == 18


@given(st.binary(max_size=200))
def test_unmap_lists(data: bytes) -> None:
    try:
        found = scsi.parse_unmap(data)
    except CheckCondition:
        assert len(data) < 8
    else:
        assert len(found) <= max(0, len(data) - 8) // 16


# What reaches the disk.


class Watched(MemoryDisk):
    """A disk that says it has *size* bytes, and what was done to it."""

    def __init__(self, size: int = SIZE, **options: bool) -> None:
        super().__init__(min(size, 4 * MIB), **options)
        self.said = size
        self.done: list[str] = []

    @property
    def size(self) -> int:
        return self.said

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.done.append("read")
        super().readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        assert sum(map(len, buffers)) <= MIB
        self.done.append("write")
        super().writev(offset, buffers)

    def unmap(self, offset: int, length: int) -> None:
        self.done.append(f"unmap {offset} {length}")

    def flush(self) -> None:
        self.done.append("flush")

    def close(self) -> None:
        self.done.append("close")


@pytest.fixture
def watched() -> Watched:
    return Watched(4 * MIB)


def unmap_list(*ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    """UNMAP and its parameters."""
    blocks = b"".join(struct.pack(">QII", *each, 0) for each in ranges)
    parameters = struct.pack(">HHI", len(blocks) + 6, len(blocks), 0) + blocks
    return struct.pack(">BB5xHB", 0x42, 0, len(parameters), 0), parameters


MODE_SELECT_10 = struct.pack(">BB5xHB", 0x55, 0x10, 28, 0)
CACHE_OFF, CACHE_ON = (bytes(8) + bytes((8, 18, bits)) + bytes(17) for bits in (0, 4))


def test_nothing_moved_is_nothing_done(watched: Watched) -> None:
    unit = DiskUnit(watched)
    unit.state.write_cache = False
    for cdb in (ten(0x28, 0, 0), ten(0x2A, 0, 0, flags=8), ten(0x2F, 0, 0, flags=2)):
        assert run(unit, cdb) == b""
    assert watched.done == []


@pytest.mark.parametrize("cache", [True, False])
def test_without_the_cache_whatever_changes_is_flushed(watched: Watched, cache: bool) -> None:
    unit = DiskUnit(watched)
    unit.state.write_cache = cache
    flush = [] if cache else ["flush"]
    run(unit, ten(0x2A, 0, 1), bytes(512))
    assert watched.done == ["write", *flush]
    watched.done.clear()
    run(unit, ten(0x41, 0, 1), bytes(512))
    assert watched.done == ["write", *flush]
    watched.done.clear()
    run(unit, sixteen(0x93, 1, 2, 8), bytes(512))
    assert watched.done == ["unmap 512 1024", *flush]
    watched.done.clear()
    run(unit, *unmap_list((3, 1), (5, 0), (9, 2)))
    assert watched.done == ["unmap 1536 512", "unmap 4608 1024", *flush]


def test_turning_the_cache_off_writes_it_back(watched: Watched) -> None:
    unit = DiskUnit(watched)
    run(unit, MODE_SELECT_10, CACHE_ON)
    assert watched.done == [] and unit.state.write_cache
    run(unit, MODE_SELECT_10, CACHE_OFF)
    assert watched.done == ["flush"] and not unit.state.write_cache
    run(unit, MODE_SELECT_10, CACHE_OFF)
    run(unit, MODE_SELECT_10, CACHE_ON)
    assert watched.done == ["flush"] and unit.state.write_cache
    assert sense(unit, b"\x55\x11" + MODE_SELECT_10[2:], CACHE_OFF) == ILLEGAL_FIELD
    assert unit.state.write_cache, "nothing can be saved"


def test_a_stop_writes_the_cache_back_and_a_start_does_not(watched: Watched) -> None:
    unit = DiskUnit(watched)
    run(unit, bytes((0x1B, 0, 0, 0, 1)))
    assert watched.done == []
    run(unit, bytes((0x1B, 0, 0, 0, 0)))
    assert watched.done == ["flush"]


def test_a_flush_is_of_blocks_that_there_are(watched: Watched) -> None:
    unit = DiskUnit(watched)
    assert sense(unit, ten(0x35, 8192, 1)) == OUT_OF_RANGE
    assert sense(unit, sixteen(0x91, 8193, 0)) == OUT_OF_RANGE
    assert watched.done == []
    run(unit, ten(0x35, 8191, 1))
    assert watched.done == ["flush"]


@pytest.mark.parametrize("flags", [0x20, 0x04, 0x06])
def test_checks_that_a_verify_cannot_make(watched: Watched, flags: int) -> None:
    assert sense(DiskUnit(watched), ten(0x2F, 0, 1, flags), 512) == ILLEGAL_FIELD
    assert watched.done == []


def test_a_verify_compares_no_more_than_is_moved_at_once(watched: Watched) -> None:
    unit = DiskUnit(watched)
    assert run(unit, ten(0x2F, 0, 4096, flags=2), 2 * MIB) == bytes(2 * MIB)
    assert sense(unit, ten(0x2F, 0, 4097, flags=2), 2 * MIB + 512) == ILLEGAL_FIELD
    watched.done.clear()
    assert run(unit, ten(0x2F, 0, 8191)) == run(unit, ten(0x2F, 0, 0)) == b""
    assert watched.done == ["read"] * 4, "a mebibyte each"


def test_a_verify_reads_no_more_than_others_can_wait_for() -> None:
    disk = Watched(1 << 40)
    assert sense(DiskUnit(disk), sixteen(0x8F, 0, 131073)) == ILLEGAL_FIELD
    assert disk.done == []


def test_what_a_write_same_cannot_be() -> None:
    disk = Watched(1 << 40)
    unit = DiskUnit(disk)
    assert sense(unit, sixteen(0x93, 0, 131073), 512) == ILLEGAL_FIELD
    for flags in (0x10, 0x20, 0x18):
        assert sense(unit, sixteen(0x93, 0, 1, flags), 512) == ILLEGAL_FIELD
    assert disk.done == []
    run(unit, sixteen(0x93, 0, 131072, 8), 512)
    assert disk.done == [f"unmap 0 {64 * MIB}"]


def test_a_long_write_same_takes_little_memory(watched: Watched) -> None:
    run(DiskUnit(watched), sixteen(0x93, 0, 8192), b"x" * 512)
    assert watched.done == ["write"] * 4 and set(watched.content) == set(b"x")


def test_what_an_unmap_cannot_be(watched: Watched) -> None:
    unit = DiskUnit(watched)
    cdb, parameters = unmap_list((0, 1))
    assert sense(unit, cdb[:1] + b"\1" + cdb[2:], parameters) == ILLEGAL_FIELD
    assert sense(unit, *unmap_list(*[(0, 1)] * 257)) == (5, 0x26, 0)
    assert watched.done == []
    run(unit, *unmap_list(*[(0, 1)] * 256))
    assert len(watched.done) == 256


@pytest.mark.parametrize(
    ("size", "short", "last"),
    [(0, 0, 0), (512, 0, 0), (3 << 40, 0xFFFFFFFF, 0x17FFFFFFF)],
)
def test_capacities_of_any_size(size: int, short: int, last: int) -> None:
    unit = DiskUnit(Watched(size))
    assert struct.unpack(">II", run(unit, bytes((0x25,)), 8)) == (short, 512)
    answer = run(unit, bytes((0x9E, 0x10)) + bytes(8) + b"\0\0\0\x20", 32)
    assert struct.unpack_from(">Q", answer) == (last,)
    blocks = min(size // 512, 0xFFFFFFFF)
    assert run(unit, bytes((0x1A, 0, 8, 0, 255)), 255)[4:8] == blocks.to_bytes(4, "big")


def test_a_disk_that_is_only_read_has_nothing_to_give_back() -> None:
    pages = pages_of(DiskUnit(Watched(read_only=True)))
    assert pages[0xB2] == bytes(4) and pages[0xB0][16:32] == bytes(16)


def test_mode_subpages_are_not_there(watched: Watched) -> None:
    unit = DiskUnit(watched)
    whole = run(unit, bytes((0x1A, 0, 8, 0xFF, 255)), 255)
    assert whole == run(unit, bytes((0x1A, 0, 8, 0, 255)), 255)
    for subpage in (1, 0xFE):
        assert sense(unit, bytes((0x1A, 0, 8, subpage, 255)), 255) == ILLEGAL_FIELD


def test_attentions_do_not_pile_up() -> None:
    state = UnitState()
    for code in [*range(20), 0]:
        state.attend(scsi.Sense(scsi.SenseKey.UNIT_ATTENTION, code, 0))
    assert [each.asc for each in state.attentions] == list(range(MAXIMUM_ATTENTIONS))


def test_an_unmap_list_says_itself_how_long_it_is() -> None:
    ranges = struct.pack(">QII", 1, 2, 0) + struct.pack(">QII", 3, 4, 0)
    for said, count in ((32, 2), (48, 2), (31, 1), (16, 1), (15, 0), (0, 0)):
        found = scsi.parse_unmap(struct.pack(">HHI", 38, said, 0) + ranges)
        assert found == [(1, 2), (3, 4)][:count], said


# DVD.


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.iso"
    path.write_bytes(os.urandom(100 * 2048))
    return path


@pytest.fixture
def drive(image: Path) -> Iterator[OpticalUnit]:
    unit = OpticalUnit(UUID(int=7), RawDisk(image, read_only=True))
    yield unit
    unit.close()


def test_a_dvd_is_read_in_its_blocks(drive: OpticalUnit, image: Path) -> None:
    data = image.read_bytes()
    assert run(drive, ten(0x28, 3, 2), 4096) == data[3 * 2048 : 5 * 2048]
    assert run(drive, twelve(0xA8, 99, 1), 2048) == data[99 * 2048 :]
    assert sense(drive, ten(0x28, 99, 2), 4096) == OUT_OF_RANGE
    assert struct.unpack(">II", run(drive, bytes((0x25,)), 8)) == (99, 2048)
    assert sense(drive, ten(0x2A, 0, 1), bytes(2048)) == (5, 0x20, 0)


def test_eject_and_insert_are_told(drive: OpticalUnit, image: Path) -> None:
    event = bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8))
    assert run(drive, event, 8)[4:6] == b"\0\x02"
    drive.eject()
    assert run(drive, event, 8)[4:6] == b"\3\0"
    assert sense(drive, bytes(6)) == (6, 0x28, 0)
    assert sense(drive, bytes(6)) == (2, 0x3A, 0)
    assert sense(drive, ten(0x28, 0, 1), 2048) == (2, 0x3A, 0)
    drive.insert(RawDisk(image, read_only=True))
    assert run(drive, event, 8)[4:6] == b"\2\2" and run(drive, event, 8)[4] == 0
    assert sense(drive, bytes(6)) == (6, 0x28, 0)
    assert run(drive, bytes(6)) == b""


def test_who_asks_what_it_is_keeps_the_news_for_who_uses_it(
    drive: OpticalUnit, image: Path
) -> None:
    """SPC-4 5.14: INQUIRY tells of no unit attention and leaves it pending, as events do."""
    drive.insert(RawDisk(image, read_only=True))
    assert run(drive, bytes((0x12, 0, 0, 0, 255)), 255)[16:32] == b"Virtual DVD-ROM "
    assert run(drive, bytes((0x46, 0, 0, 0, 0, 0, 0, 0, 255)), 255)[6:8] == b"\0\x10"
    assert run(drive, bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)), 8)[4:6] == b"\2\2"
    assert sense(drive, ten(0x28, 0, 1), 2048) == (6, 0x28, 0)
    assert len(run(drive, ten(0x28, 0, 1), 2048)) == 2048
    drive.insert(RawDisk(image, read_only=True))
    assert run(drive, bytes((3, 0, 0, 0, 18)), 18)[12:14] == b"\x28\0"
    assert len(run(drive, ten(0x28, 0, 1), 2048)) == 2048, "it was told by being asked for"


def test_a_guest_holds_its_medium(drive: OpticalUnit) -> None:
    run(drive, bytes((0x1E, 0, 0, 0, 1)))
    assert sense(drive, bytes((0x1B, 0, 0, 0, 2))) == (5, 0x53, 2)
    drive.state.request_eject()
    assert run(drive, bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)), 8)[4] == EVENT_EJECT_REQUEST
    run(drive, bytes((0x1E, 0, 0, 0, 0)))
    run(drive, bytes((0x1B, 0, 0, 0, 2)))
    assert drive.medium is None and drive.state.tray_open


def test_toc_configuration_and_disc(drive: OpticalUnit) -> None:
    toc = run(drive, bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 255)), 255)
    assert toc == bytes.fromhex("00120101 0014010000000000 0014aa0000000064")
    msf = run(drive, bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 255)), 255)
    assert msf[-4:] == bytes((0, 0, 3, 25))  # 250 frames
    configuration = run(drive, bytes((0x46, 0, 0, 0, 0, 0, 0, 0, 255)), 255)
    assert int.from_bytes(configuration[:4], "big") == len(configuration) - 4
    assert configuration[6:8] == b"\0\x10"
    only = run(drive, bytes((0x46, 2, 0, 3, 0, 0, 0, 0, 255)), 255)
    assert only[8:10] == b"\0\3" and len(only) == 16
    for cdb, size in ((0x51, 34), (0x52, 36)):
        answer = run(drive, bytes((cdb, 0, 0, 0, 0, 0, 0, 0, 255)), 255)
        assert len(answer) == size == int.from_bytes(answer[:2], "big") + 2
    assert len(run(drive, bytes((0xBD,)) + bytes(8) + b"\x08", 8)) == 8
    capabilities = run(drive, bytes((0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 255)), 255)
    assert capabilities[8:10] == b"\x2a\x14" and len(capabilities) == 30
    assert int.from_bytes(capabilities[:2], "big") == 28


def test_what_a_drive_does_not_do(drive: OpticalUnit) -> None:
    for cdb in (
        ten(0x28, 0, 2),  # into a buffer for one
        bytes((0x5A, 0, 0x05, 0, 0, 0, 0, 0, 255)),
        bytes((0x5A, 0, 0xEA, 0, 0, 0, 0, 0, 255)),  # saved values
        bytes((0x43, 0, 0, 0, 0, 0, 2, 0, 255)),  # from the second track on
        bytes((0x43, 0, 0, 0, 0, 0, 0xAB, 0, 255)),
        bytes((0x43, 0, 2, 0, 0, 0, 0, 0, 255)),  # another form of it
        bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 255, 0x80)),  # as older drives were asked
        bytes((0x46, 3, 0, 0, 0, 0, 0, 0, 255)),
        bytes((0x4A, 0, 0, 0, 0x10, 0, 0, 0, 255)),  # to be told once there is something
        bytes((0x51, 1, 0, 0, 0, 0, 0, 0, 255)),
    ):
        assert sense(drive, cdb, 2048) == ILLEGAL_FIELD, cdb.hex()
    assert run(drive, ten(0x28, 100, 0)) == b""


def test_a_medium_is_given_back_and_read_when_something_is_asked() -> None:
    medium = Watched(read_only=True)
    drive = OpticalUnit(UUID(int=7), medium)
    assert run(drive, ten(0x28, 0, 0), 2048) == b"" and medium.done == []
    run(drive, bytes((0x1B, 0, 0, 0, 2)))
    drive.close()
    assert medium.done == ["close"]


def test_every_form_of_toc(drive: OpticalUnit) -> None:
    lead_out = bytes.fromhex("0014aa0000000064")
    whole = run(drive, bytes((0x43, 0, 0, 0, 0, 0, 1, 0, 255)), 255)
    assert whole == bytes.fromhex("00120101 0014010000000000") + lead_out
    end = run(drive, bytes((0x43, 0, 0, 0, 0, 0, 0xAA, 0, 255)), 255)
    assert end == bytes.fromhex("000a0101") + lead_out
    session = bytes.fromhex("000a0101 0014010000000000")
    assert run(drive, bytes((0x43, 0, 1, 0, 0, 0, 9, 0, 255)), 255) == session
    assert run(drive, bytes((0x43, 0, 0, 0, 0, 0, 9, 0, 255, 0x40)), 255) == session
    assert isinstance(drive.medium, RawDisk)
    drive.medium.size = 2048 * 75 * 60 * 300  # 300 minutes, of which a byte holds 255
    assert run(drive, bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0, 255)), 255)[-4:] == bytes((0, 255, 2, 0))
    drive.medium.size = 0
    assert struct.unpack(">II", run(drive, bytes((0x25,)), 8)) == (0, 2048)
    drive.medium.size = 2048 << 33
    assert struct.unpack(">II", run(drive, bytes((0x25,)), 8)) == (0xFFFFFFFF, 2048)


def features(drive: OpticalUnit, kind: int, first: int = 0) -> dict[int, int]:
    """Flags of each feature that the drive names."""
    found = {}
    answer = run(drive, bytes((0x46, kind, 0, first, 0, 0, 0, 1, 0)), 256)[8:]
    while answer:
        code, flags, size = struct.unpack_from(">HBB", answer)
        found[code], answer = flags, answer[4 + size :]
    return found


def test_features_of_a_drive_with_and_without_a_medium(drive: OpticalUnit) -> None:
    everything = {0: 3, 1: 0x0B, 2: 7, 3: 3, 0x10: 1, 0x1F: 1}
    assert features(drive, 0) == features(drive, 1) == everything
    assert features(drive, 0, 3) == {3: 3, 0x10: 1, 0x1F: 1}
    assert features(drive, 2, 0x10) == {0x10: 1} and features(drive, 2, 5) == {}
    drive.close()
    assert features(drive, 0) == {**everything, 0x10: 0, 0x1F: 0}
    assert features(drive, 1) == {0: 3, 1: 0x0B, 2: 7, 3: 3}
    assert run(drive, bytes((0x46, 0, 0, 0, 0, 0, 0, 0, 8)), 8)[6:] == b"\0\0"


def test_the_lock_is_shown(drive: OpticalUnit) -> None:
    capabilities = bytes((0x1A, 0, 0x2A, 0, 255))
    configuration = bytes((0x46, 2, 0, 3, 0, 0, 0, 0, 255))
    assert run(drive, capabilities, 255)[10] == 0x29
    assert run(drive, configuration, 255)[12] == 0x29
    run(drive, bytes((0x1E, 0, 0, 0, 1)))
    assert run(drive, capabilities, 255)[10] == 0x2B
    assert run(drive, configuration, 255)[12] == 0x2B
    assert run(drive, capabilities, 255)[6] == 0x3B, "the media it reads"
    changeable = bytearray(capabilities)
    changeable[2] |= 0x40
    assert run(drive, bytes(changeable), 255)[6] == 0, "that cannot be changed"


def test_a_tray_goes_out_and_in(drive: OpticalUnit) -> None:
    event = bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8))
    mechanism = bytes((0xBD,)) + bytes(8) + b"\x08"
    for spin in (0, 1):  # down and up
        run(drive, bytes((0x1B, 0, 0, 0, spin)))
    assert drive.medium is not None and run(drive, mechanism, 8)[1] == 0
    run(drive, bytes((0x1B, 0, 0, 0, 2)))
    assert run(drive, event, 8)[4:6] == b"\3\1" and run(drive, mechanism, 8)[1] == 0x10
    for cdb in (bytes(6), bytes((0x25,)), bytes((0x43,)), bytes((0x51,)), bytes((0x52,))):
        assert sense(drive, cdb, 255) == (2, 0x3A, 0)
    run(drive, bytes((0x1B, 0, 0, 0, 1)))
    assert run(drive, mechanism, 8)[1] == 0x10
    run(drive, bytes((0x1B, 0, 0, 0, 3)))
    assert run(drive, event, 8)[4:6] == b"\0\0" and run(drive, mechanism, 8)[1] == 0
    assert run(drive, bytes((0x4A, 1, 0, 0, 2, 0, 0, 0, 8)), 8) == b"\0\2\x80\x10"
    drive.eject()
    assert drive.state.attentions == [], "nothing was in it"


def test_identity_of_a_drive(drive: OpticalUnit) -> None:
    answer = run(drive, bytes((0x12, 0, 0, 0, 255)), 255)
    assert answer[:2] == b"\x05\x80" and answer[16:32] == b"Virtual DVD-ROM "
    assert list(pages_of(drive)) == [0, 0x80, 0x83]


@given(st.binary(min_size=16, max_size=16), st.integers(0, 4096), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_command_of_a_drive(
    drive: OpticalUnit, image: Path, cdb: bytes, size: int, empty: bool
) -> None:
    if empty:
        drive.eject()
    elif drive.medium is None:
        drive.insert(RawDisk(image, read_only=True))
    try:
        assert drive.execute(cdb, [memoryview(bytearray(size))] if size else []) <= size
    except CheckCondition as condition:
        assert len(condition.sense.pack()) == 18
