"""The Toeplitz hash of received frames, by which a guest spreads them over its processors.

Source: [MS-NDIS] "RSS hashing functions"; the hash types are those a guest sets
(:class:`hvhost.network.ndis.ReceiveScaling`).
"""

from __future__ import annotations

from typing import Final

from hvhost.network.ndis import (
    HASH_IPV4,
    HASH_IPV6,
    HASH_TCP_IPV4,
    HASH_TCP_IPV6,
    RSS_HASH_TOEPLITZ,
    ReceiveScaling,
)
from hvhost.network.rndis import InfoType, information_item

#: Flows whose hash is remembered.
CACHE_LIMIT: Final = 4096
_KINDS: Final = {8: HASH_IPV4, 12: HASH_TCP_IPV4, 32: HASH_IPV6, 36: HASH_TCP_IPV6}  # by size
_FRAGMENT = 0x3FFF
_TCP = 6


def toeplitz(key: bytes, data: bytes) -> int:
    """The hash of *data*, which is at least 4 bytes shorter than *key*."""
    bits = int.from_bytes(key, "big")
    width = 8 * len(key)
    result = 0
    for index, byte in enumerate(data):
        for bit in range(8):
            if byte & 0x80 >> bit:
                result ^= bits >> width - 32 - (8 * index + bit) & 0xFFFFFFFF
    return result


def hash_input(head: bytes, hash_types: int) -> bytes:
    """What of a frame is hashed: addresses, and ports of TCP; empty if nothing is.

    *head* is the start of an untagged frame: 54 bytes for IPv4, 74 for IPv6, or all of it.
    """
    kind = head[12:14]
    if kind == b"\x08\x00" and len(head) >= 34:
        size = (head[14] & 0xF) * 4
        ports = 14 + size
        fragment = int.from_bytes(head[20:22], "big") & _FRAGMENT
        whole = not fragment and size >= 20 and len(head) >= ports + 4
        if head[23] == _TCP and hash_types & HASH_TCP_IPV4 and whole:
            return head[26:34] + head[ports : ports + 4]
        return head[26:34] if hash_types & HASH_IPV4 else b""
    if kind == b"\x86\xdd" and len(head) >= 54:
        if head[20] == _TCP and hash_types & HASH_TCP_IPV6 and len(head) >= 58:
            return head[22:58]
        return head[22:54] if hash_types & HASH_IPV6 else b""
    return b""


class FlowTable:
    """The channel and the hash of each frame, as *scaling* says."""

    def __init__(self, scaling: ReceiveScaling) -> None:
        self.scaling = scaling
        self._known: dict[bytes, tuple[int, bytes]] = {}

    def look_up(self, head: bytes) -> tuple[int, bytes]:
        """Channel number of a frame, and per-packet information of its hash: none, and channel 0,
        for one that is not hashed.
        """
        scaling = self.scaling
        if not scaling.table:
            return 0, b""
        data = hash_input(head, scaling.hash_types)
        if not data:
            return 0, b""
        found = self._known.get(data)
        if found is None:
            if len(self._known) >= CACHE_LIMIT:  # a flood of flows only costs their hashes
                self._known.clear()
            value, kind = toeplitz(scaling.key, data), _KINDS[len(data)]
            infos = information_item(InfoType.NBL_HASH_VALUE, value)
            infos += information_item(InfoType.NBL_HASH_INFO, kind | RSS_HASH_TOEPLITZ)
            found = scaling.table[value & len(scaling.table) - 1], infos
            self._known[data] = found
        return found
