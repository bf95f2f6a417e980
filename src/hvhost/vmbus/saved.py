"""What of a bus is saved with its machine: all that the guest relies on and does not hold itself.

One dataclass for the bus, one for each of its channels; nothing in them but numbers, strings,
bytes, UUIDs and tuples of these, so that any serializer takes them. Their devices have a ``state``
of their own, guest memory and virtual processors are saved beside them, and with those messages
that wait for the guest (:class:`hvhost.partition.synic.SynicState`).

What is read here comes from a file, so whoever restores it checks it as if a guest had sent it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

MAX_USER_DEFINED_BYTES: Final = 120


class ChannelState(StrEnum):
    """Between a channel's offer and its end; :mod:`hvhost.vmbus.channel` has the rules."""

    OFFERED = "offered"
    OPEN = "open"
    CLOSED = "closed"
    FAULTED = "faulted"
    RESCINDED = "rescinded"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a device tells the guest about itself (``struct vmbus_channel_offer``).

    ``name`` is for people and does not go to the guest; ``flags`` are
    :class:`hvhost.vmbus.protocol.OfferFlags`. The guest signals a dedicated channel by hypercall
    alone, without a flag in a shared page.
    """

    interface_type: uuid.UUID
    interface_instance: uuid.UUID
    name: str
    flags: int = 0
    user_defined: bytes = bytes(MAX_USER_DEFINED_BYTES)
    mmio_megabytes: int = 0
    sub_channel_index: int = 0
    is_dedicated_interrupt: bool = True

    @property
    def identity(self) -> tuple[uuid.UUID, uuid.UUID, int]:
        """What no two channels have in common."""
        return self.interface_type, self.interface_instance, self.sub_channel_index


@dataclass(frozen=True, slots=True)
class SavedRings:
    """Both rings of an open channel; indices in bytes.

    ``downstream`` counts the pages of the GPADL before the host's ring, ``queue`` holds encoded
    packets that wait for room in it.
    """

    downstream: int
    read_index: int
    guest_has_room: bool
    write_index: int
    pending_send_size: int
    queue: tuple[bytes, ...]
    interrupt_wanted: bool


@dataclass(frozen=True, slots=True)
class SavedChannel:
    """One channel; ``rings`` is there while it is open. Fields as in ``Channel``."""

    channel_id: int
    offer: Offer
    offered: bool
    state: ChannelState
    target_vp: int
    held_open: bool
    ring_gpadl: int | None
    paused: bool
    packets_received: int
    packets_sent: int
    interrupts: int
    rings: SavedRings | None


@dataclass(frozen=True, slots=True)
class SavedGpadl:
    """A GPADL as the guest sent it: ``size`` bytes of ranges, of which ``data`` has come."""

    handle: int
    channel_id: int
    range_count: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SavedBus:
    """The bus; ``version`` is the protocol's number, ``None`` while no guest is connected."""

    version: int | None
    message_vp: int
    offers_requested: bool
    violations: int
    gpadls: tuple[SavedGpadl, ...]
    channels: tuple[SavedChannel, ...]
