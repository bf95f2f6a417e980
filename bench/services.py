"""Integration services and sockets without KVM: what they cost on the host.

A simulated guest answers; what is counted is the processor time of the host alone, from the guest's
signal (or a program's system call) to the host's next message. Beside it stands the limit: the same
bytes moved by plain system calls or copies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.measurement import Measurement
from hvhost.errors import HvHostError

if TYPE_CHECKING:
    from simulated.driver import SimulatedGuest
    from simulated.sockets import SocketHost

FILE = 8 << 20
STREAM = 16 << 20
CHUNK = 16 << 10
OPERATIONS = 1000
ROUND_TRIPS = 1000
MIB = 1 << 20

Result = TypeVar("Result")


class HostTime:
    """Adds up the seconds spent in the host, among others those in the guest's signals to it."""

    def __init__(self, guest: SimulatedGuest) -> None:
        self.seconds = 0.0
        self._inner = False
        signal = guest.server.signal

        def timed(connection_id: int) -> int:
            return self(lambda: signal(connection_id))

        guest.server.signal = timed  # type: ignore[method-assign]

    def __call__(self, work: Callable[[], Result]) -> Result:
        if self._inner:
            return work()
        self._inner = True
        start = time.thread_time()
        try:
            return work()
        finally:
            self.seconds += time.thread_time() - start
            self._inner = False


def _file_copy(path: Path) -> float:
    """Seconds of the host for a whole file."""
    from hvhost.machine.copier import Copier
    from hvhost.machine.model import CopyState
    from hvhost.services.filecopy import FileCopy
    from simulated.driver import GuestService, SimulatedGuest

    guest, device = SimulatedGuest(), FileCopy()
    guest.server.add_device(device)
    guest.connect()
    service = GuestService(guest.open(1), [(1, 1)])
    service.run()
    host, copier = HostTime(guest), Copier(device)
    host(
        lambda: copier.start(
            threading.RLock(), str(path), "/file", create_path=False, overwrite=True
        )
    )
    while service.run():
        service.requests.clear()
    if copier.progress(0.0).state is not CopyState.DONE:
        raise HvHostError("the simulated guest did not get the whole file.")
    return host.seconds


def _plain_copy(path: Path, fragment: int) -> float:
    """Seconds to read the same fragments and to put each into memory once."""
    target = memoryview(bytearray(fragment))
    descriptor = os.open(path, os.O_RDONLY)
    start = time.thread_time()
    for offset in range(0, FILE, fragment):
        data = os.pread(descriptor, fragment, offset)
        target[: len(data)] = data
    seconds = time.thread_time() - start
    os.close(descriptor)
    return seconds


def _kvp() -> tuple[float, float]:
    """Seconds of the host for all items set, and for as many read."""
    from hvhost.machine.kinds import KvpPool
    from hvhost.services.kvp import Kvp
    from hvhost.services.kvp_protocol import get_message, parse_get, set_message
    from simulated.driver import SimulatedGuest
    from simulated.kvp_daemon import Daemon

    guest, device = SimulatedGuest(), Kvp(())
    guest.server.add_device(device)
    guest.connect()
    daemon = Daemon(guest.open(1), [(5, 0), (4, 0)])
    while daemon.run():
        pass
    host = HostTime(guest)
    answers: list[Any] = []

    def put(number: int) -> None:
        message = set_message(KvpPool.EXTERNAL, f"key {number % 8}", f"value {number % 8}")
        device.request(message, answers.append)

    def get(number: int) -> None:
        message = get_message(KvpPool.EXTERNAL, f"key {number % 8}")
        device.request(message, answers.append, parse_get)

    spent = []
    for ask in (put, get):
        host.seconds = 0.0
        for number in range(OPERATIONS):
            host(partial(ask, number))
            while daemon.run():
                pass
        spent.append(host.seconds)
    if len(answers) < 2 * OPERATIONS or any(isinstance(each, HvHostError) for each in answers):
        raise HvHostError("the simulated guest did not answer all requests.")
    last = answers[-1].content
    if last is None or last.value != f"value {(OPERATIONS - 1) % 8}":
        raise HvHostError("the simulated guest did not give back what was set.")
    return spent[0], spent[1]


def _plain_messages(size: int) -> float:
    """Seconds to copy as many messages of *size* bytes in, and out again."""
    view, message = memoryview(bytearray(size)), os.urandom(size)
    start = time.thread_time()
    for _ in range(OPERATIONS):
        view[:] = message
        bytes(view)
    return time.thread_time() - start


def _step(host: SocketHost) -> None:
    """One round of the bridge's loop."""
    host.loop.call_soon_threadsafe(host.loop.stop)
    host.loop.run()


def _round_trips(directory: Path) -> float:
    """Seconds of the host for one message to the guest and its answer back."""
    from simulated.sockets import SocketHost

    bridge = SocketHost(directory)
    guest, program = bridge.guest_to_host()
    host = HostTime(bridge.guest)

    def send(message: bytes) -> None:
        program.sendall(message)
        _step(bridge)

    for number in range(ROUND_TRIPS):
        message = struct.pack("<Q", number)
        host(lambda message=message: send(message))  # type: ignore[misc]
        if guest.receive() != message or guest.send(message) != 8:
            raise HvHostError("the simulated guest did not get the message.")
        host(lambda: program.recv(8))
    program.close()
    bridge.close()
    return host.seconds / ROUND_TRIPS


def _streams(directory: Path) -> tuple[float, float]:
    """Seconds of the host for a stream to the guest, and for one from it."""
    from simulated.sockets import SocketHost

    bridge = SocketHost(directory)
    guest, program = bridge.guest_to_host()
    program.setblocking(False)
    data = os.urandom(CHUNK)
    spent = []
    host = HostTime(bridge.guest)

    def send() -> None:
        with contextlib.suppress(BlockingIOError):
            program.send(data)
        _step(bridge)

    moved = 0
    while moved < STREAM:
        host(send)
        moved += len(guest.receive())
    spent.append(host.seconds * STREAM / moved)
    while True:  # what is still on the way
        _step(bridge)
        if not guest.receive():
            break
    host.seconds, moved = 0.0, 0

    def receive() -> int:
        try:
            return len(program.recv(1 << 20))
        except BlockingIOError:
            return 0

    while moved < STREAM:
        guest.send(data)
        moved += host(receive)
    spent.append(host.seconds)
    program.close()
    bridge.close()
    return spent[0], spent[1]


def _plain_stream(size: int, total: int) -> float:
    """Seconds to move *total* bytes through one Unix socket, *size* at a time."""
    ours, theirs = socket.socketpair()
    data = os.urandom(size)
    start = time.thread_time()
    for _ in range(total // size):
        ours.sendall(data)
        theirs.recv(size)
    seconds = time.thread_time() - start
    ours.close()
    theirs.close()
    return seconds


def services(rounds: int) -> list[Measurement]:
    """File copy, key-value pairs and sockets against a simulated guest, natively."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hvhost.services.filecopy_protocol import DATA_FRAGMENT

    with tempfile.TemporaryDirectory(prefix="hvhost-bench-") as name:
        directory = Path(name)
        path = directory / "file"
        path.write_bytes(os.urandom(FILE))

        def best(measure: Callable[[], float]) -> float:
            return min(measure() for _ in range(rounds))

        def sockets() -> Path:
            return Path(tempfile.mkdtemp(dir=directory))

        copy, plain = best(lambda: _file_copy(path)), best(lambda: _plain_copy(path, DATA_FRAGMENT))
        items = [_kvp() for _ in range(rounds)]
        messages = best(lambda: _plain_messages(2600))
        trip = best(lambda: _round_trips(sockets()))
        echo = best(lambda: _plain_stream(8, 16 * ROUND_TRIPS)) / ROUND_TRIPS
        streams = [_streams(sockets()) for _ in range(rounds)]
        stream = best(lambda: _plain_stream(CHUNK, STREAM))
    size, total = FILE / MIB, STREAM / MIB
    pipe, copied = "one Unix socket", "its bytes copied twice"
    return [
        Measurement(
            "services", "file copy", size / copy, "MiB/s", "read and copied once", size / plain
        ),
        *(
            Measurement(
                "services",
                f"KVP {name}",
                OPERATIONS / min(each[number] for each in items),
                "/s",
                copied,
                OPERATIONS / messages,
            )
            for number, name in enumerate(("set", "get"))
        ),
        Measurement(
            "services", "hv_sock round trip", trip * 1e6, "µs", "two over " + pipe, echo * 1e6
        ),
        Measurement(
            "services",
            "hv_sock to the guest",
            total / min(one for one, _ in streams),
            "MiB/s",
            pipe,
            total / stream,
        ),
        Measurement(
            "services",
            "hv_sock from the guest",
            total / min(other for _, other in streams),
            "MiB/s",
            pipe,
            total / stream,
        ),
    ]
