"""What the fuzzers run: bytes in, and nothing but a protocol error may come out.

``fuzz/*.py`` feeds these with atheris; the unit tests feed them with hypothesis, so that they are
exercised without it too.
"""

from __future__ import annotations

import struct
from contextlib import suppress

from hvhost.errors import RemoteProtocolError
from hvhost.services.heartbeat import Heartbeat
from hvhost.services.shutdown import Shutdown
from hvhost.vmbus.gpadl import parse_ranges
from hvhost.vmbus.protocol import InitiateContact, RequestOffers, decode, encode
from hvhost.wire import Buffer
from simulated.devices import Echo, an_offer
from simulated.driver import GuestService, SimulatedGuest


def _pieces(data: bytes) -> list[bytes]:
    """*data* as pieces, each led by its length in one byte."""
    pieces, position = [], 0
    while position < len(data):
        end = position + 1 + data[position]
        pieces.append(data[position + 1 : end])
        position = end
    return pieces


def fuzz_messages(data: Buffer) -> None:
    """Pieces of *data* as channel messages of a guest that has asked for offers."""
    guest = SimulatedGuest(pages=16)
    for number in (1, 2):
        guest.server.add_device(Echo(guest.memory, an_offer(number)))
    for first in (InitiateContact(0x50003, 0, 2, 0, 0), RequestOffers()):
        guest.server.post_message(4, encode(first))
    for piece in _pieces(bytes(data)):
        faults = len(guest.faults)
        assert guest.server.post_message(4, piece) in (0, 5)
        assert len(guest.faults) <= faults + 1
        for channel in guest.server.channels:
            channel.process()


def fuzz_decode(data: Buffer) -> None:
    """*data* as one message and as page ranges."""
    for parse in (decode, lambda whole: parse_ranges(whole[1:], whole[0] if whole else 0)):
        with suppress(RemoteProtocolError):
            parse(bytes(data))


def fuzz_ring(data: Buffer) -> None:
    """*data* as header words and contents of a ring from the guest, and as header of the other."""
    guest = SimulatedGuest(pages=24)
    host = guest.server.add_device(Echo(guest.memory))
    guest.connect()
    channel = guest.open(1, scattered=bool(data and data[0] & 1))
    words, contents = bytes(data[1:33]).ljust(32, b"\0"), bytes(data[33:8192])
    channel.out.put(0, contents + bytes(-len(contents) % 8))
    numbers = struct.unpack("<8I", words)
    # Small values are the interesting ones: half of the time, the ring's own range.
    fold = (channel.out.size + 16) if data and data[0] & 2 else 1 << 32
    for ring, values in ((channel.out, numbers[:4]), (channel.incoming, numbers[4:])):
        for number, value in zip((0, 1, 2, 3), values, strict=True):
            ring.set_word(number, value % fold & (~7 if data and data[0] & 4 else ~0))
    for _ in range(3):
        host.process()
        host.send(b"x" * 100)
    assert len(guest.faults) <= 1


def fuzz_services(data: Buffer) -> None:
    """Pieces of *data* as packets to both services, before and after negotiation."""
    guest = SimulatedGuest(pages=64)
    heartbeat, shutdown = Heartbeat(), Shutdown()
    for device in (heartbeat, shutdown):
        guest.server.add_device(device)
    guest.connect()
    channels = [guest.open(relid) for relid in (1, 2)]
    if data and data[0] & 1:
        for channel in channels:
            GuestService(channel, [(3, 0)]).run()
        assert heartbeat.ready and shutdown.ready
    for piece in _pieces(bytes(data[1:])):
        for channel in channels:
            channel.read()
            channel.write(piece)
        heartbeat.tick(1.0)
    assert len(guest.faults) <= 2
