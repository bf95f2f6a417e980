"""NAT for the machines of a switch: a passt for each of them.

passt serves one machine: it gives everybody the same address, answers for every other one, and
sends to whoever spoke last. So each machine behind the switch, known by its hardware address, gets
a passt of its own, with an address of its own in a network that all share and the same gateway.
What machines say to each other passes the switch alone: a passt gets only what is for the gateway,
and the questions that only it may answer. Machines are not trusted: there are at most
:data:`MEMBER_LIMIT`, of which the one not heard of for the longest time makes room.
"""

from __future__ import annotations

import ipaddress
import logging
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import frame
from hvhost.network.config import AdapterConfig
from hvhost.network.passt import START_SECONDS, Lease, PasstWire, end_passt, start_passt
from hvhost.network.switch import TokenBucket
from hvhost.network.transmit import Buffers

logger = logging.getLogger(__name__)

#: The gateway's address where the switch names none; for IPv6 it is always this network.
NAT_ADDRESS: Final = "192.168.78.1/24"
NAT_PREFIX: Final = ipaddress.IPv6Address("fd00:6876:6e61:7400::")
ROUTER: Final = ipaddress.IPv6Address("fe80::1")
GATEWAY_MAC: Final = bytes.fromhex("02155d4e4154")
MEMBER_LIMIT: Final = 64
#: Frames that may wait for one passt.
QUEUE_LIMIT: Final = 512
#: Seconds in which a passt that ended is not started anew.
RETRY_SECONDS: Final = 5.0
#: Machines never heard of before that get a passt, a second, once :data:`MEMBER_LIMIT` had one.
NEWCOMER_RATE: Final = 1.0

#: What :func:`for_gateway` looks at: Ethernet, an IPv6 header, a question for a neighbour.
HEAD_SIZE: Final = frame.ETHERNET_HEADER + 40 + 24
_ARP, _UDP_DHCP, _UDP_DHCP6 = b"\x08\x06", 67, 547
_ICMP6, _ROUTER_SOLICITATION, _NEIGHBOR_SOLICITATION = 58, 133, 135


def for_gateway(head: bytes, own: ipaddress.IPv4Address) -> bool:
    """Whether a passt may see a frame; *head* is its beginning, *own* the gateway's address.

    *head* has :data:`HEAD_SIZE` bytes; a shorter frame is filled up with zeros.
    """
    if head[:6] == GATEWAY_MAC:
        return head[12:14] in (_ARP, frame.IPV4, frame.IPV6)
    if not head[0] & 1:
        return False
    kind, packet = head[12:14], head[frame.ETHERNET_HEADER :]
    if kind == _ARP:
        return packet[24:28] == own.packed
    if kind == frame.IPV4:
        size = (packet[0] & 15) * 4
        return packet[9] == frame.UDP and _port(packet, size) == _UDP_DHCP
    if kind == frame.IPV6:
        if packet[6] == frame.UDP:
            return _port(packet, 40) == _UDP_DHCP6
        if packet[6] == _ICMP6:
            asked = packet[40] == _NEIGHBOR_SOLICITATION and packet[48:64] == ROUTER.packed
            return asked or packet[40] == _ROUTER_SOLICITATION
    return False


def _port(packet: bytes, at: int) -> int:
    """Where a UDP datagram goes whose header is *at* there."""
    return int.from_bytes(packet[at + 2 : at + 4], "big")


def _head(buffers: Buffers) -> bytes:
    """The beginning of a frame, without the offload header before it."""
    found = b""
    for each in buffers:
        found += bytes(each[: frame.VIRTIO_NET_HDR_SIZE + HEAD_SIZE - len(found)])
    return found[frame.VIRTIO_NET_HDR_SIZE :].ljust(HEAD_SIZE, b"\0")


@dataclass
class _Member:
    """A machine, and its passt while there is one."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    wire: PasstWire | None = None
    queue: deque[bytearray] = field(default_factory=deque)
    retry_at: float = 0.0


class NatWire:
    """The wire from a switch to its machines' passts.

    The first passt is started at once: the first machine is to have it, and the ports of *config*
    lead there. :class:`HvHostError` where passt is missing or gives up. *readable* is called on
    *loop*.
    """

    def __init__(self, config: AdapterConfig, loop: Loop, *, readable: Callable[[], None]) -> None:
        self._own = _gateway(config.address or NAT_ADDRESS)
        self._limit = min(MEMBER_LIMIT, self._own.network.num_addresses - 3)
        self._forwards, self._loop, self._readable = config.forwards, loop, readable
        self._members: OrderedDict[bytes, _Member] = OrderedDict()
        self._ready: dict[PasstWire, None] = {}
        self._ending: list[subprocess.Popen[bytes]] = []
        self._newcomers = TokenBucket(NEWCOMER_RATE, MEMBER_LIMIT)
        self._reading = False
        self.dropped = 0
        self._spare: _Member | None = _Member(0)
        self._start(self._spare, START_SECONDS)

    @property
    def leases(self) -> dict[str, str]:
        """The IPv4 address that each machine is given, by its hardware address."""
        return {
            mac.hex(":"): str(self._lease(member.number).address.ip)
            for mac, member in self._members.items()
        }

    def _lease(self, number: int) -> Lease:
        address = self._own.network.network_address + 1 + number
        if address >= self._own.ip:
            address += 1
        interface = ipaddress.IPv4Interface((address, self._own.network.prefixlen))
        return Lease(interface, self._own.ip, NAT_PREFIX + 2 + number, ROUTER, GATEWAY_MAC)

    # Wire.

    def send(self, buffers: Buffers) -> bool:
        """Give a frame to its machine's passt, or drop it; true in any case."""
        head = _head(buffers)
        if not for_gateway(head, self._own.ip):
            return True
        member = self._member(head[6:12], time.monotonic())
        if member is None or member.wire is None:
            self.dropped += 1
        elif member.queue or not member.wire.send(buffers):
            if len(member.queue) >= QUEUE_LIMIT:
                self.dropped += 1
                return True
            member.queue.append(bytearray().join(buffers))
            self._watch(member)
        return True

    def receive_into(self, buffers: list[memoryview]) -> int:
        while self._ready:
            wire = next(iter(self._ready))
            del self._ready[wire]
            if size := wire.receive_into(buffers):
                self._ready[wire] = None  # behind the others
                return size
        return 0

    def watch(self, *, read: bool, write: bool) -> None:
        del write  # it can always take a frame
        self._reading = read
        for member in self._all():
            self._watch(member)

    def close(self) -> None:
        """Let all passts go."""
        members = self._all()
        self._members.clear()
        self._spare = None
        for member in members:
            self._let_go(member)
        for process in self._ending:
            end_passt(process)

    # Machines.

    def _all(self) -> list[_Member]:
        """Also the one that no machine has yet."""
        spare = [] if self._spare is None else [self._spare]
        return [*self._members.values(), *spare]

    def _member(self, mac: bytes, now: float) -> _Member | None:
        """The machine with that address, with a passt if it can have one now."""
        member = self._members.get(mac)
        if member is None:
            member = self._newcomer(now)
            if member is None:
                return None
            self._members[mac] = member
            logger.info("%s is given %s", mac.hex(":"), self._lease(member.number).address)
        self._members.move_to_end(mac)
        if member.wire is None and now >= member.retry_at:
            member.retry_at = now + RETRY_SECONDS
            try:
                self._start(member, 0.0)
            except HvHostError as error:
                logger.warning("no passt for %s: %s", mac.hex(":"), error)
        return member

    def _newcomer(self, now: float) -> _Member | None:
        member, self._spare = self._spare, None
        if member is not None:
            return member
        if not self._newcomers.take(1.0, now):
            return None
        if len(self._members) < self._limit:
            taken = {each.number for each in self._members.values()}
            return _Member(next(number for number in range(self._limit) if number not in taken))
        _, oldest = self._members.popitem(last=False)
        self._let_go(oldest)
        return _Member(oldest.number)

    def _start(self, member: _Member, wait: float) -> None:
        self._ending = [process for process in self._ending if process.poll() is None]
        forwards = () if member.number else self._forwards
        process, stream = start_passt(forwards, self._lease(member.number), wait=wait)
        wire = PasstWire(
            stream,
            self._loop,
            readable=lambda: self._can_read(wire),
            writable=lambda: self._drain(member),
            gone=lambda: self._let_go(member),
        )
        member.process, member.wire = process, wire
        self._watch(member)

    def _let_go(self, member: _Member) -> None:
        """It ends by itself, or has ended; its zombie waits for the next start."""
        wire, process, member.wire, member.process = member.wire, member.process, None, None
        member.queue.clear()
        if wire is not None:
            self._ready.pop(wire, None)
            wire.close()
        if process is not None:
            self._ending.append(process)

    def _can_read(self, wire: PasstWire) -> None:
        self._ready[wire] = None
        self._readable()

    def _drain(self, member: _Member) -> None:
        while member.queue and member.wire is not None and member.wire.send([member.queue[0]]):
            member.queue.popleft()
        self._watch(member)

    def _watch(self, member: _Member) -> None:
        if member.wire is not None:
            member.wire.watch(read=self._reading, write=bool(member.queue))


def _gateway(text: str) -> ipaddress.IPv4Interface:
    """The gateway's address and network; :class:`HvHostError` if that cannot be one."""
    try:
        own = ipaddress.IPv4Interface(text)
    except ValueError:
        own = ipaddress.IPv4Interface("0.0.0.0/32")
    edge = (own.network.network_address, own.network.broadcast_address)
    if own.network.prefixlen > 29 or own.ip in edge:
        raise HvHostError(
            f"{text!r} is no address of a gateway with room for machines; write one like "
            f"{NAT_ADDRESS}."
        )
    return own
