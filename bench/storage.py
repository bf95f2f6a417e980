"""Storage without KVM: the controller from its ring to the host's file and back.

A simulated driver fills the ring, which is not timed; what is timed is the host, from the guest's
signal to its last answer, by the clock and in the processor's time of all its threads. Beside it
stands the limit: Python's own ``preadv`` or ``pwritev`` in a loop, same file, same offsets, and
always the same buffer, which stays in the processor's cache. What the same loop makes when it goes
through as much memory as the guest has ("spread") is told too: no host can do better than that.

The limit is out of reach where requests are small: to unpack one packet and pack one answer, the
least that a ring asks for, costs about as much as a call.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.measurement import Measurement

if TYPE_CHECKING:
    from hvhost.storage.disk import Disk

SIZE = 256 << 20
REQUESTS = 2048
LARGE = 1 << 20
#: As the simulated guest has it; more than the processor's own caches hold.
GUEST_MEMORY = 64 << 20
#: The largest transfer that a guest is allowed: it makes two of a mebibyte.
TRANSFER = 512 << 10
_READ, _WRITE = 0x28, 0x2A


class Cost(NamedTuple):
    """What all requests took, in seconds; compared by the first."""

    wall: float
    processor: float


def _cost(disk: Disk, offsets: list[int], length: int, depth: int, *, write: bool) -> Cost:
    """What the host needs for all requests, *depth* of them at a time."""
    from hvhost.storage.block import DiskUnit
    from simulated.storage import StorageHost

    host = StorageHost.build(DiskUnit(disk), pages=GUEST_MEMORY >> 12, remember_reads=False)
    driver = host.connect(ring_pages=65)
    channel = host.guest.server.channels[0]
    settle, done = channel.settle, threading.Event()
    assert settle is not None
    expected = 0

    def settled() -> None:
        settle()
        if channel.packets_sent == expected:
            done.set()

    channel.settle = settled
    piece = min(length, TRANSFER)
    data = os.urandom(piece) if write else b""
    wall = processor = 0.0
    for first in range(0, len(offsets), depth):
        some = [
            offset + within
            for offset in offsets[first : first + depth]
            for within in range(0, length, piece)
        ]
        tags = [
            driver.start(
                struct.pack(
                    ">BBIBHB", _WRITE if write else _READ, 0, offset // 512, 0, piece // 512, 0
                ),
                write=data,
                read=0 if write else piece,
                signal=False,
            )
            for offset in some
        ]
        expected = channel.packets_sent + len(some)
        done.clear()
        start, start_processor = time.perf_counter(), time.process_time()
        with host.lock:
            channel.process()
        done.wait()
        wall += time.perf_counter() - start
        processor += time.process_time() - start_processor
        for tag in tags:
            assert driver.finish(tag).ok
    with host.lock:
        host.guest.server.reset()
    return Cost(wall, processor)


def _plain(
    path: Path, offsets: list[int], length: int, *, write: bool, memory: int | None = None
) -> Cost:
    """The same requests in a bare loop: in one buffer, or over *memory* bytes in turn."""
    descriptor = os.open(path, os.O_RDWR)
    call: Callable[[int, list[memoryview], int], int] = os.pwritev if write else os.preadv
    room = memoryview(bytearray(b"\xee") * (memory or length))
    buffers = [[room[at : at + length]] for at in range(0, len(room), length)]
    try:
        start, start_processor = time.perf_counter(), time.process_time()
        for number, offset in enumerate(offsets):
            call(descriptor, buffers[number % len(buffers)], offset)
        return Cost(time.perf_counter() - start, time.process_time() - start_processor)
    finally:
        os.close(descriptor)


def storage(rounds: int) -> list[Measurement]:
    """4 KiB at random and 1 MiB in a row, raw and VHDX, beside plain system calls."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hvhost.storage.images import create_disk, open_disk
    from hvhost.storage.vhdx_create import VhdxOptions

    chance = random.Random(1)
    small = [chance.randrange(SIZE // 4096) * 4096 for _ in range(REQUESTS)]
    large = list(range(0, SIZE, LARGE))
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="hvhost-bench-", dir="/var/tmp") as name:
        raw, vhdx = Path(name) / "disk.img", Path(name) / "disk.vhdx"
        create_disk(raw, SIZE).close()
        create_disk(vhdx, VhdxOptions(SIZE)).close()
        content = [memoryview(os.urandom(1 << 20))]
        for path in (raw, vhdx):
            disk = open_disk(path)
            for offset in range(0, SIZE, 1 << 20):
                disk.writev(offset, content)
            disk.flush()
            disk.close()
        for write in (False, True):
            verb = "write" if write else "read"
            for offsets, length, depths in ((small, 4096, (1, 32)), (large, LARGE, (1, 4))):
                limit = min(_plain(raw, offsets, length, write=write) for _ in range(rounds))
                spread = min(
                    _plain(raw, offsets, length, write=write, memory=GUEST_MEMORY)
                    for _ in range(rounds)
                )
                found += _figures("plain, spread", verb, offsets, length, spread, limit)
                for path in (raw, vhdx):
                    for depth in depths:
                        disk = open_disk(path)
                        taken = min(
                            _cost(disk, offsets, length, depth, write=write) for _ in range(rounds)
                        )
                        disk.close()
                        kind = path.suffix.removeprefix(".").replace("img", "raw")
                        found += _figures(
                            f"{kind}, depth {depth}", verb, offsets, length, taken, limit
                        )
    return found


def _figures(
    what: str, verb: str, offsets: list[int], length: int, taken: Cost, limit: Cost
) -> list[Measurement]:
    count = len(offsets)
    if length == LARGE:
        name = f"{verb} 1 MiB, {what}"
        rate, beside = count / taken.wall, count / limit.wall
        measured = Measurement("storage", name, rate, "MiB/s", "plain loop", beside)
    else:
        name = f"{verb} {length >> 10} KiB, {what}"
        scale = 1e6 / count
        own, beside = taken.wall * scale, limit.wall * scale
        measured = Measurement("storage", name, own, "µs", "plain loop", beside)
    per_second, beside = count / taken.processor, count / limit.processor
    return [
        measured,
        Measurement("storage", name, per_second, "IOPS per CPU-second", "plain loop", beside),
    ]
