"""Addresses and names for networks that nobody else serves: DHCP and DNS answers, no sockets.

Source: [RFC 2131], [RFC 2132] for DHCP, [RFC 1035] for DNS. Whoever asks is not trusted: what
cannot be read gets no answer, and there are no more leases than addresses; the one not asked for
the longest makes room.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

#: What this computer is called in its own networks.
HOST_NAME: Final = "host"
LEASE_SECONDS: Final = 3600
#: Leases of one network, however large it is.
LEASE_LIMIT: Final = 200
NAME_SECONDS: Final = 60
_MAGIC: Final = bytes((99, 130, 83, 99))
_FIXED: Final = 236
_HEAD = struct.Struct("!BBBBIHH4s4s4s4s16s")
_QUERY = struct.Struct("!HHHHHH")
_DISCOVER, _OFFER, _REQUEST, _ACK, _NAK, _RELEASE, _INFORM = 1, 2, 3, 5, 6, 7, 8
_MASK, _DNS, _HOST, _REQUESTED, _TIME, _TYPE, _SERVER = 1, 6, 12, 50, 51, 53, 54
_END, _PAD = 255, 0
_A, _IN = 1, 1
_NXDOMAIN, _REFUSED = 3, 5
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

Address = ipaddress.IPv4Address


@dataclass(frozen=True, slots=True)
class Reply:
    """A DHCP answer, for *to*; the client may not have that address yet if it is broadcast."""

    data: bytes
    to: str


def _options(data: bytes) -> dict[int, bytes] | None:
    """Options by their code, the first of each; ``None`` if one is cut short."""
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data) and data[position] != _END:
        if data[position] == _PAD:
            position += 1
            continue
        if position + 2 > len(data) or position + 2 + data[position + 1] > len(data):
            return None
        size = data[position + 1]
        found.setdefault(data[position], data[position + 2 : position + 2 + size])
        position += 2 + size
    return found


def _option(code: int, value: bytes) -> bytes:
    return bytes((code, len(value))) + value


class Leases:
    """The addresses of one network; *interface* is this computer's own, with the prefix."""

    def __init__(self, interface: ipaddress.IPv4Interface) -> None:
        self.own = interface.ip
        self._network = interface.network
        # By client: its address, and the name it says it has.
        self._leases: OrderedDict[bytes, tuple[Address, str]] = OrderedDict()

    @property
    def names(self) -> dict[str, Address]:
        """Names known in the network."""
        named = {name: address for address, name in self._leases.values() if name}
        return {**named, HOST_NAME: self.own}

    def answer(self, message: bytes) -> Reply | None:
        """What a client's message is answered, if anything."""
        if message[_FIXED : _FIXED + len(_MAGIC)] != _MAGIC:
            return None
        op, kind, size, _, xid, _, flags, current, _, _, _, hardware = _HEAD.unpack_from(message)
        options = _options(message[_FIXED + 4 :])
        if (op, kind, size) != (1, 1, 6) or options is None or len(options.get(_TYPE, b"")) != 1:
            return None
        client, wish = hardware[:6], options[_TYPE][0]
        server = options.get(_SERVER)
        if server is not None and server != self.own.packed:
            return None  # it speaks to another
        if wish == _RELEASE:
            self._leases.pop(client, None)
            return None
        head = (2, kind, size, 0, xid, 0, flags)
        if wish == _INFORM:
            data = self._reply(head, current, bytes(4), hardware, _ACK)
            return Reply(data, str(Address(current)))
        if wish not in (_DISCOVER, _REQUEST):
            return None
        asked = options.get(_REQUESTED, current)
        address = self._lease(client, asked, options.get(_HOST, b""))
        if address is None:
            return None
        if wish == _DISCOVER:
            data = self._reply(head, bytes(4), address.packed, hardware, _OFFER)
        elif asked == address.packed:
            data = self._reply(head, current, address.packed, hardware, _ACK)
        else:
            return Reply(self._reply(head, bytes(4), bytes(4), hardware, _NAK), "255.255.255.255")
        renewing = current == address.packed
        return Reply(data, str(address) if renewing else "255.255.255.255")

    def _reply(
        self, head: tuple[int, ...], current: bytes, given: bytes, hardware: bytes, kind: int
    ) -> bytes:
        own = self.own.packed
        fixed = _HEAD.pack(*head, current, given, own, bytes(4), hardware).ljust(_FIXED, b"\0")
        options = _option(_TYPE, bytes((kind,))) + _option(_SERVER, own)
        if kind != _NAK:
            options += _option(_MASK, self._network.netmask.packed) + _option(_DNS, own)
            if given != bytes(4):
                options += _option(_TIME, LEASE_SECONDS.to_bytes(4, "big"))
        return fixed + _MAGIC + options + bytes((_END,))

    def _lease(self, client: bytes, asked: bytes, name: bytes) -> Address | None:
        """The address of a client: the one it has, the one it asks for, or one that is free."""
        known = self._leases.get(client)
        address = known[0] if known is not None else self._free(asked)
        if address is None and self._leases:
            address = self._leases.popitem(last=False)[1][0]
        if address is None:
            return None
        text = name.decode("ascii", "replace").lower()
        called = text if _NAME.fullmatch(text) and text != HOST_NAME else ""
        self._leases[client] = address, called
        self._leases.move_to_end(client)
        return address

    def _free(self, asked: bytes) -> Address | None:
        taken = {address for address, _ in self._leases.values()}
        if len(taken) >= LEASE_LIMIT:
            return None
        if len(asked) == 4:
            wanted = Address(asked)
            edge = (self._network.network_address, self._network.broadcast_address, self.own)
            if wanted in self._network and wanted not in taken and wanted not in edge:
                return wanted
        for address in self._network.hosts():
            if address != self.own and address not in taken:
                return address
        return None


def resolve(query: bytes, names: dict[str, Address]) -> bytes | None:
    """The answer to a DNS query for one of *names*, or that there is no such; ``None`` for noise.

    Names with a domain are not served here: nobody knows them in a network without an uplink.
    """
    if len(query) < _QUERY.size:
        return None
    number, flags, questions, *_ = _QUERY.unpack_from(query)
    if flags & 0x8000:
        return None  # an answer itself
    labels, position = [], _QUERY.size
    while position < len(query) and query[position]:
        size = query[position]
        if size > 63:
            return None
        labels.append(query[position + 1 : position + 1 + size])
        position += 1 + size
    if position + 5 > len(query):
        return None
    kind, family = struct.unpack_from("!HH", query, position + 1)
    question = query[_QUERY.size : position + 5]
    answered = 0x8400 | flags & 0x7900  # an authority's, the question's opcode and wish
    if questions != 1 or flags & 0x7800 or family != _IN:
        return _QUERY.pack(number, answered | _REFUSED, 1, 0, 0, 0) + question
    name = b".".join(labels).decode("ascii", "replace").lower()
    address = names.get(name)
    if address is None:
        return _QUERY.pack(number, answered | _NXDOMAIN, 1, 0, 0, 0) + question
    if kind != _A:
        return _QUERY.pack(number, answered, 1, 0, 0, 0) + question
    record = struct.pack("!HHHIH", 0xC000 | _QUERY.size, _A, _IN, NAME_SECONDS, 4) + address.packed
    return _QUERY.pack(number, answered, 1, 1, 0, 0) + question + record
