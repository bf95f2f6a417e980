"""Frames of a guest on their way to the wire: what it asks to be done is written before them."""

from __future__ import annotations

import functools
import struct
from typing import Final, NamedTuple

from hvhost.network import frame, rndis
from hvhost.network.buffers import Span
from hvhost.network.rndis import DataMessage
from hvhost.network.state import AdapterState

_HEAD = rndis.PACKET_SIZE + rndis.PER_PACKET_INFO_LIMIT
#: What of a message is read first: its header, the usual information, and the frame's headers.
_USUAL_HEAD = 288
#: RNDIS messages in one packet; the host offers 8, a section has room for more.
MESSAGES_PER_PACKET: Final = 256
#: More information than this needs a longer head.
_USUAL_INFO: Final = 64
_DATA_MESSAGE: Final = b"\1\0\0\0"
#: Where the information begins: behind the header, counted from the body.
_USUAL_OFFSET: Final = (rndis.PACKET_SIZE - rndis.HEADER_SIZE).to_bytes(4, "little")
_ADDRESSES: Final = 12
_LSO_V2 = 1 << 30
_LSO_IPV6 = 1 << 31
#: The largest length that an IP header can name.
_IP_LIMIT: Final = 65535

Buffers = list[bytes | bytearray | memoryview]


class Shape(NamedTuple):
    """What all messages have in common that differ in nothing but their lengths.

    ``begin`` is where the frame starts, ``least`` how long it must be for ``header``, which goes
    before it; ``header`` is ``None`` if its own headers have to be worked on, for ``large_send`` if
    that is all they are worked on for.
    """

    begin: int
    least: int
    header: bytes | None
    large_send: int | None


#: Messages look alike: what was decoded once is remembered, up to so many. A guest that makes up
#: others all the time only pays for decoding them.
SHAPE_LIMIT: Final = 512
_shapes: dict[bytes, Shape] = {}
_LENGTHS = struct.Struct("<I4xI")


def _learn(head: bytes, message: DataMessage) -> None:
    """Remember the shape of a message that was decoded, if all of it can be seen in *head*."""
    if rndis.info_size(head) > _USUAL_INFO or head[28:32] != _USUAL_OFFSET:
        return
    if message.data_offset > _USUAL_HEAD - _ADDRESSES:
        return
    header: bytes | None = None
    least = frame.ETHERNET_HEADER
    wants = message.checksum or 0
    if (
        message.large_send is None
        and message.vlan is None
        and not wants & rndis.TRANSMIT_IP_HEADER_CHECKSUM
    ):
        header = _checksum(wants, frame.FRAME_LIMIT)
        if header is not None and header is not frame.NO_OFFLOAD:
            least = (wants >> 16 & 0x3FF) + frame.unpack_offload(header).csum_offset + 2
    large_send = message.large_send if message.vlan is None else None
    shape = Shape(message.data_offset, least, header, large_send)
    if len(_shapes) >= SHAPE_LIMIT:
        _shapes.clear()
    # All but the two lengths, up to the end of the information.
    _shapes[head[8:12] + head[16 : rndis.PACKET_SIZE + head[32]]] = shape


def frames(state: AdapterState, span: Span, end: int, *, may_spoof: bool) -> list[Buffers]:
    """The frames in the first *end* bytes of *span*, each with its offload header, to be written.

    Their data stay where they are, in the guest's memory; only headers are copied, and what was
    checked is what is written. Frames that may not be sent are counted and left out.
    :class:`hvhost.errors.RemoteProtocolError` if the bytes are not made of RNDIS data messages;
    nothing is sent then.
    """
    found: list[Buffers] = []
    position = count = total = 0
    while position < end and count < MESSAGES_PER_PACKET:
        count += 1
        left = end - position
        shape: Shape | None = None
        head = span.read(position, left if left < _USUAL_HEAD else _USUAL_HEAD)
        if len(head) >= rndis.PACKET_SIZE and head[:4] == _DATA_MESSAGE:
            shape = _shapes.get(head[8:12] + head[16 : rndis.PACKET_SIZE + head[32]])
            if shape is not None and (
                (header := shape.header) is not None or shape.large_send is not None
            ):
                length, size = _LENGTHS.unpack_from(head, 4)
                begin = shape.begin
                if (
                    length <= left
                    and shape.least <= size <= frame.FRAME_LIMIT
                    and begin + size <= length
                    and rndis.PACKET_SIZE + head[32] <= length
                ):
                    at = position + begin
                    made: Buffers | None
                    if header is not None:
                        made = _usual(span, at, head, header, begin, size)
                    else:
                        made = _to_be_segmented(
                            state, span, at, head[begin:], size, shape.large_send or 0
                        )
                    if made is None:
                        state.counters.transmit_errors += 1
                    elif may_spoof or made[1][6:12] == state.mac:
                        found.append(made)
                        total += size
                    else:
                        state.counters.spoofed += 1
                    position += length
                    continue
            if rndis.info_size(head) > _USUAL_INFO:
                head = span.read(position, _HEAD)
        message = rndis.decode_packet(head, left)
        if shape is None:
            _learn(head, message)
        made = _frame_buffers(state, span, position, head, message, may_spoof)
        if made is not None:
            found.append(made)
            total += message.data_length
        position += message.length
    state.counters.transmitted += len(found)
    state.counters.transmitted_bytes += total
    return found


def _usual(span: Span, at: int, head: bytes, header: bytes, begin: int, size: int) -> Buffers:
    """A frame whose headers are as they have to be: a short one copied, of others the addresses."""
    if begin + size <= len(head):
        return [header, head[begin : begin + size]]
    copied = head[begin : begin + _ADDRESSES]
    return [header, copied, *span.slice(at + _ADDRESSES, size - _ADDRESSES)]


def _to_be_segmented(
    state: AdapterState, span: Span, at: int, start: bytes, size: int, large_send: int
) -> Buffers | None:
    """A frame, of which *start* is a copy, with its headers made whole; ``None`` if it has none."""
    copied = min(frame.HEAD_SIZE, size)
    head = bytearray(start[:copied] if len(start) >= copied else span.read(at, copied))
    header = _large_send(head, large_send, size)
    if header is None:
        return None
    state.counters.large_sends += header[1] != frame.GSO_NONE
    return [header, head, *(span.slice(at + copied, size - copied) if copied < size else ())]


def _frame_buffers(
    state: AdapterState,
    span: Span,
    start: int,
    copy: bytes,
    message: DataMessage,
    may_spoof: bool,
) -> Buffers | None:
    """A frame ready to be written; ``None`` for one to be dropped.

    *copy* is how its message, at *start* of *span*, starts.
    """
    _, offset, size, wants, large_send, vlan, _ = message
    at, frame_start = start + offset, copy[offset:]
    made: Buffers | None = None
    if not frame.ETHERNET_HEADER <= size <= frame.FRAME_LIMIT:
        pass
    elif large_send is not None:
        made = _to_be_segmented(state, span, at, frame_start, size, large_send)
    else:
        made = _to_be_sent(span, at, frame_start, size, wants)
    if made is None:
        state.counters.transmit_errors += 1
        return None
    if not may_spoof and made[1][6:12] != state.mac:
        state.counters.spoofed += 1
        return None
    return made if vlan is None else _tagged(made, vlan)


def _to_be_sent(span: Span, at: int, start: bytes, size: int, wants: int | None) -> Buffers | None:
    """A frame, of which *start* is a copy, with the sums made or asked for that it *wants*."""
    head: bytes | bytearray
    if not (wants or 0) & rndis.TRANSMIT_IP_HEADER_CHECKSUM:
        copied = size if size <= len(start) else _ADDRESSES
        head = start[:copied] if len(start) >= copied else span.read(at, copied)
        header = frame.NO_OFFLOAD if wants is None else _checksum(wants, size)
    else:
        copied = min(frame.HEAD_SIZE, size)
        head = bytearray(start[:copied] if len(start) >= copied else span.read(at, copied))
        if where := frame.parse(head):
            frame.set_ip_checksum(head, where)
        header = _checksum(wants or 0, size)
    if header is None:
        return None
    return [header, head, *(span.slice(at + copied, size - copied) if copied < size else ())]


def _tagged(made: Buffers, vlan: int) -> Buffers:
    """The frame with a VLAN tag, and what is asked of the wire counted from behind that."""
    header, head, *body = made
    if header is not frame.NO_OFFLOAD:
        offload = frame.unpack_offload(header)
        header = offload._replace(
            csum_start=offload.csum_start + frame.TAG_SIZE,
            hdr_len=offload.hdr_len + frame.TAG_SIZE if offload.hdr_len else 0,
        ).pack()
    tag = frame.ETHERTYPE_TAG + rndis.tag_of_info(vlan).to_bytes(2, "big")
    return [header, head[:12], tag, head[12:], *body]


def _checksum(value: int, size: int) -> bytes | None:
    """What a checksum request asks of the wire; ``None`` if it points outside the frame."""
    if value & rndis.TRANSMIT_TCP_CHECKSUM:
        field = 16
    elif value & rndis.TRANSMIT_UDP_CHECKSUM:
        field = 6
    else:
        return frame.NO_OFFLOAD
    offset = value >> 16 & 0x3FF
    if offset < frame.ETHERNET_HEADER or offset + field + 2 > size:
        return None
    return _needs_checksum(offset, field)


@functools.lru_cache(maxsize=2 * 1024)  # all that a guest can name
def _needs_checksum(offset: int, field: int) -> bytes:
    return frame.Offload(flags=frame.NEEDS_CSUM, csum_start=offset, csum_offset=field).pack()


def _large_send(head: bytearray, value: int, size: int) -> bytes | None:
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
        or (size - where.network > _IP_LIMIT and not where.is_ipv6)
    ):
        return None
    frame.finish_large_send(head, where, size)
    return _to_segment(where, mss if size - where.payload > mss else 0)


@functools.lru_cache(maxsize=SHAPE_LIMIT)
def _to_segment(where: frame.Headers, size: int) -> bytes:
    """The request to make TCP segments of *size* bytes, or with 0 the one there is."""
    return frame.Offload(
        flags=frame.NEEDS_CSUM,
        gso_type=(frame.GSO_TCPV6 if where.is_ipv6 else frame.GSO_TCPV4) if size else 0,
        hdr_len=where.payload,
        gso_size=size,
        csum_start=where.transport,
        csum_offset=16,
    ).pack()
