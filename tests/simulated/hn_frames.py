"""Frames of FreeBSD's driver: what it asks of the host with one, and how it takes one.

Source: ``hn_encap()``, ``hn_nvs_handle_rxbuf()``, ``hn_rndis_rx_data()`` and ``hn_rndis_rxinfo()``
of ``if_hn.c``, FreeBSD 14. What it would drop or panic at is an assertion here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hvhost.partition.memory import GuestMemory
from simulated.netvsc import Received

HN_NVS_RXBUF_SIG = 0xCAFE
HN_NVS_RSC_MAX = 562
_PKTINFO_ID = 1 << 31 | 1
_FRAGMENT, _FIRST, _LAST = 1, 2, 4


def txcsum(thoff: int, flags: int) -> tuple[int, int]:
    """NDIS_TXCSUM_INFO_MKL4CS() as per-packet information."""
    return 0, thoff << 16 | flags


def lso(thoff: int, mss: int, *, ipv6: bool) -> tuple[int, int]:
    """NDIS_LSO2_INFO_MAKEIPV4() and …IPV6()."""
    return 2, mss | thoff << 20 | 1 << 30 | ipv6 << 31


@dataclass(frozen=True)
class Rxbuf:
    """The receive buffer, *size* bytes from *base* on."""

    memory: GuestMemory
    base: int
    size: int

    def take(self, header: bytes, ring: int) -> tuple[list[Received], list[bytes]]:
        """Frames of a packet of ranges for *ring*, fragments joined; and other messages in it."""
        signature, _, _, count = struct.unpack_from("<HBBI", header)
        assert signature == HN_NVS_RXBUF_SIG and len(header) >= 8 + 8 * count
        frames: list[Received] = []
        others: list[bytes] = []
        parts: list[bytes] = []
        infos: dict[int, int] = {}
        for index in range(count):
            size, offset = struct.unpack_from("<II", header, 8 + 8 * index)
            assert offset + size <= self.size
            message = self.memory.read(self.base + offset, size)
            if struct.unpack_from("<I", message)[0] != 1:
                others.append(message)
                continue
            data, found = rx_data(message)
            flags = found.pop(_PKTINFO_ID, 0) >> 8
            if not flags & _FRAGMENT:
                parts = []
                frames.append(Received(data, found, ring))
                continue
            if flags & _FIRST:
                parts, infos = [], found
            else:
                assert parts, "a fragment without its first is dropped"
            assert flags & _LAST or index < count - 1, "so is one whose last is in another packet"
            parts.append(data)
            assert len(parts) <= HN_NVS_RSC_MAX
            if flags & _LAST:
                frames.append(Received(b"".join(parts), infos, ring, fragments=len(parts)))
                parts = []
        return frames, others


def rx_data(message: bytes) -> tuple[bytes, dict[int, int]]:
    """hn_rndis_rx_data() and hn_rndis_rxinfo(): frame and information, each check of theirs."""
    assert len(message) >= 44
    _, length, offset, size, oob_offset, oob_size, _, info_offset, info_size, _, _ = (
        struct.unpack_from("<11I", message)
    )
    assert len(message) >= length >= size + oob_size + info_size and size
    assert offset >= 36 and oob_size == oob_offset == 0
    assert info_offset == 0 or (info_offset >= 36 and info_offset % 4 == 0)
    start, infos_start = 8 + offset, 8 + info_offset
    assert start + size <= length
    infos: dict[int, int] = {}
    if info_size:
        assert infos_start + info_size <= length
        assert infos_start + info_size <= start or start + size <= infos_start, "they overlap"
    position, left = infos_start, info_size
    while left:
        assert left >= 12
        item, kind, value = struct.unpack_from("<III", message, position)
        assert item <= left and item % 4 == 0 and item - value >= 4 and value == 12
        infos[kind] = struct.unpack_from("<I", message, position + 12)[0]
        position, left = position + item, left - item
    return message[start : start + size], infos
