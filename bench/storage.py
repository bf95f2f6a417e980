"""Storage without KVM: the controller from its ring to the host's file and back.

A simulated driver fills the ring, which is not timed; what is timed is the host, from the guest's
signal to its last answer. Beside it stands the limit: Python's own ``preadv`` or ``pwritev`` in a
loop, same file, same offsets, and always the same buffer, which stays in the processor's cache.
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
from typing import TYPE_CHECKING

from bench.measurement import Measurement

if TYPE_CHECKING:
    from hvhost.storage.disk import Disk

SIZE = 256 << 20
REQUESTS = 4096
LARGE = 512 << 10
_READ, _WRITE = 0x28, 0x2A


def _seconds(disk: Disk, offsets: list[int], length: int, depth: int, *, write: bool) -> float:
    """Seconds of wall time that the host takes for all requests, *depth* of them at a time."""
    from hvhost.storage.block import DiskUnit
    from simulated.storage import StorageHost

    host = StorageHost.build(DiskUnit(disk), pages=16384, remember_reads=False)
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
    data = os.urandom(length) if write else b""
    taken = 0.0
    for first in range(0, len(offsets), depth):
        some = offsets[first : first + depth]
        tags = [
            driver.start(
                struct.pack(
                    ">BBIBHB", _WRITE if write else _READ, 0, offset // 512, 0, length // 512, 0
                ),
                write=data,
                read=0 if write else length,
                signal=False,
            )
            for offset in some
        ]
        expected = channel.packets_sent + len(some)
        done.clear()
        start = time.perf_counter()
        with host.lock:
            channel.process()
        done.wait()
        taken += time.perf_counter() - start
        for tag in tags:
            assert driver.finish(tag).ok
    with host.lock:
        host.guest.server.reset()
    return taken


def _plain(path: Path, offsets: list[int], length: int, *, write: bool) -> float:
    """Seconds of the same requests in a bare loop."""
    descriptor = os.open(path, os.O_RDWR)
    call: Callable[[int, list[memoryview], int], int] = os.pwritev if write else os.preadv
    buffers = [memoryview(bytearray(length))]
    try:
        start = time.perf_counter()
        for offset in offsets:
            call(descriptor, buffers, offset)
        return time.perf_counter() - start
    finally:
        os.close(descriptor)


def storage(rounds: int) -> list[Measurement]:
    """4 KiB at random and 512 KiB in a row, raw and VHDX, beside plain system calls."""
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
                for path in (raw, vhdx):
                    for depth in depths:
                        disk = open_disk(path)
                        taken = min(
                            _seconds(disk, offsets, length, depth, write=write)
                            for _ in range(rounds)
                        )
                        disk.close()
                        found.append(_figure(path, verb, offsets, length, depth, taken, limit))
    return found


def _figure(
    path: Path,
    verb: str,
    offsets: list[int],
    length: int,
    depth: int,
    taken: float,
    limit: float,
) -> Measurement:
    kind = path.suffix.removeprefix(".").replace("img", "raw")
    name = f"{kind}, {verb} {length >> 10} KiB, depth {depth}"
    if length == LARGE:
        rate = len(offsets) * length / (1 << 20)
        return Measurement("storage", name, rate / taken, "MiB/s", "plain loop", rate / limit)
    scale = 1e6 / len(offsets)
    return Measurement("storage", name, taken * scale, "µs", "plain loop", limit * scale)
