"""Frames from the wire into a guest's receive buffer.

A frame is read from the wire straight into sections of the buffer; only its first bytes are
looked at, in a copy. What stands before it (the RNDIS header and per-packet information) is
written into the room left for it in front. Frames that the guest cannot take as they are
(segments it does not want merged, checksums nobody can vouch for) are worked on in host memory and
copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from hvhost.network import frame, rndis
from hvhost.network.buffers import HEADROOM, ReceiveBuffer
from hvhost.network.rndis import InfoType, PacketFilter
from hvhost.network.state import AdapterState
from hvhost.network.toeplitz import FlowTable

#: Ranges of one packet to the guest; Linux takes up to 562.
RANGES_PER_PACKET: Final = 96
#: Frames read from the wire in one go; others get their turn then.
FRAMES_PER_ROUND: Final = 128


class Source(Protocol):
    """Where frames come from."""

    def receive_into(self, buffers: list[memoryview]) -> int:
        """Read one frame with its offload header; its size, 0 if there is none now."""
        ...


_DHCP_SERVERS: Final = (67, 547)

Deliver = Callable[[int, list[tuple[int, int]], list[int]], None]


class Receiver:
    """Fills one receive buffer.

    *deliver* gets a channel's number, ranges of the buffer as (byte_count, byte_offset), one for
    each RNDIS message, and the sections they lie in, which are no longer free.
    """

    def __init__(self, state: AdapterState, buffer: ReceiveBuffer, deliver: Deliver) -> None:
        self._state, self._buffer, self._deliver = state, buffer, deliver
        self._header = memoryview(bytearray(frame.VIRTIO_NET_HDR_SIZE))
        self.flows = FlowTable(state.scaling)
        self._batches: dict[int, tuple[list[tuple[int, int]], list[int]]] = {}

    @property
    def has_room(self) -> bool:
        """The largest frame there is would find room."""
        buffer = self._buffer
        return len(buffer.free) > buffer.sections_per_frame

    def pull(self, source: Source) -> bool:
        """Hand on what *source* has; true if there may be more, for which there is room."""
        buffer = self._buffer
        free, bodies, count = buffer.free, buffer.bodies, buffer.sections_per_frame
        more = False
        for _ in range(FRAMES_PER_ROUND):
            if len(free) <= count:
                break
            buffers = [self._header]
            for number in range(-1, -1 - count, -1):
                buffers += bodies[free[number]]
            size = source.receive_into(buffers)
            if not size:
                break
            self._received(size - frame.VIRTIO_NET_HDR_SIZE)
        else:
            more = True
        self.flush()
        return more and self.has_room

    def flush(self) -> None:
        """Hand over what is ready."""
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
        self._deliver(-1, [(len(message), section * buffer.section_size)], [section])

    def _received(self, size: int) -> None:
        """A frame of *size* bytes lies in the last free sections."""
        state, buffer = self._state, self._buffer
        counters = state.counters
        if size < frame.ETHERNET_HEADER:
            counters.receive_errors += 1
            return
        first = buffer.heads[buffer.free[-1]]
        head = bytes(first[HEADROOM : HEADROOM + min(size, frame.HEAD_SIZE)])
        if not self._wanted(head):
            counters.filtered += 1
            return
        offload = frame.unpack_offload(self._header)
        skip, infos = 0, b""
        if head[12:14] == frame.ETHERTYPE_TAG and size > 18:
            tag = int.from_bytes(head[14:16], "big")
            first[HEADROOM + 4 : HEADROOM + 16] = head[:12]
            head = head[:12] + head[16:]
            skip = frame.TAG_SIZE
            infos = rndis.information_item(InfoType.IEEE_8021Q, rndis.info_of_tag(tag))
        merged = offload.segmented
        if not merged and size - skip > state.mtu + frame.ETHERNET_HEADER:
            counters.receive_errors += 1
            return
        if offload.flags or merged:
            where = frame.parse(head)
            if where is None or (merged and not self._can_merge(where)) or _is_dhcp(head, where):
                self._slow(size, skip, infos, head, offload)
                return
            infos += rndis.information_item(InfoType.TCPIP_CHKSUM, _verified(where))
            counters.merged += merged
        channel, value = self.flows.look_up(head)
        if value:
            infos += rndis.information_item(InfoType.NBL_HASH_VALUE, value)
        self._commit(channel, size, skip, infos)

    def _wanted(self, head: bytes) -> bool:
        chosen = self._state.filter
        if chosen & PacketFilter.PROMISCUOUS:
            return True
        if not head[0] & 1:
            return bool(chosen & PacketFilter.DIRECTED) and head[:6] == self._state.mac
        if head[:6] == b"\xff\xff\xff\xff\xff\xff":
            return bool(chosen & PacketFilter.BROADCAST)
        return bool(chosen & (PacketFilter.ALL_MULTICAST | PacketFilter.MULTICAST))

    def _can_merge(self, where: frame.Headers) -> bool:
        return self._state.merging and where.protocol == frame.TCP

    def _commit(self, channel: int, size: int, skip: int, infos: bytes) -> None:
        """Put headers before the frame in the last free sections, and take these."""
        buffer, counters = self._buffer, self._state.counters
        free, capacity = buffer.free, buffer.capacity
        counters.received += 1
        counters.received_bytes += size - skip
        if channel not in self._batches:
            self._batches[channel] = ([], [])
        ranges, sections = self._batches[channel]
        if len(ranges) > RANGES_PER_PACKET - buffer.sections_per_frame:
            self._deliver(channel, ranges, sections)
            ranges, sections = self._batches[channel] = ([], [])
        if size <= capacity:
            section = free.pop()
            header = rndis.packet_header(infos, size - skip)
            start = HEADROOM + skip - len(header)
            buffer.heads[section][start : HEADROOM + skip] = header
            ranges.append((len(header) + size - skip, section * buffer.section_size + start))
            sections.append(section)
            return
        flag = rndis.FRAGMENT | rndis.FRAGMENT_FIRST
        while size:
            section = free.pop()
            length = min(size, capacity)
            size -= length
            if not size:
                flag |= rndis.FRAGMENT_LAST
            mark = rndis.PACKET_ID_VERSION | flag << 8
            items = infos + rndis.information_item(InfoType.INTERNAL_PACKET_ID, mark)
            header = rndis.packet_header(items, length - skip)
            start = HEADROOM + skip - len(header)
            buffer.heads[section][start : HEADROOM + skip] = header
            ranges.append((len(header) + length - skip, section * buffer.section_size + start))
            sections.append(section)
            flag, infos, skip = rndis.FRAGMENT, b"", 0

    def _slow(
        self, size: int, skip: int, infos: bytes, head: bytes, offload: frame.Offload
    ) -> None:
        """A frame that needs work: copied out, worked on, copied back in pieces."""
        buffer = self._buffer
        whole = bytearray()
        for number in range(-1, -1 - buffer.sections_per_frame, -1):
            for view in buffer.bodies[buffer.free[number]]:
                if len(whole) < size:
                    whole += view[: size - len(whole)]
        plain = whole[skip:]
        plain[: len(head)] = head  # as it was checked, whatever the guest has made of it since
        shifted = offload._replace(csum_start=max(offload.csum_start - skip, 0))
        count = 0
        for segment in frame.segments(plain, shifted):
            if len(buffer.free) <= buffer.sections_per_frame or len(segment) > buffer.capacity:
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
        channel, value = self.flows.look_up(bytes(view[: frame.HEAD_SIZE]))
        if value:
            infos += rndis.information_item(InfoType.NBL_HASH_VALUE, value)
        self._commit(channel, len(data), 0, infos)


def _is_dhcp(head: bytes, where: frame.Headers) -> bool:
    """Whether a frame comes from a DHCP server: clients check its sum themselves."""
    ports = head[where.transport : where.transport + 2]
    return where.protocol == frame.UDP and int.from_bytes(ports, "big") in _DHCP_SERVERS


def _verified(where: frame.Headers) -> int:
    """What the guest need not check any more of a frame whose sum is good or not yet made."""
    if where.protocol == frame.TCP:
        return rndis.RECEIVE_TCP_CHECKSUM_SUCCEEDED
    return rndis.RECEIVE_UDP_CHECKSUM_SUCCEEDED
