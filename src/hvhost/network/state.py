"""What an adapter is and what has become of it: everything needed to resume it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvhost.network.ndis import ReceiveScaling
from hvhost.network.protocol import Capability, NvspVersion

#: An adapter's link speed, in units of 100 bit/s: 10 Gbit/s.
LINK_SPEED = 100_000_000


@dataclass(slots=True)
class Counters:
    """Frames and bytes, as the guest sees them: received is what it received.

    ``no_buffer`` are frames that found no room in the guest, ``filtered`` those that it did not
    ask for, ``merged`` received frames made of several segments, ``large_sends`` frames that the
    guest left to others to segment.
    """

    transmitted: int = 0
    transmitted_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    transmit_errors: int = 0
    receive_errors: int = 0
    no_buffer: int = 0
    filtered: int = 0
    spoofed: int = 0
    merged: int = 0
    large_sends: int = 0


@dataclass(slots=True)
class AdapterState:
    """An adapter's resumable state; handles are the guest's numbers, ``mtu`` without header.

    ``filter`` is made of :class:`hvhost.network.rndis.PacketFilter`; its MULTICAST lets through
    frames to the addresses in ``multicast``.
    """

    mac: bytes
    link: bool = True
    version: NvspVersion | None = None
    mtu: int = 1500
    capabilities: Capability = field(default_factory=lambda: Capability(0))
    receive_buffer: int | None = None
    send_buffer: int | None = None
    initialized: bool = False
    filter: int = 0
    multicast: frozenset[bytes] = frozenset()
    merging: bool = False
    scaling: ReceiveScaling = field(default_factory=ReceiveScaling)
    subchannels: int = 0
    counters: Counters = field(default_factory=Counters)
