"""Frames between a network adapter and what it is plugged into, and the work on their headers.

A frame travels with a ``struct virtio_net_hdr`` before it ([VIRTIO] 5.1.6, ``linux/virtio_net.h``),
as Linux's tap devices have it, so that a checksum not computed yet and a TCP segment of 64 KiB go
through whole. An 802.1Q tag stands in the frame itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

ETHERNET_HEADER: Final = 14
IPV6_HEADER: Final = 40
TAG_SIZE: Final = 4
#: Bytes of the largest frame: a whole IP packet of 64 KiB, tagged.
FRAME_LIMIT: Final = 65536 + ETHERNET_HEADER + TAG_SIZE
#: What :func:`parse` needs of a frame to see everything it looks at.
HEAD_SIZE: Final = 154
ETHERTYPE_TAG: Final = b"\x81\x00"
IPV4: Final = b"\x08\x00"
IPV6: Final = b"\x86\xdd"
TCP: Final = 6
UDP: Final = 17

NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

_LAYOUT = struct.Struct("<BBHHHH")
VIRTIO_NET_HDR_SIZE: Final = _LAYOUT.size


class Offload(NamedTuple):
    """``struct virtio_net_hdr``: what is still to be done to the frame behind it.

    With ``NEEDS_CSUM`` in *flags* the sum from *csum_start* on is to be stored at *csum_offset*
    behind that; *gso_size* is the payload of each segment.
    """

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)

    @property
    def segmented(self) -> bool:
        """The frame is more than one segment."""
        return self.gso_type & ~GSO_ECN != GSO_NONE


NOTHING: Final = Offload()
NO_OFFLOAD: Final = NOTHING.pack()


def unpack_offload(data: bytes | bytearray | memoryview) -> Offload:
    """The header in the first bytes of *data*."""
    return Offload._make(_LAYOUT.unpack_from(data))


def checksum(*pieces: bytes | bytearray | memoryview) -> int:
    """The Internet checksum's sum ([RFC 1071]) of *pieces*, of which only the last may be odd.

    Not inverted. Zero stands for both zeros of one's complement unless all is zero.
    """
    total = 0
    for piece in pieces:
        value = int.from_bytes(piece, "big")
        if len(piece) & 1:
            value <<= 8
        # Sixteen-bit words added with end-around carry are a remainder by 0xFFFF.
        total += (value % 0xFFFF) or (0xFFFF if value else 0)
    return (total % 0xFFFF) or (0xFFFF if total else 0)


class Headers(NamedTuple):
    """Where a TCP or UDP frame's headers are, in bytes from its start."""

    network: int
    transport: int
    payload: int
    is_ipv6: bool
    protocol: int


_PLAIN_IPV4: Final = IPV4 + b"\x45"
_PLAIN_SIZE: Final = 54
#: Headers of TCP over IPv4 without options of IP, by the length of TCP's in words.
_PLAIN_TCP: Final = {
    words: Headers(14, 34, 34 + 4 * words, is_ipv6=False, protocol=TCP) for words in range(5, 16)
}


def ethertype_offset(head: bytes | bytearray) -> int:
    """Where the type of what the frame carries stands: behind a tag if it has one."""
    return 16 if head[12:14] == ETHERTYPE_TAG else 12


def parse(head: bytes | bytearray) -> Headers | None:
    """The headers of a TCP or UDP frame; ``None`` for any other, fragments, and broken ones."""
    if (
        head[12:15] == _PLAIN_IPV4
        and len(head) >= _PLAIN_SIZE
        and head[23] == TCP
        and not head[20] & 0x3F
        and not head[21]
        and (usual := _PLAIN_TCP.get(head[46] >> 4)) is not None
        and len(head) >= usual.payload
    ):
        return usual  # untagged, no IP options: nearly all frames
    start = ethertype_offset(head) + 2
    kind = bytes(head[start - 2 : start])
    if kind == IPV4:
        if len(head) < start + 20 or head[start] >> 4 != 4:
            return None
        transport = start + (head[start] & 0xF) * 4
        protocol = head[start + 9]
        if transport < start + 20 or head[start + 6] & 0x3F or head[start + 7]:
            return None
    elif kind == IPV6:
        if len(head) < start + IPV6_HEADER or head[start] >> 4 != 6:
            return None
        transport, protocol = start + IPV6_HEADER, head[start + 6]
    else:
        return None
    if protocol == TCP:
        if len(head) < transport + 20:
            return None
        payload = transport + (head[transport + 12] >> 4) * 4
        if payload < transport + 20:
            return None
    elif protocol == UDP:
        payload = transport + 8
    else:
        return None
    if len(head) < payload:
        return None
    return Headers(start, transport, payload, kind == IPV6, protocol)


def _pseudo(head: bytes | bytearray, where: Headers, length: int) -> int:
    """The sum of the pseudo header of a transport header and *length* bytes in all."""
    first = where.network + (8 if where.is_ipv6 else 12)
    addresses = bytes(head[first : first + (32 if where.is_ipv6 else 8)])
    return checksum(addresses, struct.pack("!HH", where.protocol, length & 0xFFFF))


def set_lengths(head: bytearray, where: Headers, frame_length: int) -> None:
    """Write the IP header's length, and the checksum of IPv4's."""
    start = where.network
    if where.is_ipv6:
        struct.pack_into("!H", head, start + 4, frame_length - start - IPV6_HEADER)
        return
    struct.pack_into("!H", head, start + 2, frame_length - start)
    set_ip_checksum(head, where)


_PLAIN_WORDS = struct.Struct("!10H")
_U16 = struct.Struct("!H")
_PLAIN_IP_SIZE: Final = 20


def finish_large_send(head: bytearray, where: Headers, frame_length: int) -> None:
    """Write what a large send leaves open: the IP header's length and sum, TCP's pseudo sum."""
    start = where.network
    if where.is_ipv6 or where.transport - start != _PLAIN_IP_SIZE:
        set_lengths(head, where, frame_length)
        set_pseudo_checksum(head, where, frame_length)
        return
    # The usual one: every word is read once, and both sums are made of them.
    first, _, identifier, fragment, life, _, *addresses = _PLAIN_WORDS.unpack_from(head, start)
    length = frame_length - start
    both = sum(addresses)
    total = (first + length + identifier + fragment + life + both) % 0xFFFF
    _U16.pack_into(head, start + 2, length)
    _U16.pack_into(head, start + 10, 0xFFFF - total if total else 0)
    pseudo = (both + TCP + length - _PLAIN_IP_SIZE) % 0xFFFF
    _U16.pack_into(head, where.transport + 16, pseudo or 0xFFFF)


def set_ip_checksum(head: bytearray, where: Headers) -> None:
    """Compute the checksum of an IPv4 header."""
    start = where.network
    head[start + 10 : start + 12] = b"\0\0"
    total = checksum(memoryview(head)[start : where.transport])
    struct.pack_into("!H", head, start + 10, ~total & 0xFFFF)


def _checksum_at(where: Headers) -> int:
    return where.transport + (16 if where.protocol == TCP else 6)


def set_pseudo_checksum(head: bytearray, where: Headers, frame_length: int) -> None:
    """Store what ``NEEDS_CSUM`` expects in the checksum field: the pseudo header's sum."""
    total = _pseudo(head, where, frame_length - where.transport)
    struct.pack_into("!H", head, _checksum_at(where), total)


def tcp_sum_is_right(head: bytes | bytearray, where: Headers, segment: bytes | memoryview) -> bool:
    """Whether the TCP checksum of *segment*, header and payload, is what it must be."""
    # In the other byte order, where the sum of words is the same and an odd end needs no zero.
    first = where.network + (8 if where.is_ipv6 else 12)
    total = int.from_bytes(segment, "little")
    total += int.from_bytes(head[first : first + (32 if where.is_ipv6 else 8)], "little")
    total += (TCP << 8) + ((len(segment) & 0xFF) << 8 | len(segment) >> 8)
    return total % 0xFFFF == 0


def finish_checksum(frame: bytearray, offload: Offload) -> None:
    """Do what ``NEEDS_CSUM`` asks for; without effect if the header points outside the frame."""
    start, field = offload.csum_start, offload.csum_start + offload.csum_offset
    if not offload.flags & NEEDS_CSUM or field + 2 > len(frame):
        return
    with memoryview(frame) as view:
        value = ~checksum(view[start:]) & 0xFFFF
    # Of UDP's two zeros, the one that does not mean "no checksum".
    struct.pack_into("!H", frame, field, value or 0xFFFF)


def segments(frame: bytes | bytearray | memoryview, offload: Offload) -> Iterator[bytearray]:
    """The frame as those that take no offload see it: in segments, with all checksums.

    Gives nothing for a frame whose headers are not what *offload* says.
    """
    if not offload.segmented:
        whole = bytearray(frame)
        finish_checksum(whole, offload)
        yield whole
        return
    size = offload.gso_size
    where = parse(bytes(frame[:HEAD_SIZE]))
    if where is None or not size:
        return
    kind = offload.gso_type & ~GSO_ECN
    if where.protocol != (UDP if kind == GSO_UDP_L4 else TCP) or kind == GSO_UDP:
        return
    template = bytes(frame[: where.payload])
    total = len(frame)
    sequence = int.from_bytes(template[where.transport + 4 : where.transport + 8], "big")
    identifier = int.from_bytes(template[where.network + 4 : where.network + 6], "big")
    with memoryview(frame) as view:
        for number, start in enumerate(range(where.payload, total, size)):
            end = min(start + size, total)
            segment = bytearray(template)
            segment += view[start:end]
            length = len(segment)
            if not where.is_ipv6:
                struct.pack_into("!H", segment, where.network + 4, identifier + number & 0xFFFF)
            set_lengths(segment, where, length)
            if where.protocol == TCP:
                offset = start - where.payload
                struct.pack_into("!I", segment, where.transport + 4, sequence + offset & 0xFFFFFFFF)
                flags = segment[where.transport + 13]
                if end < total:
                    flags &= ~0x09  # FIN and PSH belong to the last one
                if number:
                    flags &= ~0x80  # CWR to the first
                segment[where.transport + 13] = flags
            else:
                struct.pack_into("!H", segment, where.transport + 4, length - where.transport)
            set_pseudo_checksum(segment, where, length)
            finish_checksum(
                segment,
                Offload(
                    flags=NEEDS_CSUM,
                    csum_start=where.transport,
                    csum_offset=_checksum_at(where) - where.transport,
                ),
            )
            yield segment
