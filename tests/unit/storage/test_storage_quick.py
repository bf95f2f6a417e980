"""The quick way answers as the other one does, and takes nothing that is not its own."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.storage.block import DiskUnit
from hvhost.storage.limits import Limiter
from hvhost.storage.quick import MOST_AT_ONCE, QuickPath
from simulated.storage import MemoryDisk, StorageDriver, StorageHost

SIZE = 1 << 20
CONTENT = os.urandom(SIZE)


@dataclass
class Side:
    """A host with a disk of :data:`CONTENT` and a driver."""

    host: StorageHost
    disk: MemoryDisk
    driver: StorageDriver


def a_side(*, quick: bool = True) -> Side:
    disk = MemoryDisk(SIZE)
    disk.content[:] = CONTENT
    host = StorageHost.build(DiskUnit(disk))
    driver = host.connect()
    if not quick:
        host.guest.server.channels[0].serve = None
    return Side(host, disk, driver)


@pytest.fixture
def side() -> Iterator[Side]:
    made = a_side()
    yield made
    made.host.close()
    assert not made.host.guest.faults


def a_read(driver: StorageDriver, lba: int, blocks: int) -> int:
    cdb = struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)
    return driver.start(cdb, read=blocks * 512, signal=False)


def a_write(driver: StorageDriver, lba: int, data: bytes) -> int:
    cdb = struct.pack(">BBIBHB", 0x2A, 0, lba, 0, len(data) // 512, 0)
    return driver.start(cdb, write=data, signal=False)


def process(side: Side) -> None:
    with side.host.lock:
        side.host.guest.server.channels[0].process()


def test_reads_from_memory_are_answered_before_the_signal_returns(side: Side) -> None:
    tags = [a_read(side.driver, lba, 8) for lba in range(0, 512, 16)]
    interrupts = len(side.host.guest.port.interrupts)
    process(side)
    assert side.disk.at_once == len(tags)
    assert len(side.host.guest.port.interrupts) == interrupts + 1, "one interrupt for all"
    for number, tag in enumerate(tags):
        answer = side.driver.finish(tag)
        assert answer.ok and answer.data == CONTENT[number * 8192 : number * 8192 + 4096]
    read = b"".join(side.host.memory_written)
    assert len(read) == 4096 * len(tags), "whoever executes guest code is told"


def test_a_read_behind_a_write_sees_it(side: Side) -> None:
    """Also while the write waits for the disk, and what comes after it must wait too."""
    gate = threading.Event()
    written = side.disk.writev

    def slow(offset: int, buffers: object) -> None:
        assert gate.wait(10)
        written(offset, buffers)  # type: ignore[arg-type] # passed on

    side.disk.writev = slow  # type: ignore[method-assign] # for this test
    data = os.urandom(4096)
    first = a_write(side.driver, 8, data)
    second = a_read(side.driver, 8, 8)
    process(side)
    third = a_read(side.driver, 8, 8)
    process(side)
    assert side.disk.at_once == 0
    gate.set()
    assert side.driver.finish(first).ok
    assert side.driver.finish(second).data == data == side.driver.finish(third).data


def test_answers_that_find_no_room_wait_for_it() -> None:
    disk = MemoryDisk(SIZE)
    disk.content[:] = CONTENT
    host = StorageHost.build(DiskUnit(disk))
    side = Side(host, disk, host.connect(ring_pages=2))
    tags = []
    for _ in range(2):  # each fits the ring, both do not
        tags += [a_read(side.driver, number, 1) for number in range(30)]
        process(side)
    assert disk.at_once == len(tags) and host.guest.server.channels[0].queued
    for number, tag in enumerate(tags):
        place = number % 30 * 512
        assert side.driver.finish(tag).data == CONTENT[place : place + 512]
    host.close()
    assert not host.guest.faults


def test_what_would_wait_goes_to_the_worker(side: Side) -> None:
    side.disk.instant = False
    tag = a_read(side.driver, 0, 8)
    process(side)
    assert side.driver.finish(tag).data == CONTENT[:4096] and side.disk.at_once == 0


def test_nothing_is_read_at_once_where_requests_are_limited_or_the_disk_is_at_work(
    side: Side,
) -> None:
    worker = side.host.workers[0]
    worker.limiter = Limiter.of(1_000_000, 0)
    assert side.driver.read(0, 8).ok and side.disk.at_once == 0
    worker.limiter = None
    with worker.running:
        tag = a_read(side.driver, 0, 8)
        process(side)
        assert side.disk.at_once == 0
    assert side.driver.finish(tag).ok


def test_reads_and_writes_are_taken_and_what_is_cut_off_is_not(side: Side) -> None:
    quick = side.host.guest.server.channels[0].serve
    assert quick is not None
    whole: list[bytes] = []

    def watched(data: bytes) -> int:
        for length in (0, 4, 8, 20, 60, len(data) - 64, len(data) - 8):
            assert quick(data[:length]) == 0
        whole.append(data)
        used = quick(data)
        assert used == len(data)
        return used

    side.host.guest.server.channels[0].serve = watched
    data = os.urandom(4096)
    first = a_write(side.driver, 8, data)
    process(side)
    assert side.driver.finish(first).ok
    second = a_read(side.driver, 8, 8)
    process(side)
    assert side.driver.finish(second).data == data
    assert len(whole) == 2


def test_shapes_are_few_whatever_the_guest_sends(side: Side) -> None:
    """What is kept for a shape is the host's memory; a header's fields allow billions of them."""
    serve = side.host.guest.server.channels[0].serve
    assert serve is not None
    quick: QuickPath = serve.__self__  # type: ignore[attr-defined] # a bound method
    for pages in (0, 1, 2, 128, 129, 130, 4000):
        for flags in (0, 1, 2, 0xFFFF):
            header = struct.pack("<HHHHQ", 9, 4 + pages, 12 + pages, flags, 1)
            packet = header + struct.pack("<IIII", 0, 1, 1, 0) + bytes(8 * pages + 72)
            assert serve(packet) == 0, "no read and no write"
    assert len(quick._shapes) == 4


def test_a_unit_attention_comes_first(side: Side) -> None:
    unit = side.host.workers[0].unit
    assert isinstance(unit, DiskUnit)
    unit.capacity_changed()
    assert side.driver.read(0, 8).key == (6, 0x2A, 9)
    assert side.driver.read(0, 8).ok


def test_large_reads_do_not_keep_the_bus_for_long(side: Side) -> None:
    half = MOST_AT_ONCE // 2
    tags = [a_read(side.driver, number, half // 512) for number in range(4)]
    process(side)
    assert side.disk.at_once == 2, "the others are the worker's"
    for number, tag in enumerate(tags):
        assert side.driver.finish(tag).data == CONTENT[number * 512 : number * 512 + half]


def test_a_stopped_worker_reads_nothing_more(side: Side) -> None:
    worker = side.host.workers[0]
    worker.stop()
    assert not worker.try_enter()
    side.host.workers.clear()


def test_a_unit_is_left_again_whatever_happens(side: Side) -> None:
    def broken(offset: int, length: int, buffers: object) -> bool:
        raise ZeroDivisionError

    side.disk.read_now = broken  # type: ignore[method-assign] # for this test
    a_read(side.driver, 0, 8)
    with pytest.raises(ZeroDivisionError):
        process(side)
    assert not side.host.workers[0].running.locked()


# What a guest may send: all right first, then what it can be instead.
FIELDS = {
    "ranges": [1, 0, 2],
    "length": [4096, 512, 8192, 1, 0, 4097, 1 << 31],
    "offset": [0, 512, 3584, 4095, 4096, 1 << 31],
    "pages": [1, 0, 2, 3],
    "pfn": [700, 701, 1023, 1024, 1 << 40, (1 << 64) - 1],
    "operation": [3, 4, 1],
    "path": [0, 1],
    "target": [0, 1],
    "lun": [0, 1, 255],
    "cdb_length": [10, 6, 16, 0, 17],
    "sense_length": [20, 0],
    "transfer": [4096, 512, 8192, 0, 1 << 31],
    "opcode": [0x28, 0x2A, 0x35, 0x12, 0xA0, 0xFF],
    "flags": [0, 0x08, 0x20, 0x10],
    "lba": [0, 8, SIZE // 512 - 8, SIZE // 512 - 1, SIZE // 512, 1 << 31],
    "blocks": [8, 1, 16, 0],
    "kind": [9, 6, 7],
    "completion": [1, 0],
    "size": [64, 48, 72, 8],
}
GOOD = {name: values[0] for name, values in FIELDS.items()}
CHANGES = [(name, value) for name, values in FIELDS.items() for value in values[1:]]
#: Fields that fit each other and are wrong all the same.
TOGETHER = [
    {"length": 0, "transfer": 0, "blocks": 0},
    {"length": 0, "transfer": 0, "blocks": 0, "lun": 1},
    {"pages": 2, "length": 8192, "transfer": 8192, "blocks": 16, "pfn": 1 << 40},
    {"offset": 4096, "pages": 2},
    {"offset": 512, "pages": 2, "length": 8192, "transfer": 8192, "blocks": 16},
    *(
        {"pages": pages, "length": pages << 12, "transfer": pages << 12, "blocks": pages << 3}
        for pages in (128, 129, 130)  # the largest transfer, and what is larger
    ),
]
PACKETS = st.lists(st.sampled_from(CHANGES), max_size=3).map(lambda some: GOOD | dict(some))


def send(driver: StorageDriver, tag: int, fields: dict[str, int]) -> None:
    cdb = struct.pack(
        ">BBIBHB", fields["opcode"], fields["flags"], fields["lba"], 0, fields["blocks"], 0
    )
    payload = struct.pack(
        "<IIIHBBBBBBBBBBI16s",
        *(fields["operation"], 1, 0, 52, 0, 0, 2, fields["path"], fields["target"], fields["lun"]),
        *(fields["cdb_length"], fields["sense_length"], 1, 0, fields["transfer"], cdb),
    )
    pages = struct.pack(f"<{fields['pages']}Q", *[fields["pfn"]] * fields["pages"])
    header = struct.pack("<IIII", 0, fields["ranges"], fields["length"], fields["offset"]) + pages
    with driver.host.lock:
        driver.channel.write(
            payload.ljust(fields["size"], b"\0")[: fields["size"]],
            packet_type=fields["kind"],
            flags=fields["completion"],
            transaction_id=tag,
            header=header,
            signal=False,
        )


def outcome(packets: list[dict[str, int]], *, quick: bool) -> tuple[object, ...]:
    """Answers, its disk and its memory; less if the guest was at fault: then any may be missing."""
    side = a_side(quick=quick)
    for tag, fields in enumerate(packets, 1):
        send(side.driver, 1000 + tag, fields)
    process(side)
    side.host.workers.pop().stop()
    side.driver.look()
    answers = {tag: packet.payload for tag, packet in side.driver._answers.items()}
    memory = bytes(side.host.guest.memory.view(700 << 12, 4 << 12))
    faults = bool(side.host.guest.faults)
    side.host.close()
    if faults and len(packets) > 1:
        return ("faulted",)
    return answers, faults, bytes(side.disk.content), memory


@pytest.mark.parametrize("opcode", [0x28, 0x2A])
@pytest.mark.parametrize(
    "change", [{}, *({name: value} for name, value in CHANGES), *TOGETHER], ids=str
)
def test_what_is_different_is_answered_alike(change: dict[str, int], opcode: int) -> None:
    packet = GOOD | {"opcode": opcode} | change
    assert outcome([packet], quick=True) == outcome([packet], quick=False)


def test_nothing_is_read_before_the_driver_is_ready() -> None:
    disk = MemoryDisk(SIZE)
    host = StorageHost.build(DiskUnit(disk))
    host.guest.connect()
    send(host.open(1), 1000, GOOD)
    with host.lock:
        host.guest.server.channels[0].process()
    assert disk.at_once == 0 and len(host.guest.faults) == 1
    host.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(PACKETS, min_size=1, max_size=6))
def test_both_ways_answer_alike(packets: list[dict[str, int]]) -> None:
    assert outcome(packets, quick=True) == outcome(packets, quick=False)
