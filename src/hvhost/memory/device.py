"""The dynamic memory device: a state machine between the guest's driver and who decides.

Life of a conversation (see :mod:`hvhost.memory.protocol`)::

    channel opened -> VERSION -> CAPABILITIES -> READY -> channel closed

One operation at a time is under way in READY; its answer ends it, however late it comes. What the
balloon holds outlives the driver: it is given back to whichever driver comes next.

The device touches no memory itself: pages that the guest gave go to :class:`Backing`, and pages
that it is offered must be there before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hvhost.errors import HvHostError, LocalProtocolError, RemoteProtocolError
from hvhost.memory import protocol
from hvhost.memory.area import HotAddArea
from hvhost.memory.protocol import (
    OFFER,
    PAGES_PER_MIB,
    UNBALLOON_RANGES_MAX,
    VERSIONS,
    BalloonResponse,
    Capabilities,
    HotAddResponse,
    PageRange,
    PageSet,
    Status,
    UnballoonResponse,
    VersionRequest,
)
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import format_size
from hvhost.vmbus.channel import Channel, Offer, Packet, PacketType

#: Pages of one unballoon message: Linux frees them all in one softirq.
UNBALLOON_PAGES_MAX = 64 * PAGES_PER_MIB
_REQUEST_MAX = 0xFFFFFFFF
_QUEUE_MAX = 4


class Phase(StrEnum):
    """How far the conversation with the driver is."""

    NO_DRIVER = "no-driver"
    VERSION = "version"
    CAPABILITIES = "capabilities"
    READY = "ready"


class Work(StrEnum):
    """What the guest was asked for and has not finished."""

    NONE = "idle"
    BALLOON = "balloon"
    UNBALLOON = "unballoon"
    HOT_ADD = "hot-add"


class Backing(Protocol):
    """The memory behind the guest's; called with the bus's lock held."""

    def is_ram(self, pages: PageRange) -> bool:
        """Whether all these pages are the guest's."""
        ...

    def release(self, pages: PageRange) -> None:
        """The guest does not use these pages: the host may have them back."""
        ...


@dataclass(slots=True)
class MemoryState:
    """What is needed to go on elsewhere; all counts in pages."""

    area: HotAddArea
    phase: Phase = Phase.NO_DRIVER
    version: int = 0
    capabilities: Capabilities | None = None
    balloon: PageSet = field(default_factory=PageSet)
    added: int = 0
    status: Status | None = None
    work: Work = Work.NONE
    last_work: Work = Work.NONE
    wanted: int = 0
    """Pages that the work under way, or else the last one, was to bring and did not (yet)."""
    to_return: int = 0
    """Pages that are still to be given back by the unballoon under way."""
    offered: tuple[PageRange, PageRange | None] | None = None
    adds_nothing: bool = False
    """The guest said that it will never add memory."""
    trans_id: int = 0


class MemoryDevice:
    """Dynamic memory for one boot of one machine.

    *maximum* is told to the guest, in pages. *changed* is called when the driver came or went, when
    a status arrived, and when an operation ended. *fresh* says that a status arrived.
    """

    offer: Offer = OFFER

    def __init__(
        self,
        area: HotAddArea,
        maximum: int,
        backing: Backing,
        changed: Callable[[], None] = lambda: None,
        versions: tuple[int, ...] = VERSIONS,
    ) -> None:
        self.state = MemoryState(area)
        self._maximum = maximum
        self._backing = backing
        self._changed = changed
        self._versions = versions
        self._channel: Channel | None = None
        #: Status reports that came, for those who wait for a new one.
        self.reports = 0

    @property
    def ready(self) -> bool:
        """The guest's driver is there and the versions are agreed on."""
        return self.state.phase is Phase.READY

    @property
    def idle(self) -> bool:
        """Ready, and nothing is under way."""
        return self.ready and self.state.work is Work.NONE

    # What the host wants; with the bus's lock held.

    def balloon(self, pages: int) -> None:
        """Ask the guest for *pages*; it may give fewer."""
        capabilities = self._begin(pages)
        if not capabilities.balloon:
            raise HvHostError(
                "the guest's memory driver cannot give memory back; it said so when it came."
            )
        self.state.work, self.state.wanted = Work.BALLOON, min(pages, _REQUEST_MAX)
        self._send(protocol.balloon_request(self._next_id(), self.state.wanted))

    def unballoon(self, pages: int) -> None:
        """Give up to *pages* of the balloon back to the guest."""
        self._begin(pages)
        state = self.state
        pages = min(pages, state.balloon.count)
        if not pages:
            raise LocalProtocolError("nothing is ballooned.")
        state.work, state.wanted, state.to_return = Work.UNBALLOON, pages, pages
        self._return_pages()

    def next_range(self, pages: int) -> tuple[PageRange, PageRange | None] | None:
        """What :meth:`hot_add` is to offer next; that memory must be there before."""
        capabilities = self.state.capabilities
        if capabilities is None or not capabilities.hot_add or self.state.adds_nothing:
            return None
        return self.state.area.next(pages, capabilities.hot_add_alignment // PAGE_SIZE)

    def why_no_range(self) -> str:
        """Why :meth:`next_range` gives none, for people."""
        capabilities, area = self.state.capabilities, self.state.area
        if capabilities is None or not capabilities.hot_add:
            return "the guest's memory driver cannot add memory; it said so when it came"
        if self.state.adds_nothing:
            return "the guest said that it takes no more memory than it has"
        return (
            f"the guest adds memory in blocks of {format_size(capabilities.hot_add_alignment)}, "
            f"and {format_size(area.room * PAGE_SIZE)} of address space are left for that"
        )

    def hot_add(self, pages: PageRange, region: PageRange | None) -> None:
        """Offer what :meth:`next_range` gave."""
        self._begin(pages.count)
        self.state.work, self.state.wanted = Work.HOT_ADD, pages.count
        self.state.offered = (pages, region)
        self._send(protocol.hot_add_request(self._next_id(), pages, region))

    def raise_maximum(self, pages: int) -> None:
        """The guest may be given so many pages from now on."""
        self._maximum = pages
        if self.ready and self.state.version >= protocol.VERSION_2:
            self._send(protocol.maximum_message(self._next_id(), pages))

    def _begin(self, pages: int) -> Capabilities:
        if not self.idle or pages <= 0 or self.state.capabilities is None:
            raise LocalProtocolError(
                f"the memory device is {self.state.phase} and {self.state.work}; {pages} pages."
            )
        return self.state.capabilities

    def _next_id(self) -> int:
        self.state.trans_id = self.state.trans_id + 1 & 0xFFFFFFFF
        return self.state.trans_id

    def _send(self, payload: bytes) -> None:
        assert self._channel is not None
        self._channel.send(payload)

    def _return_pages(self) -> None:
        """Send on, as far as the ring takes it; the rest follows when there is room again."""
        state, channel = self.state, self._channel
        while channel is not None and state.to_return and channel.queued < _QUEUE_MAX:
            ranges = state.balloon.take(
                min(state.to_return, UNBALLOON_PAGES_MAX), UNBALLOON_RANGES_MAX
            )
            state.to_return -= sum(each.count for each in ranges)
            self._send(
                protocol.unballoon_request(self._next_id(), ranges, more=state.to_return > 0)
            )

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.settle = self._return_pages
        self.state.phase = Phase.VERSION

    def closed(self) -> None:
        """The driver left, perhaps in the middle of something; the balloon stays what it is."""
        state = self.state
        self._channel = None
        if state.offered is not None and state.offered[1] is not None:
            state.area.block_end = state.offered[1].end  # perhaps added, perhaps not
        state.phase, state.capabilities, state.status = Phase.NO_DRIVER, None, None
        state.work, state.wanted, state.to_return, state.offered = Work.NONE, 0, 0, None
        state.adds_nothing = False
        state.area.forget_block()
        self._changed()

    def received(self, packet: Packet) -> None:
        if packet.type is not PacketType.DATA_INBAND:
            raise RemoteProtocolError(f"the memory device got a packet {packet.type.name}.")
        message = protocol.decode(packet.payload)
        phase = self.state.phase
        if isinstance(message, VersionRequest) and phase is Phase.VERSION:
            self._version(message)
        elif isinstance(message, Capabilities) and phase is Phase.CAPABILITIES:
            self._capabilities(message)
        elif isinstance(message, Status) and phase is Phase.READY:
            self.state.status = message
            self.reports += 1
            self._changed()
        elif isinstance(message, BalloonResponse) and self.state.work is Work.BALLOON:
            self._ballooned(message)
        elif isinstance(message, UnballoonResponse) and self.state.work is Work.UNBALLOON:
            if self.state.to_return:
                raise RemoteProtocolError("the guest took pages back before it got them all.")
            self.state.wanted = 0
            self._end_work()
        elif isinstance(message, HotAddResponse) and self.state.work is Work.HOT_ADD:
            self._added(message)
        else:
            raise RemoteProtocolError(
                f"the guest sent a {type(message).__name__} while the memory device was {phase} "
                f"and {self.state.work}."
            )

    def _version(self, request: VersionRequest) -> None:
        accepted = request.version in self._versions
        if accepted:
            self.state.phase, self.state.version = Phase.CAPABILITIES, request.version
        self._send(protocol.version_response(self._next_id(), accepted=accepted))

    def _capabilities(self, capabilities: Capabilities) -> None:
        self.state.capabilities, self.state.phase = capabilities, Phase.READY
        self._send(protocol.capabilities_response(self._next_id()))
        if self.state.version >= protocol.VERSION_2:
            self._send(protocol.maximum_message(self._next_id(), self._maximum))
        self._changed()

    def _ballooned(self, response: BalloonResponse) -> None:
        state = self.state
        if response.pages > state.wanted:
            raise RemoteProtocolError(
                f"the guest gave {response.pages} pages of which {state.wanted} were asked for."
            )
        for pages in response.ranges:
            if not self._backing.is_ram(pages):
                raise RemoteProtocolError(
                    f"the guest gave pages {pages.start:#x}+{pages.count:#x} that it does not have."
                )
            state.balloon.add(pages)
            state.wanted -= pages.count
            self._backing.release(pages)
        if not response.more:
            self._end_work()

    def _added(self, response: HotAddResponse) -> None:
        state = self.state
        assert state.offered is not None
        pages, region = state.offered
        if response.page_count > pages.count:
            raise RemoteProtocolError(
                f"the guest added {response.page_count} pages of {pages.count}."
            )
        state.area.taken(pages, region, response.page_count)
        state.added += response.page_count
        state.wanted -= response.page_count
        state.adds_nothing = response.page_count == 0 and response.result == 1
        self._end_work()

    def _end_work(self) -> None:
        state = self.state
        state.last_work, state.work, state.offered = state.work, Work.NONE, None
        self._changed()
