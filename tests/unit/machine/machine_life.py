"""A machine over a KVM in memory, whose boots follow scripts; at its end nothing is left."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_transport import (
    FakeTransport,
    Out,
    Script,
)
from kernel_files import Elf, Segment, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.image import KernelImage, parse_kernel
from hvhost.machine.loop import Loop
from hvhost.machine.machine import Machine
from hvhost.machine.model import MachineConfig, MachineState

MIB = 1 << 20


MEMORY = 16 * MIB


S5 = Out(0x604, 2, struct.pack("<H", 5 << 10 | 1 << 13))


Guest = Callable[[FakeTransport], Script]


def kernel() -> KernelImage:
    segments = [Segment(b"kernel text" * 100, 0x200000), pvh_note(0x200000)]
    return parse_kernel(Elf(segments, 0x200000).build(), "kernel")


class Life:
    """A machine whose boots follow one script each, its loop on a thread of its own."""

    def __init__(self, *boots: tuple[Guest, ...], cpus: int = 1, serial_ports: int = 2) -> None:
        self.config = MachineConfig(
            "test", "/kernel", cpus=cpus, memory=MEMORY, serial_ports=serial_ports
        )
        self.boots = list(boots)
        self.transports: list[FakeTransport] = []
        self.output = [bytearray() for _ in range(serial_ports)]
        self.loop = Loop()
        self.fail_connect: Exception | None = None
        self.states: list[MachineState] = []
        """The machine's at each start, while its computer is built."""
        self.machine = Machine(
            self.config,
            kernel(),
            self.connect,
            self.loop,
            [output.extend for output in self.output],
        )
        self.thread = threading.Thread(target=self.loop.run)

    def connect(self) -> FakeTransport:
        self.states.append(self.machine.info().state)
        with pytest.raises(HvHostError, match="just being started; try again"):
            self.machine.nmi()
        if self.fail_connect is not None:
            raise self.fail_connect
        scripts = self.boots.pop(0) if self.boots else ()
        transport = FakeTransport(MEMORY, *scripts)
        self.transports.append(transport)
        return transport

    def start(self) -> None:
        self.machine.power_on()
        self.thread.start()

    def ended(self) -> None:
        self.thread.join(10)
        assert not self.thread.is_alive(), "the machine did not stop"

    def kinds(self) -> list[tuple[str, str]]:
        return [(event.kind, event.detail) for event in self.machine.events(0, 0)]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)

    @property
    def readers(self) -> int:
        """Descriptors in the loop besides its own."""
        return len(self.loop._callbacks) - 1


@contextmanager
def life(*boots: tuple[Guest, ...], cpus: int = 1, serial_ports: int = 2) -> Iterator[Life]:
    """A started machine; at the end nothing of it is left."""
    before = set(threading.enumerate())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    one = Life(*boots, cpus=cpus, serial_ports=serial_ports)
    try:
        one.start()
        yield one
    finally:
        one.machine.force_stop()
        one.ended()
        one.machine.close()
        assert one.readers == 0
        assert all(transport.closed == 1 for transport in one.transports)
        one.loop.close()
        left = [each for each in threading.enumerate() if each not in before]
        assert not left, f"threads are left: {left}"
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def says(port: int, text: bytes) -> Script:
    for character in text:
        yield Out(port, 1, bytes([character]))


def runs_on(kvm: FakeTransport) -> Script:
    while True:
        yield Out(0x80, 1, b"x")
