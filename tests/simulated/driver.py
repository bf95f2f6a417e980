"""A guest's side of VMBus, in memory: what Linux's drivers do, and whatever a bad one may do.

The rings are written here a second time, byte by byte from the layout in ``linux/hyperv.h``, so
that a mistake in the host's code is not made twice. Nothing is asynchronous: messages and
interrupts of the host are kept until the guest looks at them.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from hvhost.partition.memory import PAGE_SIZE, GuestMemory, MemoryRegion
from hvhost.vmbus.channel import Channel, ChannelDevice
from hvhost.vmbus.gpadl import GpaRange, pack_ranges
from hvhost.vmbus.protocol import (
    AllOffersDelivered,
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    GuestMessage,
    HostMessage,
    InitiateContact,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    Unload,
    UnloadResponse,
    VersionResponse,
    decode,
    encode,
)
from hvhost.vmbus.saved import SavedBus
from hvhost.vmbus.server import VmbusServer

M = TypeVar("M")

VERSION_5_3 = 0x50003
HIGH_MEMORY = 1 << 32


@dataclass
class RecordingPort:
    """The hypervisor between bus and guest: remembers what the host did."""

    messages: list[tuple[int, HostMessage]] = field(default_factory=list)
    interrupts: list[tuple[int, int]] = field(default_factory=list)  # (vp, flag)
    connected: dict[int, Channel] = field(default_factory=dict)

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> None:
        assert (sint, message_type) == (2, 1)
        assert len(payload) <= 240
        message = decode(payload)
        self.messages.append((vp, message))  # type: ignore[arg-type] # hosts send these only

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        assert sint == 2
        self.interrupts.append((vp, flag))

    def connect_signal(self, connection_id: int, channel: Channel) -> None:
        assert connection_id not in self.connected
        self.connected[connection_id] = channel

    def disconnect_signal(self, connection_id: int) -> None:
        del self.connected[connection_id]


@dataclass
class GuestPacket:
    type: int
    flags: int
    transaction_id: int
    header: bytes
    payload: bytes


class GuestRing:
    """One direction, from the guest's side; pages may lie anywhere."""

    def __init__(self, memory: GuestMemory, pfns: Sequence[int]) -> None:
        self.memory, self.pfns = memory, list(pfns)
        self.size = (len(self.pfns) - 1) * PAGE_SIZE
        self.base = self.pfns[0] * PAGE_SIZE

    def word(self, number: int) -> int:
        return int.from_bytes(self.memory.read(self.base + 4 * number, 4), "little")

    def set_word(self, number: int, value: int) -> None:
        self.memory.write(self.base + 4 * number, value.to_bytes(4, "little"))

    def get(self, offset: int, length: int) -> bytes:
        out = bytearray()
        for address, size in self._pieces(offset, length):
            out += self.memory.read(address, size)
        return bytes(out)

    def put(self, offset: int, data: bytes) -> None:
        assert len(data) % 8 == 0
        done = 0
        for address, size in self._pieces(offset, len(data)):
            self.memory.write(address, data[done : done + size])
            done += size

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Addresses and sizes of a part of the ring, page by page."""
        while length:
            page, within = divmod(offset % self.size, PAGE_SIZE)
            size = min(length, PAGE_SIZE - within)
            yield self.pfns[1 + page] * PAGE_SIZE + within, size
            offset, length = offset + size, length - size

    @property
    def used(self) -> int:
        return (self.word(0) - self.word(1)) % self.size


@dataclass
class GuestChannel:
    """An opened channel: its rings as the driver sees them."""

    guest: SimulatedGuest
    offer: OfferChannel
    gpadl: int
    out: GuestRing
    incoming: GuestRing

    @property
    def pages(self) -> set[int]:
        return {*self.out.pfns, *self.incoming.pfns}

    def write(
        self,
        payload: bytes,
        *,
        packet_type: int = 6,
        flags: int = 0,
        transaction_id: int = 0,
        header: bytes = b"",
        signal: bool = True,
    ) -> bool:
        """As hv_ringbuffer_write(): false if full; signals only when the ring was empty."""
        padded = payload + bytes(-len(payload) % 8)
        offset8 = 2 + len(header) // 8
        descriptor = struct.pack(
            "<HHHHQ", packet_type, offset8, offset8 + len(padded) // 8, flags, transaction_id
        )
        return self.write_raw(descriptor + header + padded, signal=signal)

    def write_raw(self, packet: bytes, *, signal: bool = True) -> bool:
        ring, start = self.out, self.out.word(0)
        total = len(packet) + 8
        if ring.size - ring.used <= total:
            return False
        ring.put(start, packet + struct.pack("<II", 0, start))
        ring.set_word(0, (start + total) % ring.size)
        if signal and not ring.word(2) and start == ring.word(1):
            self.signal()
        return True

    def wait_for_room(self, size: int) -> None:
        """As a driver does whose write failed."""
        self.out.set_word(3, size)

    def signal(self) -> int:
        """hv_do_fast_hypercall8(HVCALL_SIGNAL_EVENT)."""
        return self.guest.server.signal(self.offer.connection_id)

    def read(self, limit: int = 1 << 30) -> list[GuestPacket]:
        """As the packet iterator of Linux, with its signal to a host that waits for room."""
        ring = self.incoming
        packets: list[GuestPacket] = []
        start = index = ring.word(1)
        while len(packets) < limit and index != ring.word(0):
            kind, offset8, length8, flags, transaction = struct.unpack(
                "<HHHHQ", ring.get(index, 16)
            )
            data = ring.get(index, length8 * 8)
            zero, previous = struct.unpack("<II", ring.get(index + length8 * 8, 8))
            assert (zero, previous) == (0, index)
            packets.append(
                GuestPacket(kind, flags, transaction, data[16 : offset8 * 8], data[offset8 * 8 :])
            )
            index = (index + length8 * 8 + 8) % ring.size
        before = ring.size - ring.used
        ring.set_word(1, index)
        after = ring.size - ring.used
        assert start == index or after > before
        if ring.word(16) & 1 and (pending := ring.word(3)) and before <= pending < after:
            self.signal()
        return packets


class SimulatedGuest:
    """A guest with low and high RAM, a page allocator and the channel protocol of Linux.

    Each page it lends to the host is remembered; :meth:`check_memory` fails if the host wrote
    anywhere else. *backing* is memory for it, twice *pages*, which others may share.
    """

    def __init__(
        self, *, pages: int = 256, processors: int = 2, backing: memoryview | None = None
    ) -> None:
        size = pages * PAGE_SIZE
        self.low, self.high = bytearray(size), bytearray(size)
        low, high = memoryview(self.low), memoryview(self.high)
        if backing is not None:
            low, high = backing[:size], backing[size:]
        self.memory = GuestMemory(
            [MemoryRegion(0, low), MemoryRegion(HIGH_MEMORY, high, size)],
        )
        self.port = RecordingPort()
        self.events: list[tuple[str, str]] = []
        self.server = VmbusServer(
            self.memory,
            self.port,
            on_event=lambda kind, detail: self.events.append((kind, detail)),
            processors=processors,
        )
        self.processors = processors
        self.offers: dict[int, OfferChannel] = {}
        self.open_channels: dict[int, GuestChannel] = {}
        self._free = [
            *range(1, pages),
            *range(HIGH_MEMORY // PAGE_SIZE, (HIGH_MEMORY >> 12) + pages),
        ]
        self._next_gpadl = 0xE1E10
        self._seen = 0

    def move_to_another_host(self, devices: Callable[[GuestMemory], list[ChannelDevice]]) -> None:
        """Go on elsewhere: memory copied, the bus saved as JSON, *devices* those of the new host.

        Nothing here knows of it, as nothing in a guest does; the old host is of no use after it.
        """
        saved = msgspec.json.encode(self.server.save())
        self.low, self.high = bytearray(self.low), bytearray(self.high)
        self.memory = GuestMemory(
            [
                MemoryRegion(0, memoryview(self.low)),
                MemoryRegion(HIGH_MEMORY, memoryview(self.high)),
            ]
        )
        self.port = RecordingPort(self.port.messages, self.port.interrupts)
        self.server = VmbusServer(
            self.memory,
            self.port,
            on_event=lambda kind, detail: self.events.append((kind, detail)),
            processors=self.processors,
        )
        for channel in self.open_channels.values():
            channel.out.memory = channel.incoming.memory = self.memory
        self.server.restore(msgspec.json.decode(saved, type=SavedBus), devices(self.memory))

    # Memory.

    def allocate(self, count: int, *, scattered: bool = False) -> list[int]:
        """Page frame numbers of *count* zeroed pages, in a row or far from it."""
        if scattered:
            taken = [self._free.pop(0 if number % 2 else -1) for number in range(count)]
        else:
            for start in range(len(self._free) - count + 1):
                taken = self._free[start : start + count]
                if taken[-1] - taken[0] == count - 1:
                    break
            else:
                raise MemoryError("no pages in a row left")
            del self._free[start : start + count]
        for pfn in taken:
            self.memory.write(pfn * PAGE_SIZE, bytes(PAGE_SIZE))
        return taken

    def free(self, pfns: Sequence[int]) -> None:
        self._free = sorted([*self._free, *pfns])

    @property
    def faults(self) -> list[str]:
        return [detail for kind, detail in self.events if kind == "fault"]

    # Messages.

    def post(self, message: GuestMessage, *, connection_id: int = 4) -> None:
        assert self.server.post_message(connection_id, encode(message)) == 0

    def replies(self, kind: type[M]) -> list[M]:
        """What the host posted of that kind since the guest looked last."""
        return [item for _, item in self.port.messages[self._seen :] if isinstance(item, kind)]

    def reply(self, kind: type[M]) -> M:
        (item,) = self.replies(kind)
        self._seen = len(self.port.messages)
        return item

    def negotiate(self, version: int = VERSION_5_3, *, vp: int = 0) -> bool:
        new = version >= 0x50000
        self._seen = len(self.port.messages)
        self.post(
            InitiateContact(version, vp, 2 if new else 0x1000, 0x2000, 0x3000),
            connection_id=4 if new else 1,
        )
        self.offers.clear()
        self.open_channels.clear()
        return bool(self.reply(VersionResponse).version_supported)

    def request_offers(self) -> dict[int, OfferChannel]:
        self.post(RequestOffers())
        self.collect_offers()
        self.reply(AllOffersDelivered)
        return self.offers

    def collect_offers(self) -> None:
        for offer in self.replies(OfferChannel):
            self.offers[offer.child_relid] = offer

    def connect(self, version: int = VERSION_5_3) -> dict[int, OfferChannel]:
        assert self.negotiate(version)
        return self.request_offers()

    def make_gpadl(
        self,
        relid: int,
        ranges: Sequence[tuple[int, int, Sequence[int]]],
        *,
        handle: int | None = None,
    ) -> tuple[int, int]:
        """Lend (byte_count, byte_offset, pfns) ranges; (handle, the host's status)."""
        if handle is None:
            handle = self._next_gpadl
            self._next_gpadl += 1
        data = pack_ranges(
            tuple(GpaRange(count, offset, array("Q", pfns)) for count, offset, pfns in ranges)
        )
        self._seen = len(self.port.messages)
        self.post(GpadlHeader(relid, handle, len(data), len(ranges), data[:216]))
        for number, start in enumerate(range(216, len(data), 224)):
            self.post(GpadlBody(number, handle, data[start : start + 224]))
        created = self.reply(GpadlCreated)
        assert (created.child_relid, created.gpadl) == (relid, handle)
        return handle, created.creation_status

    def open(
        self,
        relid: int,
        *,
        out_pages: int = 4,
        in_pages: int = 4,
        vp: int = 0,
        scattered: bool = False,
    ) -> GuestChannel:
        """As vmbus_open(): pages, GPADL, ring headers, OPENCHANNEL."""
        pfns = self.allocate(out_pages + in_pages, scattered=scattered)
        handle, status = self.make_gpadl(relid, [(len(pfns) * PAGE_SIZE, 0, pfns)])
        assert status == 0
        out = GuestRing(self.memory, pfns[:out_pages])
        incoming = GuestRing(self.memory, pfns[out_pages:])
        for ring in (out, incoming):
            ring.set_word(16, 1)
        self.post(OpenChannel(relid, relid, handle, vp, out_pages))
        result = self.reply(OpenChannelResult)
        assert (result.child_relid, result.openid, result.status) == (relid, relid, 0)
        channel = GuestChannel(self, self.offers[relid], handle, out, incoming)
        self.open_channels[relid] = channel
        return channel

    def close(self, relid: int) -> None:
        """As vmbus_close()."""
        channel = self.open_channels.pop(relid)
        self.post(CloseChannel(relid))
        self.post(GpadlTeardown(relid, channel.gpadl))
        assert self.reply(GpadlTorndown).gpadl == channel.gpadl
        self.free([*channel.out.pfns, *channel.incoming.pfns])

    def take_rescinds(self) -> list[int]:
        """Rescinded channels; Linux closes them if open, keeps their GPADLs, and lets go."""
        rescinded = [item.child_relid for item in self.replies(RescindChannelOffer)]
        self.collect_offers()
        self._seen = len(self.port.messages)
        for relid in rescinded:
            if self.open_channels.pop(relid, None):
                self.post(CloseChannel(relid))
            del self.offers[relid]
            self.post(RelidReleased(relid))
        self.collect_offers()
        return rescinded

    def move(self, relid: int, vp: int) -> int | None:
        """MODIFYCHANNEL; the host's status if it answers."""
        self._seen = len(self.port.messages)
        self.post(ModifyChannel(relid, vp))
        answers = self.replies(ModifyChannelResponse)
        return answers[0].status if answers else None

    def unload(self) -> None:
        self.post(Unload())
        self.reply(UnloadResponse)
        self.offers.clear()
        self.open_channels.clear()


class GuestService:
    """hv_utils: negotiates and answers in place, as ``drivers/hv/hv_util.c`` does."""

    def __init__(
        self,
        channel: GuestChannel,
        versions: Sequence[tuple[int, int]],
        frameworks: Sequence[tuple[int, int]] = ((3, 0), (1, 0)),
    ) -> None:
        self.channel, self.versions, self.frameworks = channel, versions, frameworks
        self.requests: list[tuple[int, bytes]] = []  # (icmsgtype, body)

    def run(self, *, status: int = 0, answer: bool = True) -> int:
        """Read all there is and answer it; how many messages there were."""
        packets = self.channel.read()
        for packet in packets:
            message = bytearray(packet.payload)
            kind = struct.unpack_from("<H", message, 12)[0]
            if kind == 0:
                self._choose(message)
            else:
                self.requests.append((kind, bytes(message[28:])))
                if kind == 1:
                    sequence = struct.unpack_from("<Q", message, 28)[0]
                    struct.pack_into("<Q", message, 28, sequence + 1)
                struct.pack_into("<I", message, 20, status)
            message[25] = 5  # TRANSACTION | RESPONSE
            if answer:
                assert self.channel.write(bytes(message), transaction_id=packet.transaction_id)
        return len(packets)

    def _choose(self, message: bytearray) -> None:
        framework_count, count = struct.unpack_from("<HH", message, 28)
        pairs = list(struct.iter_unpack("<HH", message[36 : 36 + 4 * (framework_count + count)]))
        framework = next((v for v in self.frameworks if v in pairs[:framework_count]), None)
        version = next((v for v in self.versions if v in pairs[framework_count:]), None)
        struct.pack_into("<H", message, 18, 0x10)
        if framework is None or version is None:
            struct.pack_into("<HH", message, 28, 0, 0)
            return
        struct.pack_into("<HHIHHHH", message, 28, 1, 1, 0, *framework, *version)
