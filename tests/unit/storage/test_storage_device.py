"""The storage controller, driven by a simulated ``hv_storvsc``."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hvhost.storage.block import DiskUnit
from hvhost.storage.limits import Limiter
from hvhost.storage.protocol import WorldWideNames
from hvhost.storage.raw import RawDisk
from hvhost.storage.session import MAXIMUM_OUTSTANDING, Phase
from hvhost.vmbus.protocol import CloseChannel
from simulated.storage import WIN7, WIN8, WIN10, Answer, Shape, StorageHost

MIB = 1 << 20
SIZE = 8 * MIB


class Faulty:
    """A disk whose next writes or reads fail as told."""

    def __init__(self, disk: RawDisk) -> None:
        self.disk = disk
        self.errors: list[int] = []
        self.flushes = 0
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.identifier, self.read_only = disk.identifier, disk.read_only
        self.logical_sector_size = disk.logical_sector_size
        self.physical_sector_size = disk.physical_sector_size

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def allocated(self) -> int:
        return self.disk.allocated

    def _pass(self) -> None:
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.errors:
            raise OSError(self.errors.pop(0), "as told")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._pass()
        self.disk.readv(offset, buffers)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        return False

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._pass()
        self.disk.writev(offset, buffers)

    def flush(self) -> None:
        self._pass()
        self.flushes += 1
        self.disk.flush()

    def unmap(self, offset: int, length: int) -> None:
        self.disk.unmap(offset, length)

    def resize(self, size: int) -> None:
        self.disk.resize(size)

    def close(self) -> None:
        self.disk.close()


@pytest.fixture
def disk(tmp_path: Path) -> Faulty:
    return Faulty(RawDisk.create(tmp_path / "disk.img", SIZE))


@pytest.fixture
def host(disk: Faulty) -> Iterator[StorageHost]:
    built = StorageHost.build(DiskUnit(disk))
    yield built
    built.close()
    assert not built.guest.faults


@pytest.mark.parametrize("version", [WIN10, WIN8, WIN7, 0x0200, 0x0600])
def test_every_version_reads_and_writes(host: StorageHost, version: int) -> None:
    driver = host.connect(version)
    assert host.controller.state.phase is Phase.IN_USE and host.controller.state.version == version
    data = os.urandom(8192)
    assert driver.write(7, data).ok
    answer = driver.read(7, 16)
    assert answer.ok and answer.data == data


def test_a_version_nobody_knows_is_refused_and_a_lower_one_taken(host: StorageHost) -> None:
    (relid,) = host.guest.connect()
    driver = host.open(relid)
    driver.operate(7)
    assert driver.operate(9, struct.pack("<HH", 0x0703, 0))[0] != 0
    assert driver.operate(9, struct.pack("<HH", 0x0602, 0))[0] == 0


@pytest.mark.parametrize(
    "shape", [(0, True, 1), (512, True, 1), (0, False, 1), (3584, False, 1), (0, False, 9)]
)
def test_every_shape_of_buffer(host: StorageHost, shape: Shape) -> None:
    driver = host.connect()
    data = os.urandom(64 * 512)
    assert driver.write(3, data, shape=shape).ok
    assert driver.read(3, 64, shape=shape).data == data
    assert driver.read(3, 64).data == data


def test_data_goes_to_the_file(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    data = os.urandom(MIB)
    assert driver.write(2048, data).ok
    assert disk.disk.file.path.read_bytes()[MIB : 2 * MIB] == data


def test_the_transport_is_told_of_memory_that_was_read_into(host: StorageHost) -> None:
    driver = host.connect()
    data = os.urandom(4096)
    assert driver.write(0, data).ok and not host.memory_written
    assert driver.read(0, 8).ok and host.memory_written == [data]


def test_flush_and_fua(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    assert driver.write(0, bytes(512)).ok and disk.flushes == 0
    assert driver.write(0, bytes(512), fua=True).ok and disk.flushes == 1
    assert driver.command(struct.pack(">BBIBHB", 0x35, 0, 0, 0, 0, 0)).ok and disk.flushes == 2
    assert driver.command(bytes((0x91,)) + bytes(15)).ok and disk.flushes == 3


def test_without_write_cache_every_write_is_flushed(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    caching = bytes((0, 0, 0, 0, 8, 18)) + bytes(18)
    assert driver.command(bytes((0x15, 0x10, 0, 0, len(caching), 0)), write=caching).ok
    before = disk.flushes
    assert driver.write(0, bytes(512)).ok
    assert disk.flushes == before + 1
    sense = driver.command(bytes((0x1A, 8, 8, 0, 64, 0)), read=64)
    assert sense.data[4] == 8 and not sense.data[6] & 4


def test_commands_keep_their_order(host: StorageHost) -> None:
    """Overlapping writes sent without waiting end as if sent one by one."""
    driver = host.connect()
    blocks = [bytes((number,)) * 512 for number in range(1, 60)]
    cdb = struct.pack(">BBIBHB", 0x2A, 0, 5, 0, 1, 0)
    tags = [driver.start(cdb, write=block) for block in blocks]
    assert all(driver.finish(tag).ok for tag in tags)
    assert driver.read(5, 1).data == blocks[-1]


def test_a_batch_of_answers_is_one_interrupt(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    disk.gate = threading.Event()
    cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0)
    tags = [driver.start(cdb, read=512) for _ in range(40)]
    assert disk.entered.wait(10)
    before = len(host.guest.port.interrupts)
    disk.gate.set()
    assert all(driver.finish(tag).ok for tag in tags)
    assert len(host.guest.port.interrupts) - before <= 10


def test_a_full_ring_of_requests_waits_there(disk: Faulty) -> None:
    host = StorageHost.build(DiskUnit(disk), pages=2048)
    driver = host.connect(ring_pages=65)
    disk.gate = threading.Event()
    cdb_read = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 0, 0)
    tags = [driver.start(cdb_read) for _ in range(2)]
    first = driver.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0), read=512)
    tags += [driver.start(cdb_read) for _ in range(MAXIMUM_OUTSTANDING + 100)]
    session = host.controller._session
    assert session is not None
    session.deliver()  # nothing was answered that would make room
    assert MAXIMUM_OUTSTANDING - 2 <= session.outstanding <= MAXIMUM_OUTSTANDING
    disk.gate.set()
    assert all(driver.finish(tag).ok for tag in [*tags, first])
    assert session.outstanding == 0
    host.close()


def test_absent_units(host: StorageHost) -> None:
    driver = host.connect()
    for place in ({"lun": 5}, {"path": 1}, {"target": 1}):
        answer = driver.inquire(**place)
        assert answer.ok and answer.data[0] == 0x7F
    assert driver.command(bytes(6), lun=5).srb_status == 0x20
    # Linux would take INVALID_LUN from elsewhere for path 0's unit of that number.
    assert driver.command(bytes(6), path=1).key == (5, 0x25, 0)
    assert driver.luns() == [0] and driver.luns(lun=9) == [0] and driver.luns(target=1) == []


@pytest.mark.parametrize("place", [{}, {"lun": 5}, {"path": 1}])
def test_which_units_are_to_be_reported(host: StorageHost, place: dict[str, int]) -> None:
    driver = host.connect()

    def report(select: int) -> Answer:
        cdb = struct.pack(">BBBBBBIBB", 0xA0, 0, select, 0, 0, 0, 64, 0, 0)
        return driver.command(cdb, read=64, **place)

    everything = bytes(8) if place.get("path") else struct.pack(">II", 8, 0) + bytes(8)
    assert report(0).data == report(2).data == everything
    assert report(1).data == bytes(8)
    for select in (3, 0x10, 0xFF):
        assert report(select).key == (5, 0x24, 0)


@pytest.mark.parametrize("opcode", [0x28, 0x88, 0xA8])
def test_a_command_shorter_than_its_kind_is(host: StorageHost, opcode: int) -> None:
    driver = host.connect()
    assert driver.command(bytes((opcode, 0, 0, 0, 0, 0)), read=512).key == (5, 0x24, 0)
    assert driver.read(0, 1).ok and not host.guest.faults


def test_units_that_come_and_go_before_the_guest_looks(host: StorageHost, tmp_path: Path) -> None:
    """It hears of none and is owed nothing: it will see what is there."""
    (relid,) = host.guest.connect()
    driver = host.open(relid)
    host.add(DiskUnit(RawDisk.create(tmp_path / "second", MIB)), 3)
    with host.lock:
        host.controller.announce()
        host.controller.remove(3)
        host.controller.announce()
    assert host.controller.state.leaving == set()
    driver.look()
    assert driver.notices == []
    driver.initialize()
    driver.look()
    assert driver.notices == [] and driver.luns() == [0]


def test_no_notice_comes_before_the_first_command(host: StorageHost, tmp_path: Path) -> None:
    """Linux makes the queue for what a notice asks once its initialization is answered."""
    (relid,) = host.guest.connect()
    driver = host.open(relid)
    driver.initialize(scan=False)
    host.add(DiskUnit(RawDisk.create(tmp_path / "second", MIB)), 3)
    with host.lock:
        host.controller.announce()
        host.controller.remove(3)
        host.controller.announce()
    driver.look()
    assert driver.notices == [] and host.controller.state.leaving == set()
    assert driver.luns() == [0]
    with host.lock:
        host.controller.announce()
    driver.look()
    assert driver.notices == [11]


def test_units_come_and_go(host: StorageHost, tmp_path: Path) -> None:
    driver = host.connect()
    second = host.add(DiskUnit(RawDisk.create(tmp_path / "second", MIB)), 3)
    with host.lock:
        host.controller.announce()
    driver.look()
    assert driver.notices == [11] and driver.luns() == [0, 3]
    assert driver.write(1, b"x" * 512, lun=3).ok
    with host.lock:
        host.controller.remove(3)
        host.controller.announce()
    second.stop()
    host.workers.remove(second)
    assert driver.command(bytes(6), lun=3).srb_status == 0x20 and driver.luns() == [0]
    assert (tmp_path / "second").read_bytes()[512:1024] == b"x" * 512


def test_a_new_size_reaches_the_guest(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    unit = host.workers[0].unit
    assert isinstance(unit, DiskUnit)
    host.workers[0].call(lambda: disk.resize(2 * SIZE))
    unit.capacity_changed()
    with host.lock:
        host.controller.announce()
    driver.look()
    assert driver.notices == [11]
    assert driver.inquire().ok  # does not take the attention away
    assert driver.command(bytes(6)).key == (6, 0x2A, 9)
    assert driver.command(bytes(6)).ok
    capacity = driver.command(bytes((0x25,)) + bytes(9), read=8).data
    assert struct.unpack(">II", capacity) == (2 * SIZE // 512 - 1, 512)


@pytest.mark.parametrize(
    ("error", "write", "sense"),
    [
        (errno.EIO, False, (3, 0x11, 0)),
        (errno.EIO, True, (3, 0x0C, 0)),
        (errno.ENOSPC, True, (7, 0x27, 7)),
    ],
)
def test_errors_of_the_host_reach_the_guest(
    host: StorageHost, disk: Faulty, error: int, write: bool, sense: tuple[int, int, int]
) -> None:
    driver = host.connect()
    disk.errors = [error]
    answer = driver.write(0, bytes(512)) if write else driver.read(0, 1)
    assert answer.key == sense and answer.transferred == 0
    assert driver.write(0, bytes(512)).ok
    assert host.told[0][0] == "disk-error"


@pytest.mark.parametrize("opcode", [0x2F, 0xAF, 0x8F])
@pytest.mark.parametrize("compare", [False, True])
def test_an_error_while_verifying_is_one_of_reading(
    host: StorageHost, disk: Faulty, opcode: int, compare: bool
) -> None:
    driver = host.connect()
    forms = {0x2F: ">BBIBHB", 0xAF: ">BBII2x", 0x8F: ">BBQI2x"}
    fields = (0, 0, 4, 0) if opcode == 0x2F else (0, 4)
    cdb = struct.pack(forms[opcode], opcode, 2 * compare, *fields)
    data = bytes(4 * 512) if compare else b""
    disk.errors = [errno.EIO]
    assert driver.command(cdb, write=data).key == (3, 0x11, 0)
    assert driver.command(cdb, write=data).ok


def test_a_failed_flush_is_told(host: StorageHost, disk: Faulty) -> None:
    driver = host.connect()
    disk.errors = [errno.EIO]
    assert driver.command(bytes((0x35,)) + bytes(9)).key == (3, 0x0C, 0)


def test_a_full_host_may_be_waited_for(disk: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvhost.storage.worker.FULL_RETRY_SECONDS", 0.01)
    host = StorageHost.build()
    worker = host.add(DiskUnit(disk), pause=True)
    driver = host.connect()
    disk.errors = [errno.ENOSPC] * 3
    assert driver.write(0, b"a" * 512).ok
    assert [kind for kind, _ in host.told] == ["disk-full"] and not worker.full
    assert driver.read(0, 1).data == b"a" * 512
    host.close()


def test_limits_hold_requests_back(host: StorageHost, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = host.connect()
    waited: list[float] = []
    worker = host.workers[0]
    monkeypatch.setattr(worker, "_wait", lambda request, seconds: waited.append(seconds))
    worker.limiter = Limiter.of(0, MIB)
    for _ in range(4):
        assert driver.write(0, bytes(64 << 10)).ok
    assert sum(waited) > 0.1
    worker.limiter = None


def test_sub_channels(disk: Faulty) -> None:
    host = StorageHost.build(DiskUnit(disk), processors=9)
    driver = host.connect()
    _, properties = driver.operate(10)
    count, flags = struct.unpack_from("<4xH2xI", properties)
    assert (count, flags) == (2, 1)
    for too_many_or_none in (3, 0):
        assert driver.operate(13, struct.pack("<H", too_many_or_none))[0] == 0xC000000D
    assert driver.operate(13, struct.pack("<H", 2))[0] == 0
    assert driver.operate(13, struct.pack("<H", 2))[0] != 0
    host.guest.collect_offers()
    subs = [relid for relid, offer in host.guest.offers.items() if offer.sub_channel_index]
    assert [host.guest.offers[relid].sub_channel_index for relid in subs] == [1, 2]
    others = [host.open(relid) for relid in subs]
    data = os.urandom(4096)
    assert others[0].write(9, data).ok and others[1].read(9, 8).data == data
    assert others[0].luns() == [0] and others[1].write(9, data, fua=True).ok
    del host.guest.open_channels[1]
    host.guest.post(CloseChannel(1))
    assert sorted(host.guest.take_rescinds()) == subs
    host.guest.server.reset()
    assert host.connect().read(9, 8).data == data
    host.close()
    assert not host.guest.faults


def test_sub_channels_take_commands_only(disk: Faulty) -> None:
    host = StorageHost.build(DiskUnit(disk), processors=5)
    driver = host.connect()
    assert driver.operate(13, struct.pack("<H", 1))[0] == 0
    host.guest.collect_offers()
    (relid,) = (relid for relid, offer in host.guest.offers.items() if offer.sub_channel_index)
    host.open(relid).channel.write(_packet(7), transaction_id=77)
    (fault,) = host.guest.faults
    assert "takes commands only" in fault
    assert host.controller.state.phase is Phase.IN_USE and driver.read(0, 1).ok
    host.close()


def test_an_old_driver_knows_no_sub_channels(disk: Faulty) -> None:
    host = StorageHost.build(DiskUnit(disk), processors=9)
    driver = host.connect(WIN7)
    assert struct.unpack_from("<4xH2xI", driver.operate(10)[1]) == (0, 0)
    assert driver.operate(13, struct.pack("<H", 1))[0] == 0xC000000D
    assert not host.sub_channels
    host.close()


def test_fibre_channel_names(disk: Faulty) -> None:
    names = WorldWideNames(1, 0, 0, b"12345678", b"abcdefgh", bytes(8), bytes(8))
    host = StorageHost.build(DiskUnit(disk), names=names)
    driver = host.connect()
    status, body = driver.operate(12)
    assert status == 0 and body[:20] == b"\1\0\0\0" + b"12345678" + b"abcdefgh"
    assert driver.read(0, 1).ok
    host.close()


def test_a_scsi_controller_has_no_such_names(host: StorageHost) -> None:
    assert host.connect().operate(12)[0] != 0


@pytest.mark.parametrize("sub_channel", [False, True])
def test_a_channel_that_closes_waits_for_what_runs(disk: Faulty, sub_channel: bool) -> None:
    """Its memory is the guest's again afterwards; what had not begun is dropped."""
    host = StorageHost.build(DiskUnit(disk), processors=5)
    driver, relid = host.connect(), 1
    if sub_channel:
        assert driver.operate(13, struct.pack("<H", 1))[0] == 0
        host.guest.collect_offers()
        (relid,) = (relid for relid, offer in host.guest.offers.items() if offer.sub_channel_index)
        driver = host.open(relid)
    disk.gate = threading.Event()
    cdb = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 1, 0)
    for number in range(5):
        driver.start(cdb, write=bytes((number + 1,)) * 512)
    assert disk.entered.wait(10)
    closed = threading.Event()

    def close() -> None:
        with host.lock:
            host.guest.close(relid)
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert not closed.wait(0.05)
    disk.gate.set()
    assert closed.wait(10)
    thread.join()
    host.workers[0].call(lambda: None)
    assert disk.disk.file.path.read_bytes()[:512] == b"\1" * 512
    host.close()


def _packet(operation: int, **fields: int) -> bytes:
    cdb_length, length = fields.get("cdb_length", 6), fields.get("length", 0)
    request = struct.pack("<HBBBBBBBBBBI", 52, 0, 0, 0, 0, 0, 0, cdb_length, 20, 2, 0, length)
    return (struct.pack("<III", operation, 1, 0) + request).ljust(64, b"\0")


@pytest.mark.parametrize(
    ("payload", "kind", "words"),
    [
        (bytes(40), 6, "40 bytes"),
        (_packet(99), 6, "operation 99 is unknown"),
        (_packet(11), 6, "ENUMERATE_BUS is for hosts"),
        (_packet(3, cdb_length=17), 6, "17 bytes"),
        (_packet(3, cdb_length=0), 6, "0 bytes"),
        (_packet(3, length=512), 6, "names memory of 0 bytes"),
        (_packet(3), 11, "got a packet COMP"),
    ],
)
def test_what_a_guest_must_not_send(disk: Faulty, payload: bytes, kind: int, words: str) -> None:
    host = StorageHost.build(DiskUnit(disk))
    driver = host.connect()
    driver.channel.write(payload, packet_type=kind, transaction_id=77)
    (fault,) = host.guest.faults
    assert words in fault
    host.close()


@pytest.mark.parametrize(
    ("before", "operation", "name"),
    [
        ((), 9, "QUERY_PROTOCOL_VERSION"),
        ((), 3, "EXECUTE_SRB"),
        ((7,), 10, "QUERY_PROPERTIES"),
        ((7,), 8, "END_INITIALIZATION"),
        ((7, 9, 10), 13, "CREATE_SUB_CHANNELS"),
        ((7, 9, 10), 3, "EXECUTE_SRB"),
        ((7, 9, 8, 7), 3, "EXECUTE_SRB"),
    ],
)
def test_what_comes_too_early(
    disk: Faulty, before: tuple[int, ...], operation: int, name: str
) -> None:
    host = StorageHost.build(DiskUnit(disk), processors=9)
    (relid,) = host.guest.connect()
    driver = host.open(relid)
    for earlier in before:
        assert driver.operate(earlier, struct.pack("<HH", WIN10, 0))[0] == 0
    driver.channel.write(_packet(operation), transaction_id=77)
    (fault,) = host.guest.faults
    assert f"{name} came too early" in fault
    assert not host.sub_channels
    host.close()
