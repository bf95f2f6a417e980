"""The process of one switch: ``python -m hvhost.network.switch_process DIRECTORY``.

Adapters of machines, captures and questions come in over one socket of messages; the first message
says what a connection is for (:mod:`hvhost.network.switch_client`). Frames are read into one piece
of memory and written from there to whom they go; what a port does not take at once waits, up to a
bound.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import frame
from hvhost.network.config import AdapterConfig, Uplink
from hvhost.network.nat import NatWire
from hvhost.network.switch import (
    ADDRESS_LIMIT,
    ALL_VLANS,
    UPLINK_ADDRESS_LIMIT,
    Decision,
    PortSettings,
    Switch,
    TokenBucket,
)
from hvhost.network.switch_client import (
    CAPTURE_HEADER,
    SOCKET_NAME,
    Hello,
    SwitchConfig,
    decode_hello,
)
from hvhost.network.uplinks import Cable, plug_in
from hvhost.network.wires import DescriptorWire, enlarge
from hvhost.process import log_to_stderr

logger = logging.getLogger(__name__)

#: Frames that may wait for one port.
QUEUE_LIMIT: Final = 512
#: Frames taken from one port before the others get their turn.
FRAMES_PER_TURN: Final = 64
MAXIMUM_PORTS: Final = 256
_HELLO_LIMIT = 16384
_RATE_BURST_SECONDS = 0.05
_CSUM_START = struct.Struct("<H")


@dataclass
class Port:
    """One port at work."""

    settings: PortSettings
    cable: Cable
    bucket: TokenBucket | None = None
    queue: deque[bytearray] = field(default_factory=deque)
    held: bool = False
    received: int = 0
    sent: int = 0
    dropped: int = 0


class SwitchProcess:
    """The switch and its connections, on one loop's thread."""

    def __init__(self, directory: Path, config: SwitchConfig, loop: Loop) -> None:
        self._directory, self._config, self._loop = directory, config, loop
        self._switch = Switch()
        self._ports: dict[int, Port] = {}
        self._captures: dict[int, tuple[socket.socket, str]] = {}
        self._next = 0
        self._nat: NatWire | None = None
        self._header = memoryview(bytearray(frame.VIRTIO_NET_HDR_SIZE))
        self._frame = memoryview(bytearray(frame.FRAME_LIMIT))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = directory / SOCKET_NAME
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        self._listener.setblocking(False)
        loop.add_reader(self._listener.fileno(), self._accept)
        if config.uplink is not None:
            uplink = config.uplink
            cable = self._uplink(uplink)
            self._plug(uplink_port(uplink), uplink.rate, cable, UPLINK_ADDRESS_LIMIT)

    def close(self) -> None:
        for port in self._ports.values():
            port.cable.close()
        for stream, _ in self._captures.values():
            stream.close()
        self._listener.close()
        (self._directory / SOCKET_NAME).unlink(missing_ok=True)

    # Connections.

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError:
            return
        stream.setblocking(False)
        self._loop.add_reader(stream.fileno(), lambda: self._hello(stream))

    def _hello(self, stream: socket.socket) -> None:
        self._loop.remove(stream.fileno())
        descriptors: list[int] = []
        try:
            message, descriptors, _, _ = socket.recv_fds(stream, _HELLO_LIMIT, 1)
            hello = decode_hello(message)
            if (hello.purpose == "tap") != bool(descriptors):
                raise HvHostError("a descriptor comes with a tap, and with nothing else.")
            answer = self._take(hello, stream, descriptors)
        except (HvHostError, OSError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            with contextlib.suppress(OSError):
                stream.send(json.dumps({"error": str(error)}).encode())
            stream.close()
            return
        if answer is not None:
            with contextlib.suppress(OSError):
                stream.send(json.dumps(answer).encode())
            stream.close()

    def _take(
        self, hello: Hello, stream: socket.socket, descriptors: list[int]
    ) -> dict[str, Any] | None:
        if hello.purpose == "info":
            return self._info()
        if hello.purpose == "capture":
            stream.send(b"{}")
            enlarge(stream)
            self._captures[stream.fileno()] = stream, hello.name
            self._loop.watch(
                stream.fileno(), lambda: self._end_capture(stream), read=True, write=False
            )
            return None
        if len(self._ports) >= MAXIMUM_PORTS:
            raise HvHostError(f"the switch has {MAXIMUM_PORTS} ports, and all are taken.")
        settings = PortSettings(hello.name, hello.vlan, frozenset(hello.trunk), hello.isolated)
        if descriptors:
            descriptor = descriptors.pop()
        else:
            stream.send(b"{}")
            enlarge(stream)
            descriptor = stream.detach()

        def cable(*callbacks: Callable[[], None]) -> Cable:
            readable, writable, gone = callbacks
            wire = DescriptorWire(
                descriptor, self._loop, readable=readable, writable=writable, gone=gone
            )
            return Cable(wire, wire.close)

        self._plug(settings, hello.rate, cable)
        return {} if hello.purpose == "tap" else None

    def _uplink(self, config: AdapterConfig) -> Callable[..., Cable]:
        def cable(*callbacks: Callable[[], None]) -> Cable:
            readable, writable, gone = callbacks
            if config.uplink is Uplink.NAT:
                self._nat = NatWire(config, self._loop, readable=readable)
                return Cable(self._nat, self._nat.close)
            return plug_in(
                config,
                self._loop,
                self._directory,
                readable=readable,
                writable=writable,
                gone=gone,
            )

        return cable

    def _plug(
        self,
        settings: PortSettings,
        rate: int,
        cable: Callable[..., Cable],
        addresses: int = ADDRESS_LIMIT,
    ) -> None:
        number = self._next
        self._next += 1
        made = cable(
            lambda: self._read(number), lambda: self._drain(number), lambda: self._gone(number)
        )
        bytes_a_second = rate * 125_000.0
        bucket = None
        if rate:
            burst = max(bytes_a_second * _RATE_BURST_SECONDS, frame.FRAME_LIMIT)
            bucket = TokenBucket(bytes_a_second, burst)
        self._ports[number] = Port(settings, made, bucket)
        self._switch.add_port(number, settings, addresses)
        made.wire.watch(read=True, write=False)
        logger.info("port %d: %s", number, settings.name)

    def _gone(self, number: int) -> None:
        port = self._ports.pop(number, None)
        if port is not None:
            self._switch.remove_port(number)
            port.cable.close()
            logger.info("port %d: %s is gone", number, port.settings.name)

    # Frames.

    def _read(self, number: int) -> None:
        port = self._ports[number]
        wire, buffers = port.cable.wire, [self._header, self._frame]
        for _ in range(FRAMES_PER_TURN):
            size = wire.receive_into(buffers) - len(self._header)
            if size <= 0:
                return
            port.received += 1
            now = time.monotonic()
            head = bytes(self._frame[:18])
            decision = self._switch.forward(number, head[: min(size, 18)], now)
            if decision.plain or decision.tagged:
                self._forward(decision, head, size)
            if self._captures:
                self._mirror(port.settings.name, size)
            if port.bucket is not None and (wait := port.bucket.spend(size, now)):
                self._hold(number, wait)
                return
        # Some wires hold frames that no poll tells of.
        self._loop.call_soon_threadsafe(lambda: self._read_more(number))

    def _read_more(self, number: int) -> None:
        port = self._ports.get(number)
        if port is not None and not port.held:
            self._read(number)

    def _forward(self, decision: Decision, head: bytes, size: int) -> None:
        body = self._frame[:size]
        same: list[Any] = [self._header, body]
        moved = frame.TAG_SIZE if decision.was_tagged else 0
        if decision.plain:
            plain = same
            if moved:
                plain = [self._shifted(-moved), head[:12], body[16:]]
            for target in decision.plain:
                self._send(target, plain)
        if decision.tagged:
            tag = frame.ETHERTYPE_TAG + decision.tag.to_bytes(2, "big")
            if moved:
                tagged = [self._header, head[:12], tag, body[16:]]
            else:
                tagged = [self._shifted(frame.TAG_SIZE), head[:12], tag, body[12:]]
            for target in decision.tagged:
                self._send(target, tagged)

    def _shifted(self, by: int) -> bytes:
        """The offload header for a frame whose headers moved *by* bytes."""
        offload = frame.unpack_offload(self._header)
        return offload._replace(
            csum_start=max(0, offload.csum_start + by) if offload.csum_start else 0,
            hdr_len=max(0, offload.hdr_len + by) if offload.hdr_len else 0,
        ).pack()

    def _send(self, number: int, buffers: list[Any]) -> None:
        port = self._ports.get(number)
        if port is None:
            return
        if not port.queue and port.cable.wire.send(buffers):
            port.sent += 1
        elif len(port.queue) < QUEUE_LIMIT:
            port.queue.append(bytearray().join(buffers))
            self._watch(port)
        else:
            port.dropped += 1

    def _drain(self, number: int) -> None:
        port = self._ports[number]
        while port.queue:
            if not port.cable.wire.send([port.queue[0]]):
                break
            port.queue.popleft()
            port.sent += 1
        self._watch(port)

    def _hold(self, number: int, seconds: float) -> None:
        """A port has used up its rate: it is read again when there is some."""
        port = self._ports[number]
        port.held = True
        self._watch(port)

        def release() -> None:
            if self._ports.get(number) is port:
                port.held = False
                self._watch(port)
                self._read_more(number)  # some wires hold frames that no poll tells of

        self._loop.call_later(seconds, release)

    def _watch(self, port: Port) -> None:
        port.cable.wire.watch(read=not port.held, write=bool(port.queue))

    # Captures.

    def _mirror(self, name: str, size: int) -> None:
        stamp = CAPTURE_HEADER.pack(time.time_ns(), size)
        for stream, wanted in list(self._captures.values()):
            if wanted in ("", name):
                with contextlib.suppress(OSError):  # a slow one misses frames
                    stream.sendmsg([stamp, self._frame[:size]])

    def _end_capture(self, stream: socket.socket) -> None:
        self._captures.pop(stream.fileno(), None)
        self._loop.remove(stream.fileno())
        stream.close()

    def _info(self) -> dict[str, Any]:
        known = self._switch.addresses
        return {
            "name": self._config.name,
            "pid": os.getpid(),
            "uplink": "" if self._config.uplink is None else str(self._config.uplink.uplink),
            "namespace_pid": max(
                (port.cable.namespace_pid for port in self._ports.values()), default=0
            ),
            "leases": {} if self._nat is None else self._nat.leases,
            "flooded": self._switch.flooded,
            "suppressed": self._switch.suppressed,
            "ports": [
                {
                    "name": port.settings.name,
                    "vlan": port.settings.vlan,
                    "trunk": [] if _is_open(port.settings) else sorted(port.settings.trunk),
                    "isolated": port.settings.isolated,
                    "received": port.received,
                    "sent": port.sent,
                    "dropped": port.dropped,
                    "addresses": [mac.hex(":") for (_, mac), at in known.items() if at == number],
                }
                for number, port in self._ports.items()
            ],
        }


def uplink_port(config: AdapterConfig) -> PortSettings:
    """The port of an uplink: of all VLANs, unless it is told those that it is in."""
    trunk = frozenset(config.trunk) if config.vlan or config.trunk else ALL_VLANS
    return PortSettings("uplink", config.vlan, trunk, config.isolated)


def _is_open(port: PortSettings) -> bool:
    """An uplink that was told no VLANs; listing them all would say little."""
    return port.name == "uplink" and port.trunk == ALL_VLANS


def main() -> int:
    """A switch's process: the argument is its directory; its end is the switch's."""
    directory = Path(sys.argv[1])
    log_to_stderr()
    loop = Loop()
    try:
        switch = SwitchProcess(directory, SwitchConfig.load(directory), loop)
    except (HvHostError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.stop())
    (directory / "pid").write_text(f"{os.getpid()}\n")
    print("ready", flush=True)
    try:
        loop.run()
    finally:
        switch.close()
        (directory / "pid").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
