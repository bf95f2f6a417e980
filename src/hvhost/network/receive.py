"""Frames from the wire into a guest's receive buffer.

A frame is read from the wire straight into a section of the buffer; only its first bytes are
looked at, in a copy. What stands before it (the RNDIS header and per-packet information) is
written into the room left for it in front. TCP segments that follow each other stay in the
sections they were read into and are handed over as one frame, if the guest wants that. Frames that
the guest cannot take as they are (segments it does not want merged, checksums nobody can vouch for)
are worked on in host memory and copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from hvhost.network import frame, rndis
from hvhost.network.buffers import HEADROOM, KEPT_FREE, SECTION_SIZE, ReceiveBuffer
from hvhost.network.merge import Train, mergeable
from hvhost.network.protocol import RANGES_PER_PACKET
from hvhost.network.rndis import InfoType, PacketFilter
from hvhost.network.state import AdapterState
from hvhost.network.toeplitz import FlowTable

#: Bytes of the smallest frame that is worth being merged with its neighbours.
MERGE_LEAST: Final = 512
#: Frames read from the wire in one go; others get their turn then.
FRAMES_PER_ROUND: Final = 128


class Source(Protocol):
    """Where frames come from."""

    def receive_into(self, buffers: list[memoryview]) -> int:
        """Read one frame with its offload header; its size, 0 if there is none now."""
        ...


_DHCP_SERVERS: Final = (67, 547)

_DIRECTED: Final = int(PacketFilter.DIRECTED)
_BROADCAST: Final = int(PacketFilter.BROADCAST)
_MULTICAST: Final = int(PacketFilter.MULTICAST)
_ALL_MULTICAST: Final = int(PacketFilter.ALL_MULTICAST)
_PROMISCUOUS: Final = int(PacketFilter.PROMISCUOUS)
_OFFLOAD_SIZE: Final = frame.VIRTIO_NET_HDR_SIZE
_GSO_KINDS: Final = 0xFF & ~frame.GSO_ECN
# What the guest need not check any more of a frame whose sum is good or not yet made.
_GOOD_TCP: Final = rndis.information_item(
    InfoType.TCPIP_CHKSUM, rndis.RECEIVE_TCP_CHECKSUM_SUCCEEDED
)
_GOOD_UDP: Final = rndis.information_item(
    InfoType.TCPIP_CHKSUM, rndis.RECEIVE_UDP_CHECKSUM_SUCCEEDED
)

Batch = tuple[list[int], list[int]]
Deliver = Callable[[int, list[int], list[int]], None]


class Receiver:
    """Fills one receive buffer.

    *interrupt* tells the guest of what was delivered; at the end of a round the caller does that.
    *deliver* gets a channel's number, ranges of the buffer as byte_count, byte_offset,
    byte_count…, one pair for each RNDIS message, and the sections they lie in, which are no longer
    free.
    """

    def __init__(
        self,
        state: AdapterState,
        buffer: ReceiveBuffer,
        deliver: Deliver,
        interrupt: Callable[[], None],
    ) -> None:
        self._state, self._buffer, self._deliver = state, buffer, deliver
        self._interrupt = interrupt
        # The last frames came one by one: the next is not kept waiting for company.
        self._alone = False
        self._header = memoryview(bytearray(frame.VIRTIO_NET_HDR_SIZE))
        self._overflow = memoryview(bytearray(frame.FRAME_LIMIT))
        # A frame of the usual size is read into a section's first pages, which is quicker, and what
        # there is more of it beside them; after one that was larger, into the whole section.
        self._usual_size = state.mtu + frame.ETHERNET_HEADER + frame.TAG_SIZE
        self._first_pages: dict[int, list[memoryview]] = {}
        self._expect_large = False
        self.flows = FlowTable(state.scaling)
        self._batches: dict[int, Batch] = {}
        self._train: Train | None = None
        # Sections and information of the train's segments.
        self._wagons: list[int] = []
        self._train_infos = b""

    def pull(self, source: Source) -> bool:
        """Hand on what *source* has; true if there may be more."""
        buffer = self._buffer
        free, bodies, usual_size = buffer.free, buffer.bodies, self._usual_size
        receive_into, kept_free = source.receive_into, buffer.kept_free(self._state.merging)
        more = False
        number = 0
        for number in range(FRAMES_PER_ROUND):
            if number == 1 and self._alone:
                self.flush()
                self._interrupt()
            if len(free) <= kept_free:
                break
            section, expect_large = free[-1], self._expect_large
            if expect_large:
                size = receive_into([self._header, *bodies[section]])
            else:
                size = receive_into(self._start_of(section))
            if not size:
                break
            size -= _OFFLOAD_SIZE
            self._expect_large = size > usual_size
            if size > usual_size and not expect_large:
                self._spread(section, size)
            self._received(size)
        else:
            more = True
        self._alone = number <= 1
        self.flush()
        return more

    def discard(self, source: Source) -> bool:
        """Lose what *source* has, because nobody listens; true if there may be more."""
        for _ in range(FRAMES_PER_ROUND):
            if not source.receive_into([self._header, self._overflow]):
                return False
            self._state.counters.filtered += 1
        return True

    def _start_of(self, section: int) -> list[memoryview]:
        """Where a frame goes that is expected to be of the usual size."""
        buffers = self._first_pages.get(section)
        if buffers is None:
            buffers, room = [self._header], 0
            for body in self._buffer.bodies[section]:
                if room >= self._usual_size:
                    break
                buffers.append(body)
                room += len(body)
            buffers.append(self._overflow)
            self._first_pages[section] = buffers
        return buffers

    def _spread(self, section: int, size: int) -> None:
        """Copy what the first pages had no room for to where it belongs."""
        pages = self._start_of(section)[1:-1]
        left = size - sum(map(len, pages))
        position = 0
        for body in self._buffer.bodies[section][len(pages) :]:
            if position >= left:
                break
            length = min(len(body), left - position)
            body[:length] = self._overflow[position : position + length]
            position += length

    def flush(self) -> None:
        """Hand over what is ready."""
        if self._train is not None:
            self._end_train()
        for number, (ranges, sections) in self._batches.items():
            if ranges:
                self._deliver(number, ranges, sections)
        self._batches.clear()

    def control(self, message: bytes) -> None:
        """A control message for the guest; there must be a free section."""
        self.flush()
        buffer = self._buffer
        section = buffer.free.pop()
        buffer.heads[section][: len(message)] = message
        self._deliver(-1, [len(message), section * SECTION_SIZE], [section])

    def _received(self, size: int) -> None:
        """A frame of *size* bytes lies in the last free section."""
        state, buffer = self._state, self._buffer
        if size < frame.ETHERNET_HEADER:
            state.counters.receive_errors += 1
            return
        section = buffer.free[-1]
        head = buffer.starts[section].tobytes()
        if size < frame.HEAD_SIZE:
            head = head[:size]
        chosen = state.filter
        if not (
            (chosen & _DIRECTED and head[:6] == state.mac)  # nearly all: no call for them
            or self._wanted(head, chosen)
        ):
            state.counters.filtered += 1
            return
        header = self._header
        flags, merged = header[0], header[1] & _GSO_KINDS
        skip, infos = 0, b""
        kind = head[12:14]
        if kind == frame.ETHERTYPE_TAG and size > 18:
            tag = int.from_bytes(head[14:16], "big")
            buffer.heads[section][HEADROOM + 4 : HEADROOM + 16] = head[:12]
            head = head[:12] + head[16:]
            skip = frame.TAG_SIZE
            infos = rndis.information_item(InfoType.IEEE_8021Q, rndis.info_of_tag(tag))
        if not merged and size - skip > state.mtu + frame.ETHERNET_HEADER:
            state.counters.receive_errors += 1
            return
        where = None
        if flags or merged:
            where = frame.parse(head)
            if where is None or (merged and not self._can_merge(where)) or _is_dhcp(head, where):
                offload = frame.unpack_offload(header)
                if self._train is not None:
                    self._end_train()
                self._slow(size, skip, infos, head, offload)
                return
            if merged:
                state.counters.merged += 1
        elif state.merging and size >= MERGE_LEAST:
            where = frame.parse(head)
        if (
            state.merging
            and not merged
            and where is not None
            and size >= MERGE_LEAST
            and mergeable(head, where, size - skip)
            and (flags or self._sum_is_right(section, head, where, size, skip))
        ):
            self._board(section, head, where, size, skip, infos)
            return
        if self._train is not None:
            self._end_train()
        if flags or merged:
            assert where is not None
            infos += _GOOD_TCP if where.protocol == frame.TCP else _GOOD_UDP
        channel, of_flow = self.flows.look_up(head)
        self._commit(channel, size, skip, infos + of_flow)

    # Segments that belong together.

    def _sum_is_right(
        self, section: int, head: bytes, where: frame.Headers, size: int, skip: int
    ) -> bool:
        body = self._buffer.bodies[section][0]
        return size <= len(body) and frame.tcp_sum_is_right(
            head, where, body[skip + where.transport : size]
        )

    def _board(
        self, section: int, head: bytes, where: frame.Headers, size: int, skip: int, infos: bytes
    ) -> None:
        """A segment whose sum is good: it waits for the next one, and leaves the free sections."""
        train = self._train
        if train is None or infos != self._train_infos or not train.take(head, where, size - skip):
            if train is not None:
                self._end_train()
            self._train = Train(head, where, size - skip)
            self._train_infos = infos
        self._buffer.free.pop()
        self._wagons.append(section)

    def _end_train(self) -> None:
        """Hand on the segments that wait: as one frame, each in the section it was read into."""
        train, wagons, infos = self._train, self._wagons, self._train_infos
        assert train is not None
        self._train, self._wagons = None, []
        buffer, counters = self._buffer, self._state.counters
        channel, of_flow = self.flows.look_up(train.head)
        skip = frame.TAG_SIZE if infos else 0
        infos += _GOOD_TCP + of_flow
        where, payload = train.where, train.payload
        if train.count == 1:
            buffer.free.append(wagons[0])
            self._commit(channel, where.payload + payload + skip, skip, infos)
            return
        counters.merged += 1
        counters.received += 1
        counters.received_bytes += where.payload + payload
        whole = train.headers()
        start = HEADROOM + skip
        buffer.heads[wagons[0]][start : start + len(whole)] = whole
        ranges, sections = self._batch(channel, train.count)
        first, length = start, where.payload + train.segment
        flag = rndis.FRAGMENT | rndis.FRAGMENT_FIRST
        for number, section in enumerate(wagons, 1):
            if number == train.count:
                flag |= rndis.FRAGMENT_LAST
            mark = rndis.PACKET_ID_VERSION | flag << 8
            items = infos + rndis.information_item(InfoType.INTERNAL_PACKET_ID, mark)
            header = rndis.packet_header(items, length)
            begin = first - len(header)
            buffer.heads[section][begin:first] = header
            ranges += len(header) + length, section * SECTION_SIZE + begin
            # The others are bare payload, behind their headers.
            flag, infos, first = rndis.FRAGMENT, b"", start + where.payload
            payload -= train.segment
            length = min(train.segment, payload)
        sections += wagons

    def _wanted(self, head: bytes, chosen: int) -> bool:
        if chosen & _PROMISCUOUS:
            return True
        if not head[0] & 1:
            return bool(chosen & _DIRECTED) and head[:6] == self._state.mac
        if head[:6] == b"\xff\xff\xff\xff\xff\xff":
            return bool(chosen & _BROADCAST)
        if chosen & _ALL_MULTICAST:
            return True
        return bool(chosen & _MULTICAST) and head[:6] in self._state.multicast

    def _can_merge(self, where: frame.Headers) -> bool:
        return self._state.merging and where.protocol == frame.TCP

    def _batch(self, channel: int, messages: int) -> Batch:
        """What is collected for a channel, with room for so many messages more in one packet."""
        batch = self._batches.get(channel)
        if batch is None:
            batch = self._batches[channel] = ([], [])
        elif len(batch[0]) > 2 * (RANGES_PER_PACKET - messages):
            self._deliver(channel, *batch)
            batch = self._batches[channel] = ([], [])
        return batch

    def _commit(self, channel: int, size: int, skip: int, infos: bytes) -> None:
        """Put headers before the frame in the last free section, and take that."""
        buffer, counters = self._buffer, self._state.counters
        counters.received += 1
        counters.received_bytes += size - skip
        ranges, sections = self._batch(channel, 1)
        section = buffer.free.pop()
        header = rndis.packet_header(infos, size - skip)
        start = HEADROOM + skip - len(header)
        buffer.heads[section][start : HEADROOM + skip] = header
        ranges += len(header) + size - skip, section * SECTION_SIZE + start
        sections.append(section)

    def _slow(
        self, size: int, skip: int, infos: bytes, head: bytes, offload: frame.Offload
    ) -> None:
        """A frame that needs work: copied out, worked on, copied back in pieces."""
        buffer = self._buffer
        whole = bytearray()
        for view in buffer.bodies[buffer.free[-1]]:
            if len(whole) >= size:
                break
            whole += view[: size - len(whole)]
        plain = whole[skip:]
        plain[: len(head)] = head  # as it was checked, whatever the guest has made of it since
        shifted = offload._replace(csum_start=max(offload.csum_start - skip, 0))
        count = 0
        for segment in frame.segments(plain, shifted):
            if len(buffer.free) <= KEPT_FREE:
                self._state.counters.no_buffer += 1
                continue
            count += 1
            self._write(segment, infos)
        if not count:
            self._state.counters.receive_errors += 1

    def _write(self, data: bytearray, infos: bytes) -> None:
        """Copy a frame without anything left to do into the last free section, and take it."""
        position, view = 0, memoryview(data)
        for body in self._buffer.bodies[self._buffer.free[-1]]:
            piece = view[position : position + len(body)]
            body[: len(piece)] = piece
            position += len(piece)
        channel, of_flow = self.flows.look_up(bytes(view[: frame.HEAD_SIZE]))
        self._commit(channel, len(data), 0, infos + of_flow)


def _is_dhcp(head: bytes, where: frame.Headers) -> bool:
    """Whether a frame comes from a DHCP server: clients check its sum themselves."""
    ports = head[where.transport : where.transport + 2]
    return where.protocol == frame.UDP and int.from_bytes(ports, "big") in _DHCP_SERVERS
