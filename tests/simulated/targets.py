"""What the fuzzers run: bytes in, and nothing but a protocol error may come out.

``fuzz/*.py`` feeds these with atheris; the unit tests feed them with hypothesis, so that they are
exercised without it too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from ipaddress import IPv4Interface
from typing import Final

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.memory.area import HotAddArea
from hvhost.memory.device import MemoryDevice, Work
from hvhost.memory.protocol import PageRange
from hvhost.memory.protocol import decode as decode_memory
from hvhost.network.frame import segments, unpack_offload
from hvhost.network.leases import Leases, resolve
from hvhost.network.rndis import decode_packet
from hvhost.services.filecopy import Copy, FileCopy
from hvhost.services.filecopy_protocol import CopyFlags, parse_target
from hvhost.services.heartbeat import Heartbeat
from hvhost.services.kvp import Content, Kvp, KvpAnswer
from hvhost.services.kvp_protocol import (
    KvpItem,
    KvpOperation,
    enumerate_message,
    get_message,
    ip_message,
    parse_enumerate,
    parse_get,
    parse_ip,
)
from hvhost.services.shutdown import Shutdown
from hvhost.services.timesync import TimeSync
from hvhost.services.timesync_protocol import TimeSample
from hvhost.services.vss import Vss
from hvhost.services.vss_protocol import VssOperation
from hvhost.sockets.device import SocketDevice
from hvhost.sockets.protocol import (
    HVS_MTU_SIZE,
    decode_data,
    offer_to_guest,
    parse_connect_line,
    service_id,
)
from hvhost.vmbus.gpadl import parse_ranges
from hvhost.vmbus.protocol import InitiateContact, RequestOffers, decode, encode
from hvhost.wire import Buffer
from simulated.devices import Echo, an_offer
from simulated.driver import GuestService, SimulatedGuest
from simulated.frames import tcp
from simulated.netvsc import MAC, PEER, NetvscDriver


def pieces_of(data: bytes) -> list[bytes]:
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
    for piece in pieces_of(bytes(data)):
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


#: What of an answer is parsed: an item counted, one named, an adapter's addresses.
_KVP_REQUESTS: Final[tuple[tuple[bytes, Callable[[bytes], Content]], ...]] = (
    (enumerate_message(KvpPool.GUEST, 0), parse_enumerate),
    (get_message(KvpPool.GUEST, "a"), parse_get),
    (ip_message(KvpOperation.GET_IP_INFO, IpSettings("a")), parse_ip),
)
_LONGEST_KVP: Final = max(len(body) for body, _ in _KVP_REQUESTS)


def fuzz_services(data: Buffer) -> None:
    """Pieces of *data* as packets to all services, before and after negotiation.

    Half of the time a piece is given the type that the service wants and a transaction that is
    under way: little would get past the first checks otherwise.
    """
    guest = SimulatedGuest(pages=96)
    heartbeat, shutdown = Heartbeat(), Shutdown()
    timesync = TimeSync(lambda: TimeSample(1, 2))
    kvp = Kvp([(KvpPool.AUTO_EXTERNAL, KvpItem("a", "b"))])
    devices: list[Heartbeat | Shutdown | TimeSync | Kvp] = [heartbeat, shutdown, timesync, kvp]
    for device in devices:
        guest.server.add_device(device)
    guest.connect()
    channels = [guest.open(relid) for relid in range(1, len(devices) + 1)]
    first = data[0] if data else 0
    asked = 0
    answers: list[KvpAnswer | HvHostError] = []
    if first & 1:
        for channel in channels:
            GuestService(channel, [(4, 0), (3, 0)]).run()
        assert all(device.ready for device in devices)
    for number, piece in enumerate(pieces_of(bytes(data[1:]))):
        for device, channel, kind in zip(devices, channels, (1, 3, 4, 2), strict=True):
            channel.read()
            unanswered = device.state.conversation.unanswered
            if first & 2 and len(piece) >= 26 and unanswered:
                message = bytearray(piece)
                struct.pack_into("<H", message, 12, kind)
                struct.pack_into("<BB", message, 24, min(unanswered), 5)
                if kind == 2 and first & 4:  # long enough to be an item, or an adapter's addresses
                    message = message.ljust(28 + _LONGEST_KVP, b"\xa5")
                    struct.pack_into("<H", message, 18, _LONGEST_KVP)
                channel.write(bytes(message))
            else:
                channel.write(piece)
        heartbeat.tick(1.0)
        timesync.tick(6.0 * number)
        kvp.tick(40.0 * number)
        with suppress(HvHostError):
            body, parse = _KVP_REQUESTS[number % 3]
            kvp.request(body, answers.append, parse)
            asked += 1
    assert len(guest.faults) <= len(devices)
    guest.server.reset()
    assert len(answers) == asked
    for answer in answers:
        if isinstance(answer, KvpAnswer) and answer.content is not None:
            texts = [text for text in asdict(answer.content).values() if isinstance(text, str)]
            assert all(len(text) <= 1024 and "\0" not in text for text in texts)


def fuzz_filecopy(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets while a file is copied to it.

    The first byte chooses: negotiated before (1); pieces made answers to what was asked (2).
    """
    guest = SimulatedGuest(pages=32)
    device = FileCopy()
    guest.server.add_device(device)
    guest.connect()
    channel = guest.open(1)
    first = data[0] if data else 0
    ends: list[HvHostError | None] = []
    if first & 1:
        GuestService(channel, [(1, 1)]).run()
        assert device.ready
        target = parse_target("/a/b", "b")
        device.start(Copy(target, CopyFlags(0), 20_000, lambda offset, n: bytes(n), ends.append))
    for number, piece in enumerate(pieces_of(bytes(data[1:]))):
        channel.read()
        unanswered = device.state.conversation.unanswered
        if first & 2 and len(piece) >= 26 and unanswered:
            message = bytearray(piece)
            struct.pack_into("<H", message, 12, 7)
            struct.pack_into("<BB", message, 24, min(unanswered), 5)
            piece = bytes(message)
        channel.write(piece)
        device.tick(15.0 * number)
        if number == 5:
            device.cancel()
    guest.server.reset()
    assert len(ends) == (first & 1) and device.copy is None
    assert len(guest.faults) <= 1


def fuzz_vss(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets while its snapshots are asked for.

    The first byte chooses: negotiated before (1); pieces made answers to what was asked (2); who
    asks waits for no answer to every other request (4).
    """
    guest = SimulatedGuest(pages=32)
    device = Vss()
    guest.server.add_device(device)
    guest.connect()
    channel = guest.open(1)
    first = data[0] if data else 0
    if first & 1:
        GuestService(channel, [(5, 0)]).run()
        assert device.ready
    asked, ends = 0, 0

    def done(result: object) -> None:
        nonlocal ends
        ends += 1

    for number, piece in enumerate(pieces_of(bytes(data[1:]))):
        with suppress(HvHostError):
            device.request(tuple(VssOperation)[number % 3], done)
            asked += 1
            if first & 4 and number % 2:
                device.abandon(done)
        channel.read()
        unanswered = device.state.conversation.unanswered
        if first & 2 and len(piece) >= 26 and unanswered:
            message = bytearray(piece)
            struct.pack_into("<H", message, 12, 5)
            struct.pack_into("<BB", message, 24, min(unanswered), 5)
            piece = bytes(message)
        channel.write(piece)
        device.tick(25.0 * number)
    guest.server.reset()
    assert ends <= asked if first & 4 else ends == asked
    assert device.state.asked is None
    assert len(guest.faults) <= 1


def fuzz_memory(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets to the dynamic memory device, which asks for things.

    The first byte chooses: negotiated before (1); pieces made answers to what was asked (2).
    """
    raw = bytes(data)
    with suppress(RemoteProtocolError):
        decode_memory(raw)
    released: set[int] = set()

    class Ram:
        """Knows which pages the guest has, and that none comes twice without being returned."""

        def is_ram(self, pages: PageRange) -> bool:
            return pages.end <= 4096

        def release(self, pages: PageRange) -> None:
            assert 0 <= pages.start < pages.end <= 4096
            released.update(range(pages.start, pages.end))

    guest = SimulatedGuest(pages=32)
    device = MemoryDevice(HotAddArea(1 << 20, 1 << 21), 1 << 22, Ram())
    guest.server.add_device(device)
    guest.connect()
    channel = guest.open(1)
    first = raw[0] if raw else 0
    if first & 1:
        channel.write(struct.pack("<HHIII", 1, 16, 1, 0x20000, 0))
        channel.write(struct.pack("<HHIQQQ", 3, 32, 2, 3 | 7 << 2, 0, 0))
        assert device.idle
    for number, piece in enumerate(pieces_of(raw[1:])):
        if device.idle:
            offer = device.next_range(1000 * number + 1)
            if number % 3 == 0:
                device.balloon(100 + number)
            elif number % 3 == 1 and device.state.balloon.count:
                device.unballoon(50)
            elif offer is not None:
                device.hot_add(*offer)
        if first & 2:
            kind = {Work.BALLOON: 7, Work.UNBALLOON: 9, Work.HOT_ADD: 11}.get(device.state.work, 5)
            piece = struct.pack("<HHI", kind, 8 + len(piece), number) + piece
        channel.write(piece)
        channel.read()
        state = device.state
        assert state.balloon.count == sum(state.balloon.marks) <= len(released)
        assert state.area.start <= state.area.covered <= state.area.end
        assert state.added <= state.area.covered - state.area.start
    guest.server.reset()
    assert not device.ready and len(guest.faults) <= 1


def fuzz_sockets(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets on a socket connection; as connect lines, too."""
    raw = bytes(data)
    for parse in (decode_data, parse_connect_line):
        with suppress(HvHostError):
            parse(raw)

    class Sink:
        """Keeps what a guest sends; never wants more than it was promised."""

        received_bytes = 0
        over = 0

        def connected(self) -> None: ...

        def received(self, data: bytes) -> None:
            assert 0 < len(data) <= HVS_MTU_SIZE
            self.received_bytes += len(data)

        def finished(self) -> None: ...

        def settle(self) -> None:
            if device.writable:
                device.send(b"x" * device.data_size)

        def disconnected(self) -> None:
            self.over += 1

    guest = SimulatedGuest(pages=32)
    sink = Sink()
    device = SocketDevice(offer_to_guest(service_id(1), service_id(2)), sink)
    guest.server.add_device(device)
    guest.connect()
    channel = guest.open(1, out_pages=3, in_pages=3)
    for number, piece in enumerate(pieces_of(raw)):
        if number % 2:
            channel.read()
        channel.write(piece)
        channel.signal()
        device.paused = number % 3 == 1
    guest.server.reset()
    assert sink.over == 1 and len(guest.faults) <= 1


#: An offload header (its sum is still to be made) and a segment worth merging; the start of a
#: DHCP message, up to its options.
_SEGMENT = bytes((1, 0, 0, 0, 0, 0, 34, 0, 16, 0)) + tcp(
    bytes(600), flags=0x10, to=MAC, sender=PEER
)
_DHCP = bytes((1, 1, 6)).ljust(236, b"\0") + bytes((99, 130, 83, 99, 53, 1, 3))


def fuzz_network(data: Buffer) -> None:
    """Pieces of *data* as a guest's packets to its network adapter, ready or not.

    The first byte chooses: started before (1); pieces made RNDIS frames (2) or requests (4); frames
    of the wire in between (8), which are pieces of segments that could be merged (16). The same
    bytes are a client's messages to the servers of a network.
    """
    raw = bytes(data)
    first = raw[0] if raw else 0
    driver = NetvscDriver(queues=2)
    if first & 1:
        driver.start()
    else:
        driver.open()
    for number, piece in enumerate(pieces_of(raw[1:])):
        if driver.guest.faults:
            break
        if first & 1 and first & 2 and number % 2:
            driver.send(piece, section=number % 4)
        elif first & 1 and first & 4:
            driver.send_control(piece)
        else:
            kinds = (6, 9, 11, 7)
            driver.channel.write(
                piece, packet_type=kinds[number % 4], header=bytes(8) if number % 4 else b""
            )
        if first & 8:
            rest = b"" if first & 16 == 0 else _SEGMENT[len(piece) :]
            driver.wire.incoming.extend([piece + rest] * (1 + (first & 16 != 0)))
            driver.adapter.readable()
        for packet in driver.channel.read():
            assert packet.type in (6, 7, 11)
    driver.guest.server.reset()
    assert len(driver.guest.faults) <= 1
    with suppress(HvHostError):
        decode_packet(raw, len(raw))
    for segment in segments(raw[10:], unpack_offload(raw.ljust(10, b"\0"))):
        assert len(segment) <= len(raw)
    leases = Leases(IPv4Interface("192.0.2.1/29"))
    for piece in (raw, _DHCP + raw):
        leases.answer(piece)
        answer = resolve(piece, leases.names)
        assert answer is None or len(answer) <= len(piece) + 16
