"""What the fuzzer of storage runs; see ``targets.py``."""

from __future__ import annotations

import struct
from array import array
from contextlib import suppress
from uuid import UUID

from hvhost.errors import RemoteProtocolError
from hvhost.storage import protocol, scsi
from hvhost.storage.block import DiskUnit
from hvhost.storage.mode import ModeParameters, mode_select
from hvhost.storage.optical import OpticalUnit
from hvhost.storage.scsi import CheckCondition
from hvhost.vmbus.gpadl import GpaRange, pack_ranges
from hvhost.wire import Buffer
from simulated.storage import MemoryDisk, StorageHost
from simulated.targets import pieces_of

_DATA_PAGES = 4


def fuzz_scsi(data: Buffer) -> None:
    """*data* as everything that is parsed without a disk."""
    raw = bytes(data)
    for parse in (protocol.parse_command, scsi.parse_unmap):
        with suppress(RemoteProtocolError, CheckCondition):
            parse(raw)
    with suppress(CheckCondition):
        mode_select(raw[:16].ljust(16, b"\0"), raw[16:], ModeParameters())


def fuzz_storage(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets to a disk, a DVD drive and nothing.

    A piece's first byte says what becomes of the rest: a packet as it is, or a command with its
    place, length and buffer.
    """
    raw = bytes(data)
    fuzz_scsi(raw)
    host = StorageHost.build(
        DiskUnit(MemoryDisk(1 << 18, read_only=bool(raw[:1] == b"\1"))),
        OpticalUnit(UUID(int=1), MemoryDisk(1 << 18)),
        pages=48,
    )
    driver = host.connect(ring_pages=3)
    pfns = host.guest.allocate(_DATA_PAGES)
    for number, piece in enumerate(pieces_of(raw[1:])):
        kind, rest = (piece[0], piece[1:]) if piece else (0, b"")
        with host.lock:
            if number % 4 == 3:
                driver.channel.read()
            if kind & 1:
                driver.channel.write(rest.ljust(64, b"\0"), transaction_id=number + 1)
                continue
            cdb = rest[:16].ljust(16, b"\0")
            length = min(struct.unpack("<H", rest[16:18].ljust(2, b"\0"))[0], _DATA_PAGES << 12)
            request = struct.pack(
                "<HBBBBBBBBBBI", 52, 0, 0, 0, 0, 0, kind >> 1 & 3, 16, 20, 1, 0, length
            )
            packet = (struct.pack("<III", 3, 1, 0) + request + cdb).ljust(64, b"\0")
            ranges = (GpaRange(length, 0, array("Q", pfns[: -(-length // 4096)])),)
            header = struct.pack("<II", 0, 1) + pack_ranges(ranges)
            driver.channel.write(packet, packet_type=9, transaction_id=number + 1, header=header)
    host.close()
    assert len(host.guest.faults) <= 1
    assert not host.told, host.told
