"""A guest's network driver, as ``drivers/net/hyperv`` of Linux works; and a wire that remembers.

Messages are written here a second time, from the layouts in ``hyperv_net.h``.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field

from hvhost.network.buffers import SECTION_SIZE
from hvhost.network.device import NetworkAdapter
from hvhost.partition.memory import PAGE_SIZE
from simulated.driver import GuestChannel, GuestPacket, SimulatedGuest

MAC = bytes.fromhex("00155d010203")
PEER = bytes.fromhex("00155d0a0b0c")
NO_OFFLOAD = bytes(10)
#: Sections of the receive buffer.
RECEIVE_SECTIONS = 32
SEND_PAGES = 32
SEND_SECTION = 6144


@dataclass
class RecordingWire:
    """Takes frames while *takes* says so, gives those in *incoming*."""

    sent: list[bytes] = field(default_factory=list)
    incoming: deque[bytes] = field(default_factory=deque)
    takes: int = 1 << 30
    watching: tuple[bool, bool] = (False, False)

    def send(self, buffers: list[bytes | bytearray | memoryview]) -> bool:
        if not self.takes:
            return False
        self.takes -= 1
        self.sent.append(b"".join(buffers))
        return True

    def receive_into(self, buffers: list[memoryview]) -> int:
        if not self.incoming:
            return 0
        data = self.incoming.popleft()
        left = data
        for buffer in buffers:
            piece, left = left[: len(buffer)], left[len(buffer) :]
            buffer[: len(piece)] = piece
        return len(data) - len(left)

    def watch(self, *, read: bool, write: bool) -> None:
        self.watching = read, write


def nvsp(kind: int, *words: int) -> bytes:
    return struct.pack(f"<{1 + len(words)}I", kind, *words).ljust(40, b"\0")


def rndis_packet(data: bytes, *infos: tuple[int, int]) -> bytes:
    """A data message with per-packet information of (type, value)."""
    ppi = b"".join(struct.pack("<4I", 16, kind, 12, value) for kind, value in infos)
    head = struct.pack(
        "<11I", 1, 44 + len(ppi) + len(data), 36 + len(ppi), len(data), 0, 0, 0, 36, len(ppi), 0, 0
    )
    return head + ppi + data


@dataclass(frozen=True)
class Received:
    """A frame as the driver hands it up, with the information that came with it."""

    data: bytes
    infos: dict[int, int]
    channel: int
    fragments: int = 1


class NetvscDriver:
    """The driver of one adapter; everything is done at once, in the caller's thread."""

    def __init__(
        self,
        *,
        queues: int = 1,
        may_spoof: bool = False,
        processors: int = 4,
        sections: int = RECEIVE_SECTIONS,
        ring_pages: tuple[int, int] = (17, 5),
    ) -> None:
        """*ring_pages* of each ring: of the first channel, and of the others."""
        self.receive_buffer = sections * SECTION_SIZE // PAGE_SIZE
        self.guest = SimulatedGuest(pages=384 + self.receive_buffer // 2, processors=processors)
        self.ring_pages = ring_pages
        self.wire = RecordingWire()
        self.adapter = NetworkAdapter(
            "net0",
            MAC,
            self.guest.memory,
            self.guest.server,
            self.wire,
            queues=queues,
            may_spoof=may_spoof,
        )
        self.guest.server.add_device(self.adapter)
        self.guest.connect()
        self.channels: list[GuestChannel] = []
        self.sections = 0
        self.section_size = 0
        self.receive_pages: list[int] = []
        self.send_pages: list[int] = []
        self.completed: list[int] = []
        self.answers: list[bytes] = []
        self.indications: list[bytes] = []
        self.frames: list[Received] = []
        self.send_table: list[int] = []
        self._request = 0
        self._transaction = 1000

    @property
    def channel(self) -> GuestChannel:
        return self.channels[0]

    # Starting.

    def open(self, relid: int = 1) -> None:
        pages = self.ring_pages[0]
        self.channels = [self.guest.open(relid, out_pages=pages, in_pages=pages)]

    def call(self, message: bytes) -> bytes:
        """An NVSP message that is answered; the answer."""
        self._transaction += 1
        assert self.channel.write(message, flags=1, transaction_id=self._transaction)
        answer = None
        for packet in self.channel.read():
            if packet.type == 11 and packet.transaction_id == self._transaction:
                answer = packet.payload
            else:
                self._take(packet, 0)
        assert answer is not None, f"no answer; faults: {self.guest.faults}"
        return answer

    def tell(self, message: bytes) -> None:
        self.channel.write(message)

    def negotiate(self, version: int = 0x60001) -> int:
        answer = struct.unpack_from("<4I", self.call(nvsp(1, version, version)))
        return int(answer[1]) if answer[3] == 1 else 0

    def configure(self, mtu: int = 1500, capabilities: int = 0xA8) -> None:
        self.tell(nvsp(125, mtu + 14, 0, capabilities, 0))
        self.tell(nvsp(100, 6, 30))

    def lend_buffers(self, send_id: int = 0) -> None:
        guest = self.guest
        self.receive_pages = guest.allocate(self.receive_buffer, scattered=True)
        handle, status = guest.make_gpadl(
            1, [(self.receive_buffer * PAGE_SIZE, 0, self.receive_pages)]
        )
        assert status == 0
        answer = self.call(nvsp(101, handle, 0xCAFE))
        kind, status, sections, offset, self.section_size, self.sections, _ = struct.unpack_from(
            "<7I", answer
        )
        assert (kind, status, sections, offset) == (102, 1, 1, 0)
        self.send_pages = guest.allocate(SEND_PAGES, scattered=True)
        handle, status = guest.make_gpadl(1, [(SEND_PAGES * PAGE_SIZE, 0, self.send_pages)])
        assert status == 0
        assert struct.unpack_from("<3I", self.call(nvsp(104, handle, send_id))) == (
            105,
            1,
            SEND_SECTION,
        )

    def start(self, *, mtu: int = 1500, capabilities: int = 0xA8, merging: bool = True) -> None:
        """All that Linux does until frames move."""
        self.open()
        assert self.negotiate() == 0x60001
        self.configure(mtu, capabilities)
        self.lend_buffers()
        assert self.request(2, struct.pack("<III", 1, 0, 0x4000))[:4] == bytes(4)
        parameters = bytearray(28)
        parameters[:4] = struct.pack("<BBH", 0x80, 3, 28)
        parameters[22:24] = bytes((2, 2)) if merging else bytes((1, 1))
        assert self.set(0xFC01020C, bytes(parameters)) == 0
        assert self.set(0x1010E, struct.pack("<I", 0x0D)) == 0

    def open_subchannels(self, count: int) -> int:
        """NVSP_MSG5_TYPE_SUBCHANNEL; how many there are now."""
        answer = struct.unpack_from("<3I", self.call(nvsp(133, 1, count)))
        assert answer[:2] == (133, 1)
        self.guest.collect_offers()
        for relid, offer in sorted(self.guest.offers.items()):
            if offer.sub_channel_index and relid not in self.guest.open_channels:
                pages, vp = self.ring_pages[1], offer.sub_channel_index
                self.channels.append(self.guest.open(relid, out_pages=pages, in_pages=pages, vp=vp))
        self.read()
        return int(answer[2])

    def set_rss(self, table: list[int], key: bytes, hash_types: int = 0x1700) -> int:
        head = struct.pack(
            "<BBHHHIHHIHHIIII",
            *(0x89, 2, 40, 0, 0, hash_types | 1, 4 * len(table), 0, 40),
            *(len(key), 0, 40 + 4 * len(table), 0, 0, 0),
        )
        return self.set(0x10204, head + struct.pack(f"<{len(table)}I", *table) + key)

    # RNDIS requests.

    def request(self, kind: int, body: bytes) -> bytes:
        """A control message with a request id; the answer behind that id."""
        self._request += 1
        self.send_control(struct.pack("<III", kind, 12 + len(body), self._request) + body)
        self.read()
        assert self._transaction in self.completed
        answer = self.answers.pop()
        answer_kind, length, request = struct.unpack_from("<III", answer)
        assert (answer_kind, length, request) == (kind | 1 << 31, len(answer), self._request)
        return answer[12:]

    def send_control(self, message: bytes) -> None:
        (page,) = self.guest.allocate(1)
        self.guest.memory.write(page * PAGE_SIZE, message)
        header = struct.pack("<IIIIQ", 0, 1, len(message), 0, page)
        self._transaction += 1
        self.channel.write(
            nvsp(107, 1, 0xFFFFFFFF, 0),
            packet_type=9,
            flags=1,
            transaction_id=self._transaction,
            header=header,
        )
        self.guest.free([page])

    def query(self, oid: int, data: bytes = b"") -> tuple[int, bytes]:
        answer = self.request(4, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        status, length, offset = struct.unpack_from("<III", answer)
        body = answer[offset - 4 :] if length else b""
        assert len(body) == length
        return status, body

    def set(self, oid: int, data: bytes) -> int:
        answer = self.request(5, struct.pack("<IIII", oid, len(data), 20, 0) + data)
        status: int = struct.unpack("<I", answer)[0]
        return status

    # Frames.

    def put(self, pages: list[int], offset: int, data: bytes) -> None:
        """Write into a buffer lent to the host."""
        while data:
            page, within = divmod(offset, PAGE_SIZE)
            piece = data[: PAGE_SIZE - within]
            self.guest.memory.write(pages[page] * PAGE_SIZE + within, piece)
            data, offset = data[len(piece) :], offset + len(piece)

    def get(self, pages: list[int], offset: int, size: int) -> bytes:
        out = b""
        while size:
            page, within = divmod(offset, PAGE_SIZE)
            piece = self.guest.memory.read(
                pages[page] * PAGE_SIZE + within, min(size, PAGE_SIZE - within)
            )
            out, offset, size = out + piece, offset + len(piece), size - len(piece)
        return out

    def send(
        self, *messages: bytes, section: int = 0, channel: int = 0, signal: bool = True
    ) -> int:
        """Messages in one section of the send buffer; the transaction."""
        data = b"".join(messages)
        self.put(self.send_pages, section * SEND_SECTION, data)
        self._transaction += 1
        self.channels[channel].write(
            nvsp(107, 0, section, len(data)),
            flags=1,
            transaction_id=self._transaction,
            signal=signal,
        )
        return self._transaction

    def send_pages_of(self, message: bytes, *, kind: int = 0, signal: bool = True) -> int:
        """A message in pages of its own, far from each other; the transaction.

        *kind* is its ``channel_type``: 0 for frames, 1 for control messages.
        """
        count = -(-len(message) // PAGE_SIZE)
        pages = self.guest.allocate(count, scattered=True)
        self.put(pages, 0, message)
        ranges = b"".join(
            struct.pack("<IIQ", min(PAGE_SIZE, len(message) - number * PAGE_SIZE), 0, page)
            for number, page in enumerate(pages)
        )
        self._transaction += 1
        self.channel.write(
            nvsp(107, kind, 0xFFFFFFFF, 0),
            packet_type=9,
            flags=1,
            transaction_id=self._transaction,
            header=struct.pack("<II", 0, count) + ranges,
            signal=signal,
        )
        return self._transaction

    def pull(self) -> list[Received]:
        """The wire has frames: what the driver hands up, all of it completed."""
        for _ in range(1000):
            more = self.adapter.readable()
            self.read()
            if not more and not self.wire.incoming:
                break
        taken, self.frames = self.frames, []
        return taken

    def read(self, *, complete: bool = True) -> None:
        for number, channel in enumerate(self.channels):
            for packet in channel.read():
                self._take(packet, number)
                if packet.type == 7 and complete:
                    channel.write(
                        struct.pack("<II", 108, 1),
                        packet_type=11,
                        transaction_id=packet.transaction_id,
                    )

    def _take(self, packet: GuestPacket, channel: int) -> None:
        if packet.type == 11:
            self.completed.append(packet.transaction_id)
            return
        kind, channel_type = struct.unpack_from("<II", packet.payload)
        if packet.type == 6:
            assert kind == 134
            count, offset = struct.unpack_from("<II", packet.payload, 4)
            self.send_table = list(struct.unpack_from(f"<{count}I", packet.payload, offset))
            return
        assert (packet.type, kind) == (7, 107)
        pageset, _, _, count = struct.unpack_from("<HBBI", packet.header)
        assert pageset == 0xCAFE
        parts: list[bytes] = []
        infos: dict[int, int] = {}
        for number in range(count):
            size, offset = struct.unpack_from("<II", packet.header, 8 + 8 * number)
            assert size <= self.section_size
            message = self.get(self.receive_pages, offset, size)
            message_kind, length = struct.unpack_from("<II", message)
            assert length == size
            assert channel_type == (0 if message_kind == 1 else 1)
            if message_kind == 7:
                self.indications.append(message)
            elif message_kind != 1:
                self.answers.append(message)
            else:
                data, found = _parse(message)
                flags = found.get(0x80000001, 0) >> 8
                if not flags & 1:
                    self.frames.append(Received(data, found, channel))
                    continue
                if flags & 2:
                    parts, infos = [], found
                parts.append(data)
                if flags & 4:
                    self.frames.append(
                        Received(b"".join(parts), infos, channel, fragments=len(parts))
                    )
                else:
                    assert number < count - 1


def _parse(message: bytes) -> tuple[bytes, dict[int, int]]:
    """As rndis_filter_receive_data()."""
    words = struct.unpack_from("<11I", message)
    offset, length, info_offset, info_length = words[2], words[3], words[7], words[8]
    assert 8 + offset + length <= len(message)
    infos = {}
    position, end = 8 + info_offset, 8 + info_offset + info_length
    while info_length and position < end:
        size, kind, value = struct.unpack_from("<III", message, position)
        infos[kind] = struct.unpack_from("<I", message, position + value)[0]
        position += size
    return message[8 + offset : 8 + offset + length], infos
