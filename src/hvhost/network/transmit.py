"""Frames of a guest on their way to the wire: what it asks to be done is written before them."""

from __future__ import annotations

from typing import Final

from hvhost.network import frame, rndis
from hvhost.network.buffers import Span
from hvhost.network.rndis import DataMessage
from hvhost.network.state import AdapterState

_HEAD = rndis.PACKET_SIZE + rndis.PER_PACKET_INFO_LIMIT
#: What of a message is read first: its header, the usual information, and the frame's headers.
_USUAL_HEAD = 288
#: RNDIS messages in one packet; the host offers 8, a section has room for more.
MESSAGES_PER_PACKET: Final = 256
_LSO_V2 = 1 << 30
_LSO_IPV6 = 1 << 31

Buffers = list[bytes | bytearray | memoryview]


def messages(span: Span, end: int) -> list[tuple[int, bytes, DataMessage]]:
    """The data messages in the first *end* bytes of *span*, each with where and how it starts.

    :class:`hvhost.errors.RemoteProtocolError` if it is not made of such.
    """
    found: list[tuple[int, bytes, DataMessage]] = []
    position = 0
    while position < end and len(found) < MESSAGES_PER_PACKET:
        left = end - position
        head = span.read(position, min(left, _USUAL_HEAD))
        if len(head) >= rndis.PACKET_SIZE and int.from_bytes(head[32:36], "little") > 64:
            head = span.read(position, min(left, _HEAD))
        message = rndis.decode_packet(head, left)
        found.append((position, head, message))
        position += message.length
    return found


def frame_buffers(
    state: AdapterState,
    span: Span,
    start: int,
    copy: bytes,
    message: DataMessage,
    *,
    may_spoof: bool,
) -> Buffers | None:
    """A frame with its offload header, ready to be written; ``None`` for one to be dropped.

    *copy* is how its message, at *start* of *span*, starts. Its data stay where they are, in the
    guest's memory.
    """
    counters = state.counters
    size = message.data_length
    if not frame.ETHERNET_HEADER <= size <= frame.FRAME_LIMIT:
        counters.transmit_errors += 1
        return None
    offset = message.data_offset
    start += offset
    large_send = message.large_send
    wants = message.checksum or 0
    if large_send is not None or wants & rndis.TRANSMIT_IP_HEADER_CHECKSUM:
        copied = frame.HEAD_SIZE
    elif message.vlan is not None or not may_spoof:
        copied = 12
    else:
        copied = 0
    copied = min(copied, size)
    if offset + copied <= len(copy):
        head = bytearray(copy[offset : offset + copied])
    else:
        head = bytearray(span.read(start, copied))
    if not may_spoof and head[6:12] != state.mac:
        counters.spoofed += 1
        return None
    offload = frame.NOTHING
    if large_send is not None:
        made = _large_send(head, large_send, size)
        if made is None:
            counters.transmit_errors += 1
            return None
        offload = made
        counters.large_sends += offload.segmented
    elif message.checksum is not None:
        made = _checksum(head, message.checksum, size)
        if made is None:
            counters.transmit_errors += 1
            return None
        offload = made
    buffers: Buffers
    body = span.slice(start + len(head), size - len(head))
    if message.vlan is None:
        buffers = [offload.pack(), head, *body]
    else:
        tag = frame.ETHERTYPE_TAG + rndis.tag_of_info(message.vlan).to_bytes(2, "big")
        if offload is not frame.NOTHING:
            offload = offload._replace(
                csum_start=offload.csum_start + frame.TAG_SIZE if offload.flags else 0,
                hdr_len=offload.hdr_len + frame.TAG_SIZE if offload.hdr_len else 0,
            )
        buffers = [offload.pack(), head[:12], tag, head[12:], *body]
    counters.transmitted += 1
    counters.transmitted_bytes += size
    return buffers


def _checksum(head: bytearray, value: int, size: int) -> frame.Offload | None:
    """What a checksum request asks of the wire; ``None`` if it points outside the frame."""
    if value & rndis.TRANSMIT_IP_HEADER_CHECKSUM and (where := frame.parse(head)):
        frame.set_ip_checksum(head, where)
    if value & rndis.TRANSMIT_TCP_CHECKSUM:
        field = 16
    elif value & rndis.TRANSMIT_UDP_CHECKSUM:
        field = 6
    else:
        return frame.NOTHING
    offset = value >> 16 & 0x3FF
    if offset < frame.ETHERNET_HEADER or offset + field + 2 > size:
        return None
    return frame.Offload(flags=frame.NEEDS_CSUM, csum_start=offset, csum_offset=field)


def _large_send(head: bytearray, value: int, size: int) -> frame.Offload | None:
    """What a large send asks of the wire, its headers made whole; ``None`` if they are not TCP's.

    The guest left lengths and sums out of the headers (NDIS_TCP_LARGE_SEND_OFFLOAD_V2).
    """
    where = frame.parse(head)
    mss = value & 0xFFFFF
    if (
        where is None
        or where.protocol != frame.TCP
        or not value & _LSO_V2
        or where.is_ipv6 != bool(value & _LSO_IPV6)
        or where.transport != value >> 20 & 0x3FF
        or not 0 < mss < 65536
    ):
        return None
    frame.set_lengths(head, where, size)
    frame.set_pseudo_checksum(head, where, size)
    segmented = size - where.payload > mss
    return frame.Offload(
        flags=frame.NEEDS_CSUM,
        gso_type=(frame.GSO_TCPV6 if where.is_ipv6 else frame.GSO_TCPV4) if segmented else 0,
        hdr_len=where.payload,
        gso_size=mss if segmented else 0,
        csum_start=where.transport,
        csum_offset=16,
    )
