"""What a switch does with a frame: no sockets, no clock of its own.

Every frame belongs to a VLAN inside the switch; 0 is that of untagged frames on ports without one.
An access port is a member of one VLAN and knows no tags; a trunk port carries its list of VLANs
tagged and its native one untagged. Source of the rules: IEEE 802.1Q, clauses 6.9 and 8.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NamedTuple

#: Seconds after which an address that was not heard of again is forgotten.
AGEING_SECONDS: Final = 300.0
#: Addresses remembered behind a machine's port, and behind an uplink. The one not heard of for the
#: longest time makes room, of the same port: none can push out what is behind another.
ADDRESS_LIMIT: Final = 1024
UPLINK_ADDRESS_LIMIT: Final = 4096
#: Frames a second that a port may have flooded, and how many at once.
STORM_RATE: Final = 20_000.0
STORM_BURST: Final = 4_000.0
ALL_VLANS: Final = frozenset(range(1, 4095))
_Station = tuple[int, bytes]
_TAG = b"\x81\x00"
_PRIORITY_TAG_VLAN = 0


@dataclass(frozen=True, slots=True)
class PortSettings:
    """What a port is: see :class:`hvhost.network.config.AdapterConfig`."""

    name: str
    vlan: int = 0
    trunk: frozenset[int] = frozenset()
    isolated: bool = False


class TokenBucket:
    """Lets *rate* units a second pass, *burst* of them at once."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, 0.0

    def take(self, amount: float, now: float) -> bool:
        """Take *amount* if it is there."""
        self._fill(now)
        if self._left < amount:
            return False
        self._left -= amount
        return True

    def spend(self, amount: float, now: float) -> float:
        """Take *amount* in any case; seconds until there is more, 0 while there is some left."""
        self._fill(now)
        self._left -= amount
        return max(0.0, -self._left / self._rate)

    def _fill(self, now: float) -> None:
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now


class Decision(NamedTuple):
    """Where a frame goes: *plain* ports get it untagged, *tagged* ones with *tag*.

    *tag* is the tag control information; *was_tagged*: the frame came with four bytes of tag.
    """

    plain: tuple[int, ...]
    tagged: tuple[int, ...]
    tag: int
    was_tagged: bool


DROPPED: Final = Decision((), (), 0, False)


class Switch:
    """Ports by number, and what they have been heard to say."""

    def __init__(self) -> None:
        self.ports: dict[int, PortSettings] = {}
        self._storm: dict[int, TokenBucket] = {}
        #: The port of each (VLAN, address); and by port, when each was heard last, oldest first.
        self.addresses: dict[_Station, int] = {}
        self._heard: dict[int, OrderedDict[_Station, float]] = {}
        self._limits: dict[int, int] = {}
        self.flooded = self.suppressed = 0

    def add_port(self, number: int, settings: PortSettings, limit: int = ADDRESS_LIMIT) -> None:
        """A new port, behind which *limit* addresses are remembered; *number* must be free."""
        assert number not in self.ports
        self.ports[number] = settings
        self._storm[number] = TokenBucket(STORM_RATE, STORM_BURST)
        self._heard[number] = OrderedDict()
        self._limits[number] = limit

    def remove_port(self, number: int) -> None:
        """Forget a port and the addresses behind it."""
        del self.ports[number], self._storm[number], self._limits[number]
        for key in self._heard.pop(number):
            del self.addresses[key]

    def forward(self, number: int, head: bytes, now: float) -> Decision:
        """What becomes of a frame that came in on port *number*; *head* is its first 18 bytes."""
        if len(head) < 14:
            return DROPPED
        port = self.ports[number]
        was_tagged = head[12:14] == _TAG and len(head) >= 18
        tag = int.from_bytes(head[14:16], "big") if was_tagged else 0
        vlan = tag & 0xFFF
        if vlan == _PRIORITY_TAG_VLAN:
            vlan = port.vlan
        elif vlan not in port.trunk:
            return DROPPED
        source, destination = head[6:12], head[:6]
        if source[0] & 1:
            return DROPPED  # nobody is a group
        self._learn(vlan, source, number, now)
        tag = tag & 0xF000 | vlan
        if not destination[0] & 1:
            key = vlan, destination
            target = self.addresses.get(key)
            if target is not None and now - self._heard[target][key] < AGEING_SECONDS:
                if target == number:
                    return DROPPED
                return self._decision((target,), number, vlan, tag, was_tagged)
        if not self._storm[number].take(1.0, now):
            self.suppressed += 1
            return DROPPED
        self.flooded += 1
        return self._decision(tuple(self.ports), number, vlan, tag, was_tagged)

    def _decision(
        self, targets: tuple[int, ...], source: int, vlan: int, tag: int, was_tagged: bool
    ) -> Decision:
        isolated = self.ports[source].isolated
        plain, tagged = [], []
        for number in targets:
            port = self.ports[number]
            if number == source or (isolated and port.isolated):
                continue
            if port.vlan == vlan:
                plain.append(number)
            elif vlan in port.trunk:
                tagged.append(number)
        return Decision(tuple(plain), tuple(tagged), tag, was_tagged)

    def _learn(self, vlan: int, source: bytes, number: int, now: float) -> None:
        key, heard = (vlan, source), self._heard[number]
        before = self.addresses.get(key)
        if before != number:
            if before is not None:
                del self._heard[before][key]
            self.addresses[key] = number
        heard[key] = now
        heard.move_to_end(key)
        if len(heard) > self._limits[number]:
            del self.addresses[heard.popitem(last=False)[0]]
