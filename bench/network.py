"""A network adapter natively: the host's part of moving frames, beside bare system calls.

The simulated driver fills its ring or a socket before, and is not measured; what is measured is
from the guest's signal to the last frame written, or from the first frame read to the guest's
interrupt, in CPU time of the thread, medians of batches. Beside it stands a loop of the same
``writev`` or ``readv`` on the same sockets.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.measurement import Measurement, wake_ups_a_second
from hvhost.network import frame
from hvhost.network.wires import DescriptorWire, enlarge

if TYPE_CHECKING:
    from simulated.netvsc import NetvscDriver

BATCH, BATCHES = 64, 60
LARGE_BATCH = 2
#: Bytes of a piece of a packet: Linux takes memory for sockets in such.
PIECE = 32 * 1024
IDLE_SECONDS = 5.0


class _Sockets:
    """Two ends of a cable, the near one as a wire."""

    def __init__(self) -> None:
        from hvhost.machine.loop import Loop

        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.near, self.far):
            each.setblocking(False)
            enlarge(each)
        self.wire = DescriptorWire(
            self.near.fileno(), Loop(), readable=lambda: None, writable=lambda: None
        )
        self.buffer = memoryview(bytearray(1 << 17))

    def drain(self) -> int:
        """Read what arrived at the far end; how many frames."""
        count = 0
        while True:
            try:
                os.readv(self.far.fileno(), [self.buffer])
            except BlockingIOError:
                return count
            count += 1

    def fill(self, data: bytes, count: int) -> None:
        for _ in range(count):
            self.far.send(data)


def _lend(driver: NetvscDriver, message: bytes) -> bytes:
    """*message* in the guest's memory, and its ranges as netvsc names them: one for each piece."""
    ranges = []
    for start in range(0, len(message), PIECE):
        piece = message[start : start + PIECE]
        pages = driver.guest.allocate(-(-len(piece) // 4096))
        driver.guest.allocate(1)  # or the next piece would be its neighbour
        driver.put(pages, 0, piece)
        ranges.append(struct.pack(f"<II{len(pages)}Q", len(piece), 0, *pages))
    return struct.pack("<II", 0, len(ranges)) + b"".join(ranges)


def _measure(size: int, batch: int) -> tuple[float, float, float, float]:
    """Seconds a frame: sent by the guest, ``writev``; received by the guest, ``readv``."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from simulated.frames import tcp
    from simulated.netvsc import MAC, PEER, NetvscDriver, nvsp, rndis_packet

    driver, sockets = NetvscDriver(sections=128), _Sockets()
    driver.adapter.wire = sockets.wire
    driver.start()
    (channel,) = driver.guest.server.channels
    payload = os.urandom(size - 54)
    out, back = tcp(payload), tcp(payload, to=MAC, sender=PEER)
    large = size > 1514
    infos = ((2, 1448 | 34 << 20 | 1 << 30),) if large else ((0, 0x5 | 34 << 16),)
    offload = frame.Offload(1, 1 if large else 0, 54, 1448 if large else 0, 34, 16)
    message = rndis_packet(out, *infos)
    ranges = _lend(driver, message)
    driver.put(driver.send_pages, 0, message[:6144])
    spent: list[list[float]] = [[], [], [], []]
    for number in range(BATCHES):
        for transaction in range(batch):
            if large:
                channel_type, head, packet = 9, ranges, nvsp(107, 0, 0xFFFFFFFF, 0)
            else:
                channel_type, head, packet = 6, b"", nvsp(107, 0, 0, len(message))
            assert driver.channel.write(
                packet,
                packet_type=channel_type,
                flags=1,
                transaction_id=number * batch + transaction + 1,
                header=head,
                signal=False,
            )
        started = time.thread_time()
        channel.process()
        spent[0].append(time.thread_time() - started)
        driver.read()
        assert sockets.drain() == batch and not driver.guest.faults
        pieces = [offload.pack(), out]
        started = time.thread_time()
        for _ in range(batch):
            os.writev(sockets.near.fileno(), pieces)
        spent[1].append(time.thread_time() - started)
        sockets.drain()

        sockets.fill(offload.pack() + back, batch)
        started = time.thread_time()
        driver.adapter.readable()
        spent[2].append(time.thread_time() - started)
        driver.read()
        assert len(driver.frames) == batch, len(driver.frames)
        driver.frames.clear()
        sockets.fill(offload.pack() + back, batch)
        views = [memoryview(bytearray(10)), sockets.buffer]
        started = time.thread_time()
        for _ in range(batch):
            os.readv(sockets.near.fileno(), views)
        spent[3].append(time.thread_time() - started)
    sent, write, received, read = (statistics.median(each) / batch for each in spent)
    return sent, write, received, read


def _merged(batch: int) -> tuple[float, float]:
    """Seconds a segment of 1,448 bytes, in a row and one by one, and ``readv`` of the same."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from simulated.frames import tcp
    from simulated.netvsc import MAC, PEER, NetvscDriver

    driver, sockets = NetvscDriver(sections=256), _Sockets()
    driver.adapter.wire = sockets.wire
    driver.start()
    payload = os.urandom(1448)
    frames = [
        frame.NO_OFFLOAD + tcp(payload, sequence=1 + 1448 * number, flags=0x10, to=MAC, sender=PEER)
        for number in range(batch)
    ]
    spent: list[float] = []
    bare: list[float] = []
    views = [memoryview(bytearray(10)), sockets.buffer]
    for _ in range(BATCHES):
        for each in frames:
            sockets.far.send(each)
        started = time.thread_time()
        driver.adapter.readable()
        spent.append(time.thread_time() - started)
        driver.read()
        assert len(driver.frames) <= -(-batch // 32), len(driver.frames)
        driver.frames.clear()
        for each in frames:
            sockets.far.send(each)
        started = time.thread_time()
        for _ in frames:
            os.readv(sockets.near.fileno(), views)
        bare.append(time.thread_time() - started)
    return statistics.median(spent) / batch, statistics.median(bare) / batch


def _switched(size: int, batch: int) -> tuple[float, float]:
    """Seconds a frame from one port of a switch to another, and ``readv`` with ``writev``."""
    from hvhost.machine.loop import Loop
    from hvhost.network.switch import PortSettings
    from hvhost.network.switch_client import SwitchConfig
    from hvhost.network.switch_process import SwitchProcess
    from hvhost.network.uplinks import Cable

    one, two = _Sockets(), _Sockets()
    loop = Loop()
    first, second = bytes((2, 0, 0, 0, 0, 1)), bytes((2, 0, 0, 0, 0, 2))
    with tempfile.TemporaryDirectory() as directory:
        switch = SwitchProcess(Path(directory), SwitchConfig("bench", None), loop)
        for sockets in (one, two):

            def cable(*callbacks: Callable[[], None], near: int = sockets.near.detach()) -> Cable:
                readable, writable, gone = callbacks
                wire = DescriptorWire(near, loop, readable=readable, writable=writable, gone=gone)
                return Cable(wire, wire.close)

            switch._plug(PortSettings("port"), 0, cable)
        body = b"\x12\x34" + bytes(size - 14)
        two.far.send(frame.NO_OFFLOAD + b"\xff" * 6 + second + body)
        switch._read(1)
        one.drain()
        spent: list[float] = []
        bare: list[float] = []
        data = frame.NO_OFFLOAD + second + first + body
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for _ in range(BATCHES):
            one.fill(data, batch)
            started = time.thread_time()
            switch._read(0)
            spent.append((time.thread_time() - started) / batch)
            assert two.drain() == batch
            for _ in range(batch):
                far.send(data)
                started = time.thread_time()
                length = os.readv(near.fileno(), [one.buffer])
                os.writev(near.fileno(), [one.buffer[:length]])
                bare.append(time.thread_time() - started)
                os.readv(far.fileno(), [one.buffer])
        switch.close()
    near.close()
    far.close()
    return statistics.median(spent), statistics.median(bare)


def _idle() -> float:
    """How often in a second a switch's process wakes up while its two ports say nothing."""
    from hvhost.network import switch_client
    from hvhost.network.config import parse_adapter

    name = "bench-idle"
    switch_client.start(switch_client.SwitchConfig(name, None))
    ports = []
    try:
        for number in range(2):
            config = parse_adapter(f"switch:{name}", name=f"net{number}")
            ports.append(switch_client.join(config, "bench"))
        pid = int(switch_client.info(name)["pid"])
        time.sleep(1.0)
        return wake_ups_a_second(pid, IDLE_SECONDS)
    finally:
        for port in ports:
            os.close(port)
        switch_client.stop(name)


def network(rounds: int) -> list[Measurement]:
    """Frames of 64 and 1,514 bytes, and segments of 64 KiB, through an adapter, both ways."""
    del rounds
    figures = []
    for size, batch, name in ((64, BATCH, "64 B"), (1514, BATCH, "1,514 B")):
        sent, write, received, read = _measure(size, batch)
        figures += [
            Measurement("network", f"{name} sent", sent * 1e6, "µs", "writev", write * 1e6),
            Measurement("network", f"{name} received", received * 1e6, "µs", "readv", read * 1e6),
            Measurement("network", f"{name} sent, a second", 1 / sent, "/s", "writev", 1 / write),
            Measurement(
                "network", f"{name} received, a second", 1 / received, "/s", "readv", 1 / read
            ),
        ]
    merged, read = _merged(BATCH)
    figures.append(
        Measurement("network", "1,448 B merged, each", merged * 1e6, "µs", "readv", read * 1e6)
    )
    for size, batch, name in ((64, BATCH, "64 B"), (1514, BATCH, "1,514 B"), (65_000, 3, "64 KiB")):
        switched, bare = _switched(size, batch)
        figures.append(
            Measurement(
                "network", f"{name} through a switch", switched * 1e6, "µs", "readv, writev",
                bare * 1e6,
            )
        )  # fmt: skip
    size = 65_000
    sent, write, received, read = _measure(size, LARGE_BATCH)
    gigabits = size * 8 / 1e9
    figures += [
        Measurement(
            "network", "64 KiB sent", gigabits / sent, "Gbit/s", "writev", gigabits / write
        ),
        Measurement(
            "network", "64 KiB received", gigabits / received, "Gbit/s", "readv", gigabits / read
        ),
    ]
    figures.append(Measurement("network", "wake-ups of an idle switch", _idle(), "/s"))
    return figures
