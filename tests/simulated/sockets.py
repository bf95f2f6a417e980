"""A machine's socket bridge with a simulated guest behind it, and a loop that tests step."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import uuid
from pathlib import Path

from hvhost.machine.loop import Loop
from hvhost.sockets.bridge import SocketBridge
from hvhost.sockets.protocol import SRV_ID_TEMPLATE, connect_line, listen_name, service_id
from hvhost.vmbus.protocol import OfferChannel, TlConnectRequest
from simulated.driver import GuestChannel, SimulatedGuest

FROM_HOST = 4  # byte of user_def that tells who connects


def data_packet(data: bytes) -> bytes:
    """Written out here once more, from ``hyperv_transport.c``."""
    return struct.pack("<II", 1, len(data)) + data


class GuestSocket:
    """A connected socket of the guest, as ``hyperv_transport.c`` does it."""

    def __init__(self, channel: GuestChannel) -> None:
        self.channel = channel
        self.ended = False  # the host sent its FIN

    def send(self, data: bytes) -> int:
        """Bytes that went into the ring."""
        sent = 0
        while sent < len(data):
            part = data[sent : sent + 4088]
            if not self.channel.write(data_packet(part)):
                self.channel.wait_for_room(4120)
                break
            sent += len(part)
        return sent

    def finish(self) -> None:
        assert self.channel.write(data_packet(b""))

    def receive(self, limit: int = 1 << 30) -> bytes:
        out = bytearray()
        for packet in self.channel.read(limit):
            assert packet.type == 6
            assert not self.ended
            kind, size = struct.unpack_from("<II", packet.payload)
            assert kind == 1 and size <= 16384
            out += packet.payload[8 : 8 + size]
            self.ended = not size
        return bytes(out)


class SocketHost:
    """The bridge of one machine in *directory*."""

    def __init__(self, directory: Path, *, version: int = 0x50003, pages: int = 512) -> None:
        self.directory = directory
        self.loop = Loop()
        self.bridge = SocketBridge(directory, self.loop, accept_seconds=60.0, linger_seconds=0.05)
        self.bridge.open()
        self.guest = SimulatedGuest(pages=pages)
        self.lock = threading.RLock()
        self.bridge.attach(self.guest.server, self.lock)
        self._ports = itertools.count(2000)
        if version:
            self.guest.connect(version)

    def run(self, seconds: float = 0.0) -> None:
        """Let the loop do all there is to do, and go on for *seconds*."""
        for _ in range(6):
            self.loop.call_soon_threadsafe(lambda: self.loop.call_soon_threadsafe(self.loop.stop))
            self.loop.run()
        if seconds:
            self.loop.call_later(seconds, self.loop.stop)
            self.loop.run()

    def close(self) -> None:
        self.bridge.detach()
        self.bridge.close()
        self.loop.close()

    # On the host.

    def listen(self, service: int | uuid.UUID) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.directory / listen_name(service_id(service))))
        listener.listen(64)
        listener.settimeout(5)
        return listener

    def dial(self, line: bytes) -> socket.socket:
        program = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        program.settimeout(5)
        program.connect(str(self.directory / "vsock.sock"))
        program.sendall(line)
        self.run()
        return program

    # In the guest.

    def new_offers(self) -> list[OfferChannel]:
        known = set(self.guest.offers)
        self.guest.collect_offers()
        return [offer for relid, offer in self.guest.offers.items() if relid not in known]

    def accept(self, *, pages: int = 7) -> GuestSocket:
        """Open the one channel that was offered."""
        (offer,) = self.new_offers()
        return self.open(offer, pages=pages)

    def open(self, offer: OfferChannel, *, pages: int = 7) -> GuestSocket:
        return GuestSocket(
            self.guest.open(offer.child_relid, out_pages=pages, in_pages=pages, scattered=False)
        )

    def request(self, service: int | uuid.UUID, endpoint: uuid.UUID | None = None) -> uuid.UUID:
        """The guest asks for a connection; the endpoint it uses."""
        endpoint = endpoint or service_id(next(self._ports))
        self.guest.post(TlConnectRequest(endpoint, service_id(service)))
        return endpoint

    # Both, connected.

    def guest_to_host(self, service: int | uuid.UUID = 5000) -> tuple[GuestSocket, socket.socket]:
        with self.listen(service) as listener:
            self.request(service)
            program, _ = listener.accept()
            (self.directory / listen_name(service_id(service))).unlink()
        program.settimeout(5)
        guest = self.accept()
        self.run()
        return guest, program

    def host_to_guest(self, service: int | uuid.UUID = 6000) -> tuple[GuestSocket, socket.socket]:
        program = self.dial(connect_line(service_id(service)))
        guest = self.accept()
        self.run()
        assert program.recv(100).startswith(b"OK ")
        return guest, program


__all__ = ["FROM_HOST", "SRV_ID_TEMPLATE", "GuestSocket", "SocketHost", "data_packet"]
