"""A machine whose storage is in a process of its own, and its simulated guest."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from hvhost.kvm.local import LocalOutEvent
from hvhost.machine.computer import Computer
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.machine.storage_model import DriveConfig
from hvhost.partition.memory import PAGE_SIZE, GuestMemory, MemoryRegion
from hvhost.partition.synic import HV_EVENT_FLAGS_BYTE_COUNT, VMBUS_MESSAGE_SINT, Synic
from hvhost.services.vss import Vss
from hvhost.storage.elsewhere import StorageElsewhere
from hvhost.vmbus.server import VmbusServer
from simulated.driver import SimulatedGuest
from simulated.storage import Interrupts, StorageDriver, StorageHost

#: RAM that the guest gets while it runs, in pages.
MORE = 64
SECONDS = 60.0


class SharedMemory:
    """A transport's memory, as far as storage is concerned."""

    def __init__(self, pages: int, notices_writes: bool) -> None:
        self.pages, self.notices_writes = pages, notices_writes
        self.descriptor = os.memfd_create("test")
        size = (2 * pages + MORE) * PAGE_SIZE
        # Other machines' memory may come before this one's, as it does in the rig.
        self.offset = 16 * PAGE_SIZE
        os.ftruncate(self.descriptor, self.offset + size)
        self.memory = memoryview(mmap.mmap(self.descriptor, size, offset=self.offset))

    def share(self) -> tuple[int, int]:
        return self.descriptor, self.offset


_TAKE = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_TAKE.write(bytes.fromhex("31 c0 86 07 c3"))  # xor %eax, %eax; xchg %al, (%rdi); ret
_take = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
    ctypes.addressof(ctypes.c_char.from_buffer(_TAKE))
)


def clear_bits(byte: memoryview) -> int:
    """Take a byte's bits, as a processor does: none that another one sets meanwhile is lost."""
    return int(_take(ctypes.byref(ctypes.c_char.from_buffer(byte))))


class Board:
    """As much of a computer as storage uses, with a simulated guest on its bus."""

    require_running = Computer.require_running

    def __init__(
        self, config: MachineConfig, vss: Vss, pages: int, *, notices_writes: bool
    ) -> None:
        self.config, self.paused = config, False
        self.transport = SharedMemory(pages, notices_writes)
        self.plugged = 2 * pages * PAGE_SIZE
        backing = self.transport.memory[: self.plugged]
        self.guest = SimulatedGuest(pages=pages, processors=config.cpus, backing=backing)
        self.guest.port.interrupts = Interrupts()
        self.lock = threading.RLock()
        self.on_memory: Callable[[MemoryRegion], None]
        self.written: list[bytes] = []
        self.why: list[str] = []
        self.failed = threading.Event()
        self.guest.server.add_device(vss)
        self.event_lines = [LocalOutEvent() for _ in range(config.cpus)]
        self.synics = [
            Synic(self.guest.memory, vp, line, line) for vp, line in enumerate(self.event_lines)
        ]
        self.flags = self.guest.allocate(config.cpus)
        for synic, pfn in zip(self.synics, self.flags, strict=True):
            synic.registers_changed(1, pfn * PAGE_SIZE | 1, 0)

    def interrupted(self, vp: int) -> None:
        """As the guest's interrupt handler: take the flags, and see to those channels."""
        os.eventfd_read(self.event_lines[vp].descriptor)
        flags = self.memory.view(
            self.flags[vp] * PAGE_SIZE + VMBUS_MESSAGE_SINT * HV_EVENT_FLAGS_BYTE_COUNT,
            HV_EVENT_FLAGS_BYTE_COUNT,
        )
        for place in range(HV_EVENT_FLAGS_BYTE_COUNT):
            taken = clear_bits(flags[place : place + 1]) if flags[place] else 0
            for bit in range(8):
                if taken >> bit & 1:
                    self.guest.port.interrupts.append((vp, place * 8 + bit))

    @property
    def memory(self) -> GuestMemory:
        return self.guest.memory

    @property
    def bus(self) -> VmbusServer:
        return self.guest.server

    def memory_written(self, views: Sequence[memoryview]) -> None:
        self.written += [bytes(view) for view in views]

    def fail(self, why: str) -> None:
        self.why.append(why)
        self.failed.set()

    def plug_memory(self) -> None:
        """As the computer does it."""
        start = self.plugged
        last = self.memory.regions[-1]
        view = self.transport.memory[start:]
        region = MemoryRegion(last.guest_address + last.size, view, start)
        self.memory.append(region)
        self.on_memory(region)


class MachineElsewhere:
    """A machine whose storage is elsewhere, its loop on a thread, and its guest."""

    def __init__(
        self,
        directory: Path,
        *drives: DriveConfig,
        pages: int = 512,
        notices_writes: bool = False,
        cpus: int = 5,
    ) -> None:
        self.config = MachineConfig(
            "m1", "/vmlinuz", cpus=cpus, drives=drives, storage_process=True
        )
        self.pages, self.notices_writes = pages, notices_writes
        self.told: list[tuple[str, str]] = []
        self.loop, self.vss = Loop(), Vss()
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.storage = StorageElsewhere(
            Surroundings(
                self.config, self.loop, directory, lambda *event: self.told.append(event), self.vss
            )
        )
        self.thread.start()
        self.boot()

    def boot(self) -> None:
        self.board = Board(self.config, self.vss, self.pages, notices_writes=self.notices_writes)
        board = self.board
        for vp, line in enumerate(board.event_lines):
            self.loop.add_reader(line.descriptor, lambda vp=vp: board.interrupted(vp))  # type: ignore[misc]
        self.on_loop(lambda: self.storage.attach(cast("Computer", board)))
        self.board.guest.connect()

    def on_loop(self, function: Callable[[], None]) -> None:
        """Methods for the machine are called on its loop's thread."""
        done, errors = threading.Event(), list[Exception]()

        def call() -> None:
            try:
                function()
            except Exception as error:
                errors.append(error)
            done.set()

        self.loop.call_soon_threadsafe(call)
        assert done.wait(SECONDS)
        if errors:
            raise errors[0]

    def power_down(self) -> None:
        with self.board.lock:
            self.board.guest.server.reset()
        self.on_loop(self.storage.detach)
        for line in self.board.event_lines:
            self.loop.remove(line.descriptor)
            os.close(line.descriptor)

    def close(self) -> None:
        self.power_down()
        self.loop.stop()
        self.thread.join()
        self.storage.close()
        assert self.storage.process.returncode == 0

    def call(self, name: str, **parameters: object) -> Any:
        return json.loads(self.storage.call(name, json.dumps(parameters)))

    def relids(self) -> list[int]:
        """The controllers' channels, sub-channels and all, in the order of their offers."""
        with self.board.lock:
            self.board.guest.collect_offers()
        return sorted(
            number
            for number, offer in self.board.guest.offers.items()
            if offer.if_type != self.vss.offer.interface_type
        )

    def driver(self, relid: int | None = None) -> StorageDriver:
        """The driver of a controller, the last one by default."""
        with self.board.lock:
            channel = self.board.guest.open(
                self.relids()[-1] if relid is None else relid, out_pages=33, in_pages=33
            )
        return StorageDriver(cast("StorageHost", self), channel)

    # As a StorageHost, for the driver.

    @property
    def guest(self) -> SimulatedGuest:
        return self.board.guest

    @property
    def lock(self) -> threading.RLock:
        return self.board.lock

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.005)
