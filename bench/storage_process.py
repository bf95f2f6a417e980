"""A storage process beside a worker's own threads, without KVM.

A simulated driver fills its ring, which is not timed; what is timed is from its signal, which wakes
whoever serves the disk by an eventfd as KVM does, to the last answer in its ring. Once with a
worker that has nothing else to do, and once with one whose interpreter is busy, as by a network
adapter or a guest's exits.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measurement import Measurement

if TYPE_CHECKING:
    from simulated.storage import StorageDriver

SIZE = 64 << 20
BATCHES, DEPTH, LENGTH = 32, 32, 4096
_READ = 0x28
_WRITE_INDEX = 0


@contextlib.contextmanager
def _busy(wanted: bool) -> Iterator[None]:
    """Another thread of this process that always has something to do."""
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    thread = threading.Thread(target=spin, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if wanted:
            thread.join()


def _seconds(driver: StorageDriver, signal: Callable[[], None], *, busy: bool) -> float:
    """What :data:`BATCHES` times :data:`DEPTH` reads at random take."""
    from simulated.storage import Interrupts

    interrupts, ring = driver.guest.port.interrupts, driver.channel.incoming
    assert isinstance(interrupts, Interrupts)
    chance, taken, answer = random.Random(1), 0.0, 0
    for _ in range(BATCHES):
        tags = [
            driver.start(
                struct.pack(
                    ">BBIBHB", _READ, 0, chance.randrange(SIZE // LENGTH) * 8, 0, LENGTH // 512, 0
                ),
                read=LENGTH,
                signal=False,
            )
            for _ in range(DEPTH)
        ]
        before = ring.word(_WRITE_INDEX)
        with _busy(busy):
            interrupts.came.clear()
            start = time.perf_counter()
            signal()
            while not answer or (ring.word(_WRITE_INDEX) - before) % ring.size < DEPTH * answer:
                interrupts.came.wait(1.0)
                interrupts.came.clear()
                answer = answer or (16 + driver.packet_size + 8)
            taken += time.perf_counter() - start
        for tag in tags:
            assert driver.finish(tag).ok
    return taken


def _here(path: Path, *, busy: bool) -> float:
    """Served by a loop's thread of this process, as in a worker."""
    from hvhost.machine.loop import Loop
    from hvhost.storage.block import DiskUnit
    from hvhost.storage.images import open_disk
    from simulated.storage import StorageHost

    host = StorageHost.build(DiskUnit(open_disk(path)), pages=2048, remember_reads=False)
    driver, loop = host.connect(ring_pages=33), Loop()
    channel = host.guest.server.channels[0]
    signalled = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def process() -> None:
        os.eventfd_read(signalled)
        with host.lock:
            channel.process()

    loop.add_reader(signalled, process)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        return _seconds(driver, lambda: os.eventfd_write(signalled, 1), busy=busy)
    finally:
        loop.stop()
        thread.join()
        os.close(signalled)
        host.close()


def _there(path: Path, directory: Path, *, busy: bool) -> float:
    """Served by a storage process."""
    from hvhost.machine.storage_model import DriveConfig
    from simulated.elsewhere import MachineElsewhere

    machine = MachineElsewhere(directory, DriveConfig(str(path)), pages=2048)
    try:
        driver = machine.driver()
        driver.initialize()
        (elsewhere,) = (each.elsewhere for each in machine.board.bus.channels if each.is_open)
        assert elsewhere is not None
        return _seconds(driver, elsewhere.signalled, busy=busy)
    finally:
        machine.close()


def storage_process(rounds: int) -> list[Measurement]:
    """4 KiB reads, 32 at a time, from a page cache: by a process of their own, and without."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="hvhost-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        path = directory / "disk.img"
        path.write_bytes(os.urandom(SIZE))
        scale = 1e6 / (BATCHES * DEPTH)
        for busy in (False, True):
            there = min(_there(path, directory, busy=busy) for _ in range(rounds)) * scale
            here = min(_here(path, busy=busy) for _ in range(rounds)) * scale
            figure = f"read 4 KiB, depth {DEPTH}, {'busy' if busy else 'idle'} worker"
            found.append(Measurement("storage-process", figure, there, "µs", "in the worker", here))
    return found
