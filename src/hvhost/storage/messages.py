"""What a machine's worker and its storage process tell each other, over a link.

A channel has a ``key``, given by the storage process, which is not its number on the bus; and each
time the guest opens it is another ``opening``, so that what is said of an earlier one is known to
be late.

=================  =========  =====================================================================
message            from       answer
=================  =========  =====================================================================
Start              worker     Done, when all disks are open
Attach + files     worker     Done, when all controllers were offered
Plug               worker     Done
Open + eventfd     worker     Done, or why those pages are no rings
Move               worker     Done, when the other VP is interrupted no more
Begin              worker     none: the guest knows now that its channel is open
Close              worker     Done, when nobody uses the guest's memory for that channel any more
Detach             worker     Done, when nobody uses the memory any more
Call               worker     Result
Answered           worker     none: the guest's answer to an Ask
Stop               worker     Done, when all disks are closed
Offered, Removed   storage    none
Faulted, Event     storage    none
Written            storage    Done
Ask, Abandon       storage    none
StillFrozen        storage    Result
RequireRunning     storage    Done, or why it does not
=================  =========  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Start:
    """Open the disks of a machine; ``config`` as :mod:`hvhost.machine.config_file` writes it."""

    config: str
    directory: str


@dataclass(frozen=True, slots=True)
class Region:
    """RAM of the guest: its guest address, its place in the memory, and its size, in bytes."""

    guest_address: int
    backing_offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Attach:
    """A new boot. The memory lies at ``offset`` of the first file, ``size`` bytes.

    The second file has, for each VP, ``HV_X64_MSR_SIEFP`` as 64 bits; the others are eventfds, one
    for each VP, that raise its interrupt. ``notices_writes``: the worker wants to know what was
    read into the memory.
    """

    offset: int
    size: int
    notices_writes: bool
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Plug:
    """More RAM, above all other."""

    region: Region


@dataclass(frozen=True, slots=True)
class Open:
    """The guest opens a channel whose rings are in ``pages``: page frame numbers, first its own.

    ``channel_id`` is its number on the bus, and of the event flag for it on ``target_vp``.
    """

    key: int
    opening: int
    channel_id: int
    pages: tuple[int, ...]
    downstream: int
    target_vp: int


@dataclass(frozen=True, slots=True)
class Move:
    """A channel interrupts another VP."""

    key: int
    target_vp: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Serve a channel that was opened."""

    key: int


@dataclass(frozen=True, slots=True)
class Close:
    """A channel is no longer open, for whatever reason."""

    key: int


@dataclass(frozen=True, slots=True)
class Detach:
    """The boot is over."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a person asks: a route of the worker's API by name, its parameters in JSON."""

    name: str
    parameters: str


@dataclass(frozen=True, slots=True)
class Result:
    """JSON of what there is to say."""

    json: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The guest's status, or why there is none."""

    number: int
    status: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine is over."""


@dataclass(frozen=True, slots=True)
class Offered:
    """A new channel; see :class:`hvhost.vmbus.saved.Offer`."""

    key: int
    interface_type: UUID
    interface_instance: UUID
    name: str
    sub_channel_index: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A channel's device is gone."""

    key: int


@dataclass(frozen=True, slots=True)
class Faulted:
    """The guest did something wrong on a channel, which is not served any more."""

    key: int
    opening: int
    reason: str


@dataclass(frozen=True, slots=True)
class Event:
    """What an administrator should know."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Place:
    """A part of the memory, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Written:
    """Data of disks are there now."""

    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the guest's snapshot service; ``operation`` is one of its names, like ``FREEZE``."""

    number: int
    operation: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nobody waits for that answer any more."""

    number: int


@dataclass(frozen=True, slots=True)
class StillFrozen:
    """Whether nobody has thawed the guest's file systems since they were frozen."""


@dataclass(frozen=True, slots=True)
class RequireRunning:
    """Whether the guest runs."""


FROM_WORKER = (Start, Attach, Plug, Open, Move, Begin, Close, Detach, Call, Answered, Stop, Result)
FROM_STORAGE = (
    Offered, Removed, Faulted, Event, Written, Ask, Abandon, StillFrozen, RequireRunning, Result,
)  # fmt: skip
