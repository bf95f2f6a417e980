"""Which TCP segments belong together: receive segment coalescing, no memory and no sockets.

Segments that follow each other and differ in nothing but sequence, length, sums and PSH are one
large frame to a guest that wants that ([MS-NDIS] "Receive Segment Coalescing"; what Linux demands
of segments it merges, ``net/ipv4/tcp_offload.c``, is demanded here). Sums are checked before: what
is merged is vouched for, and a wrong segment goes to the guest alone, as it came.
"""

from __future__ import annotations

import struct
from typing import Final

from hvhost.network import frame

_ACK, _PSH = 0x10, 0x08
#: Bytes of an IP packet: what its length field can say.
_IP_LIMIT: Final = 65535
#: Segments of one frame; Linux takes up to 562 pieces of one.
SEGMENT_LIMIT: Final = 64
_U32 = struct.Struct("!I")
_U16 = struct.Struct("!H")


def payload_size(head: bytes, where: frame.Headers) -> int:
    """Bytes of TCP payload, as the IP header says; negative if its length cannot be."""
    if where.is_ipv6:
        end = where.network + 40 + int(_U16.unpack_from(head, where.network + 4)[0])
    else:
        end = where.network + int(_U16.unpack_from(head, where.network + 2)[0])
    return end - where.payload


def _likeness(head: bytes, where: frame.Headers) -> bytes:
    """What must be the same in all segments of a frame, one behind the other."""
    ip, tcp = where.network, where.transport
    if where.is_ipv6:  # up to the length; next header to addresses
        network = head[: ip + 4] + head[ip + 6 : tcp]
    else:  # up to the length; fragment, TTL and protocol; addresses
        network = head[: ip + 2] + head[ip + 6 : ip + 10] + head[ip + 12 : tcp]
    # Ports; acknowledgement and header length; window; options.
    return b"".join(
        (
            network,
            head[tcp : tcp + 4],
            head[tcp + 8 : tcp + 13],
            head[tcp + 14 : tcp + 16],
            head[tcp + 18 : where.payload],
        )
    )


def mergeable(head: bytes, where: frame.Headers, size: int) -> bool:
    """Whether a frame of *size* bytes may be a part of a larger one: plain data, no padding."""
    return (
        where.protocol == frame.TCP
        and head[where.transport + 13] & ~_PSH == _ACK
        and payload_size(head, where) == size - where.payload > 0
    )


class Train:
    """Segments in a row, beginning with one; *head* starts with its untagged Ethernet header."""

    __slots__ = ("_likeness", "_next", "_open", "count", "head", "payload", "segment", "where")

    def __init__(self, head: bytes, where: frame.Headers, size: int) -> None:
        self.head, self.where = head, where
        #: Bytes of payload of the first segment, and of all.
        self.segment = self.payload = size - where.payload
        self.count = 1
        self._likeness = _likeness(head, where)
        self._next = self._after(head, self.payload)
        self._open = not head[where.transport + 13] & _PSH

    def _after(self, head: bytes, payload: int) -> int:
        sequence: int = _U32.unpack_from(head, self.where.transport + 4)[0]
        return sequence + payload & 0xFFFFFFFF

    def take(self, head: bytes, where: frame.Headers, size: int) -> bool:
        """Whether the mergeable frame *head* of *size* bytes follows; it is counted in then."""
        payload = size - where.payload
        if (
            not self._open
            or where != self.where
            or payload > self.segment
            or self.count >= SEGMENT_LIMIT
            or where.payload - where.network + self.payload + payload > _IP_LIMIT
            or _U32.unpack_from(head, where.transport + 4)[0] != self._next
            or _likeness(head, where) != self._likeness
        ):
            return False
        self.payload += payload
        self.count += 1
        self._next = self._next + payload & 0xFFFFFFFF
        # A short one, and one that is to be handed up at once, are the last.
        pushed = head[where.transport + 13] & _PSH
        self._open = payload == self.segment and not pushed
        if pushed:
            pushing = bytearray(self.head)
            pushing[where.transport + 13] |= _PSH
            self.head = bytes(pushing)
        return True

    def headers(self) -> bytearray:
        """The headers of the whole: its length, and the sum of an IPv4 header."""
        whole = bytearray(self.head[: self.where.payload])
        frame.set_lengths(whole, self.where, self.where.payload + self.payload)
        return whole
