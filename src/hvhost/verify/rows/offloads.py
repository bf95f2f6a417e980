"""``offloads`` and ``lro``: work on large TCP segments and checksums that nobody does twice.

What arrives at the other end is told by that kernel's own AF_PACKET socket: how large frames are,
and whether their checksum was still to be made.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session
from hvhost.verify.wire import GUEST4, HOST4, Cable, cable, snmp

TRANSFER = 16 << 20
#: Bytes of a frame on average that say that segments are merged. How many are depends on how much
#: the guest lets the other end send at once, which is little where it is slow.
_MERGED_SIZE = 2 * 1500
_FEATURES = (
    "rx-checksumming",
    "tx-checksum-ipv4",
    "tx-checksum-ipv6",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
)
_BAD_PORT = 4711
#: TCP makes its segments as large as what it sends in a millisecond, which is little where
#: processors are emulated; this many MSS are the least, and nearly 64 KiB.
_LEAST_SEGMENTS, _SETTING = 44, "/proc/sys/net/ipv4/tcp_min_tso_segs"


def _features(wire: Cable) -> dict[str, str]:
    found = {}
    for line in wire.ethtool("-k").splitlines():
        name, _, value = line.strip().partition(": ")
        found[name] = value
    return found


def _ones_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _bad_udp(to_mac: str, from_mac: str, source: str, target: str, *, good: bool) -> str:
    """A UDP datagram in hexadecimal digits, its checksum right or wrong by one."""
    addresses = bytes(map(int, f"{source}.{target}".split(".")))
    body = struct.pack("!HHHH", 4712, _BAD_PORT, 16, 0) + b"corrupt?"
    pseudo = addresses + struct.pack("!HH", 17, len(body))
    total = (~_ones_sum(pseudo + body) & 0xFFFF) ^ (not good)
    body = body[:6] + struct.pack("!H", total) + body[8:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 17, 0) + addresses
    head = head[:10] + struct.pack("!H", ~_ones_sum(head) & 0xFFFF) + head[12:]
    macs = bytes.fromhex((to_mac + from_mac).replace(":", ""))
    return (macs + b"\x08\x00" + head + body).hex()


@contextlib.contextmanager
def _large_segments(wire: Cable) -> Iterator[None]:
    """Both ends' TCP makes them; the host's end is gone with its namespace."""
    wire.witness.set_kernel(_SETTING, str(_LEAST_SEGMENTS))
    before = wire.probe.read(_SETTING).strip()
    wire.guest(f"echo {_LEAST_SEGMENTS} > {_SETTING}")
    try:
        yield
    finally:
        wire.guest(f"echo {before} > {_SETTING}")


def _outgoing(wire: Cable) -> Iterator[str]:
    for ipv6 in (False, True):
        family = f"IPv{6 if ipv6 else 4}"
        wire.session.step(f"sending large segments over {family}")
        watcher = wire.witness.begin("watch", interface="tap0", seconds=90)
        retransmitted = _guest_snmp(wire, "Tcp", "RetransSegs")
        wire.transfer_out(TRANSFER, ipv6=ipv6)
        seen = watcher.result()
        if seen["largest"] < 60_000 or not seen["large"]:
            raise RowFailed(f"the largest {family} packet at the host had {seen['largest']} bytes")
        if not seen["csum_not_ready"]:
            raise RowFailed(f"no {family} frame arrived without its checksum made")
        again = _guest_snmp(wire, "Tcp", "RetransSegs") - retransmitted
        yield (
            f"{family}: {TRANSFER >> 20} MiB whole in {seen['frames']} frames; the host's kernel "
            f"saw {seen['large']} of more than 60,000 bytes, the largest {seen['largest']}, and "
            f"{seen['csum_not_ready']} whose checksum nobody had to make; {again} retransmitted"
        )


def _guest_snmp(wire: Cable, protocol: str, name: str) -> int:
    return snmp(wire.probe.read("/proc/net/snmp"), protocol, name)


def _corrupted(wire: Cable) -> Iterator[str]:
    wire.session.step("corrupting checksums")
    tap = wire.witness.command("ip", "-o", "link", "show", "tap0")
    tap_mac = tap.partition("link/ether ")[2].split()[0]
    mine = wire.info.mac
    counts = []
    for good in (False, True):
        inward = _bad_udp(mine, tap_mac, HOST4, GUEST4, good=good)
        before = _guest_snmp(wire, "Udp", "InCsumErrors"), _guest_snmp(wire, "Udp", "NoPorts")
        wire.witness.do("inject", interface="tap0", frame=inward)
        wire.await_ping()
        after = _guest_snmp(wire, "Udp", "InCsumErrors"), _guest_snmp(wire, "Udp", "NoPorts")
        outward = _bad_udp(tap_mac, mine, GUEST4, HOST4, good=good)
        host = wire.witness.snmp("Udp", "InCsumErrors")
        wire.guest(f"hvhost-frame $I {outward}")
        wire.await_ping()
        counts.append(
            (
                after[0] - before[0],
                after[1] - before[1],
                wire.witness.snmp("Udp", "InCsumErrors") - host,
            )
        )
    bad, right = counts
    if (bad[0], bad[2]) != (1, 1) or (right[0], right[2]) != (0, 0) or right[1] != 1:
        raise RowFailed(
            "corrupted checksums were not caught, or good ones were",
            [f"bad: {bad}, good: {right} (guest errors, guest arrivals, host errors)"],
        )
    yield (
        "corrupted: one datagram each way with a wrong checksum was counted as such by the "
        "receiving kernel, the same with the right one was not"
    )


def prove(session: Session) -> Iterator[str]:
    """Features on; 64 KiB segments and unmade checksums reach the host, bad ones are caught."""
    with cable(session) as wire, _large_segments(wire):
        features = _features(wire)
        off = [name for name in _FEATURES if not features.get(name, "").startswith("on")]
        if off:
            raise RowFailed(f"ethtool -k says off: {', '.join(off)}")
        yield f"ethtool -k: on are {', '.join(_FEATURES)}"
        yield from _outgoing(wire)
        yield from _corrupted(wire)
    yield "segmentation and checksum offload, IPv4 and IPv6; wrong checksums are caught both ways"


def _receive(wire: Cable, ipv6: bool) -> dict[str, Any]:
    """A transfer to the guest: frames and bytes that its driver received for it."""
    base = f"/sys/class/net/{wire.interface}/statistics/rx_"
    before = {name: int(wire.probe.read(base + name)) for name in ("packets", "bytes")}
    wire.transfer_in(TRANSFER, ipv6=ipv6)
    return {name: int(wire.probe.read(base + name)) - before[name] for name in before}


def _one_by_one(wire: Cable, ipv6: bool, family: str) -> str:
    """Segments that the other end's kernel cuts, and whose sums it makes, before they are sent."""
    wire.session.step(f"receiving segments one by one over {family}")
    wire.witness.do("offload", interface="tap0", on=False)
    sent = wire.witness.counter("tx_packets")
    counts = _receive(wire, ipv6)
    sent = wire.witness.counter("tx_packets") - sent
    wire.witness.do("offload", interface="tap0", on=True)
    size = counts["bytes"] // counts["packets"]
    if sent < TRANSFER // 1500 or size < _MERGED_SIZE:
        raise RowFailed(
            f"{family}: of {sent} segments that came one by one the guest got frames of {size} "
            f"bytes on average, {counts['packets']} of them"
        )
    return (
        f"{family}, segments sent one by one with their sums made: {sent} of them reached the "
        f"guest in {counts['packets']} frames of {size} bytes on average, whole by sha256"
    )


def prove_lro(session: Session) -> Iterator[str]:
    """LRO is on; segments arrive merged, whole by hash, and in their own size with it off."""
    with cable(session) as wire, _large_segments(wire):
        if not _features(wire).get("large-receive-offload", "").startswith("on"):
            raise RowFailed("ethtool -k says that large-receive-offload is off")
        yield "ethtool -k: large-receive-offload on, by the driver's own choice"
        for ipv6 in (False, True):
            family = f"IPv{6 if ipv6 else 4}"
            counts = {}
            for state in ("on", "off"):
                session.step(f"receiving over {family} with LRO {state}")
                wire.guest(f"ethtool -K $I lro {state}")
                counts[state] = _receive(wire, ipv6)
            merged, single = counts["on"], counts["off"]
            sizes = {state: each["bytes"] // each["packets"] for state, each in counts.items()}
            if sizes["on"] < _MERGED_SIZE or sizes["off"] > 1514:
                raise RowFailed(
                    f"{family}: frames of {sizes['on']} bytes with LRO, {sizes['off']} without"
                )
            wire.guest("ethtool -K $I lro on")
            yield (
                f"{family}: {TRANSFER >> 20} MiB whole by sha256 in {merged['packets']} frames of "
                f"{sizes['on']} bytes on average; with LRO off in {single['packets']} of "
                f"{sizes['off']}"
            )
            yield _one_by_one(wire, ipv6, family)
    yield "segments that belong together reach the guest as one frame, IPv4 and IPv6"
