"""Frames for tests, made by hand; and what an independent receiver thinks of them."""

from __future__ import annotations

import struct

from simulated.netvsc import MAC, PEER

SOURCE4, TARGET4 = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
SOURCE6, TARGET6 = bytes(15) + b"\1", bytes(15) + b"\2"


def ones_sum(data: bytes) -> int:
    """[RFC 1071], word by word."""
    data += bytes(len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ethernet(kind: int, body: bytes, *, to: bytes = PEER, sender: bytes = MAC) -> bytes:
    return to + sender + struct.pack("!H", kind) + body


def tcp(
    payload: bytes,
    *,
    ipv6: bool = False,
    ports: tuple[int, int] = (1000, 80),
    sequence: int = 7,
    flags: int = 0x18,
    to: bytes = PEER,
    sender: bytes = MAC,
    good: bool = True,
    protocol: int = 6,
) -> bytes:
    """A whole TCP (or, with *protocol* 17, UDP) frame; its sums are right if *good*."""
    if protocol == 6:
        head = struct.pack("!HHIIBBHHH", *ports, sequence, 9, 0x50, flags, 1000, 0, 0)
        where = 16
    else:
        head, where = struct.pack("!HHHH", *ports, 8 + len(payload), 0), 6
    segment = bytearray(head + payload)
    source, target = (SOURCE6, TARGET6) if ipv6 else (SOURCE4, TARGET4)
    pseudo = source + target + struct.pack("!II", len(segment) & 0xFFFF, protocol)
    if good:
        struct.pack_into("!H", segment, where, ~ones_sum(pseudo + bytes(segment)) & 0xFFFF)
    if ipv6:
        ip = struct.pack("!IHBB", 6 << 28, len(segment) & 0xFFFF, protocol, 64) + source + target
        return ethernet(0x86DD, ip + bytes(segment), to=to, sender=sender)
    size = 20 + len(segment) & 0xFFFF
    ip4 = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, size, 1, 0, 64, protocol, 0))
    ip4 += source + target
    struct.pack_into("!H", ip4, 10, ~ones_sum(bytes(ip4)) & 0xFFFF)
    return ethernet(0x0800, bytes(ip4) + bytes(segment), to=to, sender=sender)


def sums_are_right(data: bytes) -> bool:
    """Whether an IPv4 or IPv6 frame's checksums and lengths are what they must be."""
    if data[12:14] == b"\x08\x00":
        size = (data[14] & 15) * 4
        if ones_sum(data[14 : 14 + size]) != 0xFFFF:
            return False
        if struct.unpack_from("!H", data, 16)[0] != len(data) - 14:
            return False
        addresses, protocol, start = data[26:34], data[23], 14 + size
    else:
        if struct.unpack_from("!H", data, 18)[0] != len(data) - 54:
            return False
        addresses, protocol, start = data[22:54], data[20], 54
    pseudo = addresses + struct.pack("!II", len(data) - start, protocol)
    return ones_sum(pseudo + data[start:]) == 0xFFFF
