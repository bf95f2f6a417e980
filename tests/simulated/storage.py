"""A simulated ``hv_storvsc``: its packets written out here once more, from ``storvsc_drv.c``."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from hvhost.partition.memory import PAGE_SIZE
from hvhost.storage.device import StorageController, SubChannel
from hvhost.storage.protocol import HV_SCSI_GUID, WorldWideNames
from hvhost.storage.session import Surface
from hvhost.storage.unit import LogicalUnit
from hvhost.storage.worker import UnitWorker
from hvhost.vmbus.channel import Channel, Offer
from hvhost.vmbus.gpadl import GpaRange, pack_ranges
from simulated.devices import an_offer
from simulated.driver import GuestChannel, GuestPacket, SimulatedGuest

GPA_DIRECT, INBAND, COMPLETION = 9, 6, 11
WIN10, WIN8, WIN7 = 0x0602, 0x0501, 0x0402
_SECONDS = 10.0
#: Pages of a buffer as (offset in the first page, pages in a row or not, ranges).
Shape = tuple[int, bool, int]


class MemoryDisk:
    """A disk of zeros and what was written, in memory; see :mod:`hvhost.storage.disk`."""

    def __init__(self, size: int, *, read_only: bool = False, sector: int = 512) -> None:
        self.content = bytearray(size)
        self.read_only = read_only
        self.logical_sector_size, self.physical_sector_size = sector, 4096
        self.identifier = UUID(int=0x1234567890)
        #: Whether reads need no waiting, and how many did not.
        self.instant, self.at_once = True, 0

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def allocated(self) -> int:
        return len(self.content)

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            assert 0 <= offset <= offset + len(buffer) <= len(self.content)
            buffer[:] = self.content[offset : offset + len(buffer)]
            offset += len(buffer)

    def read_now(self, offset: int, length: int, buffers: Sequence[memoryview]) -> bool:
        if not self.instant or not 0 <= offset <= len(self.content) - length:
            return False
        assert length == sum(map(len, buffers))
        self.at_once += 1
        self.readv(offset, buffers)
        return True

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        assert not self.read_only
        for buffer in buffers:
            assert 0 <= offset <= offset + len(buffer) <= len(self.content)
            self.content[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None: ...

    def unmap(self, offset: int, length: int) -> None:
        self.writev(offset, [memoryview(bytes(length))])

    def resize(self, size: int) -> None:
        self.content = self.content[:size].ljust(size, b"\0")

    def close(self) -> None: ...


class Interrupts(list[tuple[int, int]]):
    """Interrupts of the guest, for a thread that waits for one."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def append(self, interrupt: tuple[int, int]) -> None:
        super().append(interrupt)
        self.came.set()


@dataclass(frozen=True)
class Answer:
    """A command's end as the driver sees it."""

    srb_status: int
    scsi_status: int
    transferred: int
    sense: bytes
    data: bytes = b""

    @property
    def ok(self) -> bool:
        return (self.srb_status, self.scsi_status) == (1, 0)

    @property
    def key(self) -> tuple[int, int, int]:
        """Sense key, additional code, qualifier; sense data must be valid."""
        assert self.srb_status == 0x84 and self.scsi_status == 2 and len(self.sense) == 18
        return self.sense[2] & 0xF, self.sense[12], self.sense[13]


@dataclass
class StorageHost:
    """A controller on a simulated machine's bus."""

    guest: SimulatedGuest
    controller: StorageController
    lock: threading.RLock
    workers: list[UnitWorker] = field(default_factory=list)
    sub_channels: list[Channel] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    memory_written: list[bytes] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        *units: LogicalUnit,
        processors: int = 1,
        names: WorldWideNames | None = None,
        pages: int = 1024,
        remember_reads: bool = True,
    ) -> StorageHost:
        guest = SimulatedGuest(pages=pages, processors=processors)
        guest.port.interrupts = Interrupts()
        lock = threading.RLock()

        def add(count: int) -> None:
            for index in range(1, count + 1):
                sub = SubChannel(
                    replace(controller.offer, sub_channel_index=index), controller, surface
                )
                host.sub_channels.append(guest.server.add_device(sub))

        def remove() -> None:
            gone, host.sub_channels[:] = list(host.sub_channels), []
            for channel in gone:
                if channel.state.value not in ("rescinded", "released"):
                    guest.server.remove_device(channel)

        def written(views: Sequence[memoryview]) -> None:
            if remember_reads:
                host.memory_written.append(b"".join(views))

        surface = Surface(guest.memory, lock, processors, add, remove, written)
        offer: Offer = replace(an_offer(), interface_type=HV_SCSI_GUID, name="scsi0")
        controller = StorageController(offer, surface, names)
        host = cls(guest, controller, lock)
        for unit in units:
            host.add(unit)
        guest.server.add_device(controller)
        return host

    def add(self, unit: LogicalUnit, lun: int | None = None, *, pause: bool = False) -> UnitWorker:
        number = len(self.workers) if lun is None else lun
        worker = UnitWorker(
            f"unit {number}",
            unit,
            lambda kind, text: self.told.append((kind, text)),
            pause_when_full=pause,
        )
        with self.lock:
            self.controller.add(number, worker)
        self.workers.append(worker)
        return worker

    def connect(self, version: int = WIN10, *, ring_pages: int = 33) -> StorageDriver:
        (relid,) = self.guest.connect()
        driver = self.open(relid, ring_pages=ring_pages)
        driver.initialize(version)
        return driver

    def open(self, relid: int, *, ring_pages: int = 33) -> StorageDriver:
        with self.lock:
            channel = self.guest.open(relid, out_pages=ring_pages, in_pages=ring_pages)
        return StorageDriver(self, channel)

    def close(self) -> None:
        with self.lock:
            self.guest.server.reset()
        for worker in self.workers:
            worker.stop()


class StorageDriver:
    """The driver on one channel; commands one by one, or many under way."""

    def __init__(self, host: StorageHost, channel: GuestChannel) -> None:
        self.host, self.channel, self.guest = host, channel, host.guest
        self.packet_size = 64
        self.notices: list[int] = []
        self._tags = itertools.count(1)
        self._answers: dict[int, GuestPacket] = {}
        self._buffers: dict[int, tuple[list[int], Callable[[], bytes]]] = {}

    # Packets.

    def send(self, payload: bytes, ranges: bytes | None = None, *, signal: bool = True) -> int:
        """A packet to the host; its transaction."""
        tag = next(self._tags)
        with self.host.lock:
            header = b"" if ranges is None else ranges
            kind = INBAND if ranges is None else GPA_DIRECT
            assert self.channel.write(
                payload,
                packet_type=kind,
                flags=1,
                transaction_id=tag,
                header=header,
                signal=signal,
            )
        return tag

    def wait(self, tag: int) -> bytes:
        """The payload of the completion of *tag*."""
        interrupts = self.guest.port.interrupts
        assert isinstance(interrupts, Interrupts)
        deadline = time.monotonic() + _SECONDS
        while True:
            interrupts.came.clear()
            self.look()
            if tag in self._answers:
                return self._answers.pop(tag).payload
            assert time.monotonic() < deadline, (self.guest.faults, self.host.told)
            interrupts.came.wait(0.5)

    def look(self) -> None:
        """Take what the host sent."""
        with self.host.lock:
            packets = self.channel.read()
        for packet in packets:
            if packet.transaction_id == 0:
                assert packet.type == INBAND
                self.notices.append(struct.unpack_from("<I", packet.payload)[0])
            else:
                assert packet.type == COMPLETION and packet.transaction_id not in self._answers
                self._answers[packet.transaction_id] = packet

    def operate(self, operation: int, body: bytes = b"") -> tuple[int, bytes]:
        """An operation other than a command: status and the body of its answer."""
        packet = struct.pack("<III", operation, 1, 0) + body
        answer = self.wait(self.send(packet.ljust(self.packet_size, b"\0")))
        completed, _, status = struct.unpack_from("<III", answer)
        assert completed == 1
        return status, answer[12:]

    def initialize(self, version: int = WIN10, *, scan: bool = True) -> None:
        """As storvsc_channel_init(), and the first look at what there is."""
        if version < WIN8:
            self.packet_size = 48
        assert self.operate(7)[0] == 0
        assert self.operate(9, struct.pack("<HH", version, 0))[0] == 0
        assert self.operate(10)[0] == 0
        assert self.operate(8)[0] == 0
        if scan:
            self.luns()

    # Commands.

    def start(
        self,
        cdb: bytes,
        *,
        write: bytes = b"",
        read: int = 0,
        lun: int = 0,
        path: int = 0,
        target: int = 0,
        shape: Shape = (0, True, 1),
        signal: bool = True,
    ) -> int:
        """Send a command with its buffer; without *signal*, leave it in the ring."""
        length = len(write) or read
        direction = 0 if write else 1 if read else 2
        request = struct.pack(
            "<HBBBBBBBBBBI16s",
            self.packet_size - 12,
            *(0, 0, 2, path, target, lun, len(cdb), 20, direction, 0, length),
            cdb,
        )
        packet = (struct.pack("<III", 3, 1, 0) + request).ljust(self.packet_size, b"\0")
        if not length:
            return self.send(packet, signal=signal)
        ranges, pfns, views = self._buffer(length, shape)
        position = 0
        for view in views:
            view[:] = write[position : position + len(view)] if write else b"\xee" * len(view)
            position += len(view)
        header = struct.pack("<II", 0, len(ranges)) + pack_ranges(ranges)
        tag = self.send(packet, header, signal=signal)
        self._buffers[tag] = (pfns, lambda: b"".join(views))
        return tag

    def finish(self, tag: int) -> Answer:
        """Wait for a command's end."""
        answer = self.wait(tag)
        assert len(answer) == self.packet_size
        operation, _, status = struct.unpack_from("<III", answer)
        assert (operation, status) == (1, 0)
        srb, scsi = answer[14], answer[15]
        sense_length, transferred = answer[21], struct.unpack_from("<I", answer, 24)[0]
        sense = answer[28 : 28 + sense_length] if srb & 0x80 else b""
        data = b""
        if tag in self._buffers:
            pfns, content = self._buffers.pop(tag)
            data = content()[:transferred]
            self.guest.free(pfns)
        return Answer(srb, scsi, transferred, sense, data)

    def command(self, cdb: bytes, **options: object) -> Answer:
        return self.finish(self.start(cdb, **options))  # type: ignore[arg-type] # passed on

    def _buffer(
        self, length: int, shape: Shape
    ) -> tuple[tuple[GpaRange, ...], list[int], list[memoryview]]:
        offset, in_a_row, count = shape
        pfns = self.guest.allocate(-(-(offset + length) // PAGE_SIZE) or 1, scattered=not in_a_row)
        ranges: list[GpaRange] = []
        step = max(1, len(pfns) // count)
        left, start = length, offset
        for first in range(0, len(pfns), step):
            last = first + 2 * step > len(pfns)
            some = pfns[first:] if last else pfns[first : first + step]
            size = min(left, len(some) * PAGE_SIZE - start)
            ranges.append(GpaRange(size, start, array("Q", some)))
            left, start = left - size, 0
            if last:
                break
        assert left == 0
        views = [view for item in ranges for view in item.views(self.guest.memory)]
        return tuple(ranges), pfns, views

    # The commands that Linux sends most.

    def read(self, lba: int, blocks: int, *, size: int = 512, **options: object) -> Answer:
        return self.command(
            struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0), read=blocks * size, **options
        )

    def write(
        self, lba: int, data: bytes, *, size: int = 512, fua: bool = False, **options: object
    ) -> Answer:
        cdb = struct.pack(">BBIBHB", 0x2A, 8 * fua, lba, 0, len(data) // size, 0)
        return self.command(cdb, write=data, **options)

    def inquire(self, page: int | None = None, **options: object) -> Answer:
        cdb = struct.pack(">BBBHB", 0x12, page is not None, page or 0, 255, 0)
        return self.command(cdb, read=255, **options)

    def luns(self, **options: object) -> list[int]:
        answer = self.command(
            struct.pack(">BBBBBBIBB", 0xA0, *(0,) * 5, 1024, 0, 0), read=1024, **options
        )
        assert answer.ok
        length = struct.unpack_from(">I", answer.data)[0]
        assert len(answer.data) == 8 + length
        return [answer.data[8 + 8 * number + 1] for number in range(length // 8)]
