"""The quick way of reads and writes: no objects for packets, no thread where none is needed.

Most of what a guest sends are packets of few shapes: READ(10) or WRITE(10) with one range of pages.
They are taken from the ring's bytes here, all that lie there at once. A read whose data are in the
host's page cache is done on the spot, under the bus's lock; whatever would wait for the disk, and
all that comes after it for the same unit, goes to the unit's worker. Anything of another shape is
left for :mod:`hvhost.storage.device`, which knows all rules, and judges what is wrong with it: so
nothing is refused here, and what is answered here is answered as it would be there.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any, Final

from hvhost.errors import RemoteProtocolError
from hvhost.partition.memory import PAGE_SHIFT, PAGE_SIZE
from hvhost.storage.block import DiskUnit
from hvhost.storage.protocol import PACKET_SIZE, SrbStatus
from hvhost.storage.scsi import ScsiStatus
from hvhost.storage.session import ChannelSession, ControllerState, Phase, Surface
from hvhost.storage.worker import Request, UnitWorker
from hvhost.vmbus.gpadl import GpaRange

#: Bytes that are read at once for one look into the ring; more would keep the bus too long.
MOST_AT_ONCE: Final = 1 << 20
#: Pages of the largest transfer, and one for its offset.
_MOST_PAGES: Final = 129
_READ_10, _WRITE_10 = 0x28, 0x2A
_PROTECT_OR_FUA = 0xE8
_EXECUTE_SRB = 3
_KEY = struct.Struct("<HHH")  # type, offset8, len8; flags change nothing, and are the guest's
_KEY_SIZE = _KEY.size
_GPA_DIRECT = 9
_unpack_ten = struct.Struct(">BBIxH").unpack_from
# A completion packet with vstor_packet and vmscsi_request: as complete_request() makes it.
_pack_answer = struct.Struct("<8sQ12s2s2sIII36s").pack
_COMPLETION = struct.pack("<HHHH", 0xB, 2, 2 + PACKET_SIZE // 8, 0)
_COMPLETED = struct.pack("<III", 1, 0, 0)  # COMPLETE_IO, flags, STATUS_SUCCESS
_GOOD = bytes((SrbStatus.SUCCESS, ScsiStatus.GOOD))
_NO_TURN: Any = (None, None, 0)

Unpack = Callable[[bytes, int], tuple[Any, ...]]
Shape = tuple[Unpack, int, int]
#: Of a unit for one look: its worker, how to read at once (None: not at all), its sector's size.
Turn = tuple[UnitWorker, Callable[..., bool] | None, int]


def _shape(key: bytes) -> Shape | None:
    """How to unpack packets that begin with *key*, their size and their pages, if they are ours."""
    kind, offset8, length8 = _KEY.unpack(key)
    pages = offset8 - 4
    if (
        kind != _GPA_DIRECT
        or not 1 <= pages <= _MOST_PAGES
        or length8 - offset8 != PACKET_SIZE // 8
    ):
        return None
    # Transaction; ranges; bytes and offset of the first; its pages; operation; from vmscsi_request
    # length, port to lun, cdb_length to reserved, data_transfer_length, and the rest with the CDB.
    layout = struct.Struct(f"<8xQ4xIIIQ{8 * (pages - 1)}sI8x2s2xIII36s")
    return layout.unpack_from, layout.size + 8, pages


class QuickPath:
    """For one channel: *units* and *state* are its controller's."""

    def __init__(
        self,
        state: ControllerState,
        units: dict[int, UnitWorker],
        session: ChannelSession,
        surface: Surface,
    ) -> None:
        self._state, self._units, self._session = state, units, session
        self._memory = surface.memory
        self._shapes: dict[bytes, Shape] = {}

    def serve(self, data: bytes) -> int:
        """Take packets from the start of *data*; the bytes that were taken."""
        if self._state.phase is not Phase.IN_USE:
            return 0
        turns: dict[int, Turn] = {}
        try:
            return self._serve(data, turns)
        finally:
            for worker, read_now, _ in turns.values():
                if read_now is not None:
                    worker.leave()

    def _serve(self, data: bytes, turns: dict[int, Turn]) -> int:
        session, shapes = self._session, self._shapes
        region = self._memory.regions[0]
        base, ram, ram_size = region.guest_address, region.view, region.size
        answers: list[bytes] = []
        written: list[memoryview] = []
        position, end, count, left = 0, len(data), 0, MOST_AT_ONCE
        while True:
            shape = shapes.get(data[position : position + _KEY_SIZE]) or self._new_shape(
                data[position : position + _KEY_SIZE]
            )
            if shape is None:
                break
            unpack, size, pages = shape
            if position + size > end:
                break
            (
                transaction, ranges, length, offset, pfn, more,
                operation, srb_length, address, sizes, transfer, rest,
            ) = unpack(data, position)  # fmt: skip
            opcode, flags, lba, blocks = _unpack_ten(rest)
            lun = address >> 24
            worker, read_now, sector = turns.get(lun) or self._turn(lun, turns)
            if (
                worker is None
                or operation != _EXECUTE_SRB
                or ranges != 1
                or address & 0xFFFF00  # path and target
                or sizes & 0xFF != 10
                or (opcode != _READ_10 and opcode != _WRITE_10)
                or flags & _PROTECT_OR_FUA
                or transfer != length
                or transfer != blocks * sector
                or offset >= PAGE_SIZE
            ):
                break
            if pages == 1:
                if offset + length > PAGE_SIZE:
                    break
                place = (pfn << PAGE_SHIFT) + offset - base
                if 0 <= place <= ram_size - length:
                    views = [ram[place : place + length]]
                elif not (views := self._views(length, offset, pfn, b"")):
                    break
            elif (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT != pages or not (
                views := self._views(length, offset, pfn, more)
            ):
                break
            if (
                read_now is not None
                and opcode == _READ_10
                and length <= left
                and read_now(lba * sector, length, views)
            ):
                left -= length
                written += views
                answers.append(
                    _pack_answer(
                        _COMPLETION, transaction, _COMPLETED, srb_length, _GOOD, address,
                        sizes & 0xFFFF00FF, length, rest,
                    )
                )  # fmt: skip
            else:
                if read_now is not None:
                    worker.leave()
                    turns[lun] = worker, None, sector
                payload = data[position + size - 8 - PACKET_SIZE : position + size - 8]
                session.submit(worker, Request(session, transaction, payload, rest[:16], views))
            position += size
            count += 1
        if count:
            session.channel.packets_received += count
            if answers:
                session.memory_written(written)
                session.channel.send_encoded(answers)
            session.hand_over()
        return position

    def _views(self, length: int, offset: int, pfn: int, more: bytes) -> list[memoryview]:
        """The guest's buffers; none if a page is not RAM."""
        pfns = array("Q", (pfn,))
        pfns.frombytes(more)
        try:
            return GpaRange(length, offset, pfns).views(self._memory)
        except RemoteProtocolError:
            return []

    def _new_shape(self, key: bytes) -> Shape | None:
        shape = _shape(key) if len(key) == _KEY_SIZE else None
        if shape is not None:
            self._shapes[key] = shape
        return shape

    def _turn(self, lun: int, turns: dict[int, Turn]) -> Turn:
        """Enter the unit's worker, if nothing is to be done before."""
        worker = self._units.get(lun)
        if worker is None or not isinstance(worker.unit, DiskUnit):
            return _NO_TURN  # type: ignore[no-any-return] # looks like one, without a worker
        disk, state = worker.unit.disk, worker.unit.state
        entered = not state.attentions and not self._session.waits(worker) and worker.try_enter()
        turn = turns[lun] = worker, disk.read_now if entered else None, disk.logical_sector_size
        return turn
