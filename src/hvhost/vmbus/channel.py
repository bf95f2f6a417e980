"""Channels: one device's place on the bus, from its offer to its release.

Life of a channel; what is not in :data:`_NEXT` does not happen::

    OFFERED --open--> OPEN --close--> CLOSED --open--> OPEN ...
       any of these --violation--> FAULTED --close--> CLOSED, --open--> OPEN
       any of these --device removed--> RESCINDED --guest lets go--> RELEASED
       any but the last two --connection ends--> OFFERED

A channel needs no more of its surroundings than guest memory, two rings, a way to interrupt the
guest and a call when the guest signals; negotiation is the business of ``server.py``. Whoever calls
into a channel holds the bus's lock.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from hvhost.errors import LocalProtocolError, RemoteProtocolError
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.gpadl import Gpadl
from hvhost.vmbus.protocol import VMBUS_MESSAGE_SINT
from hvhost.vmbus.ring import (
    COMPLETION_REQUESTED,
    IncomingRing,
    OutgoingRing,
    Packet,
    PacketType,
    RingBuffer,
    encode_packet,
)
from hvhost.vmbus.saved import ChannelState, Offer, SavedChannel, SavedRings
from hvhost.wire import Buffer

__all__ = [
    "Channel",
    "ChannelDevice",
    "ChannelState",
    "Offer",
    "Packet",
    "PacketType",
    "RestorableDevice",
]

#: Packets that may wait for room in the guest's ring; a guest that lets more pile up is at fault.
QUEUE_LIMIT: Final = 1024
#: With so many waiting, nothing more is taken from the guest.
QUEUE_THROTTLE: Final = 64
#: Packets handled in one call of :meth:`Channel.process`.
PROCESS_PACKETS: Final = 4096


_ALIVE = {ChannelState.OFFERED, ChannelState.OPEN, ChannelState.CLOSED, ChannelState.FAULTED}
_NEXT: dict[ChannelState, set[ChannelState]] = {
    ChannelState.OFFERED: _ALIVE | {ChannelState.RESCINDED},
    ChannelState.OPEN: _ALIVE | {ChannelState.RESCINDED},
    ChannelState.CLOSED: _ALIVE | {ChannelState.RESCINDED},
    ChannelState.FAULTED: _ALIVE | {ChannelState.RESCINDED},
    ChannelState.RESCINDED: {ChannelState.RELEASED},
    ChannelState.RELEASED: set(),
}


class ChannelDevice(Protocol):
    """A device as its channel sees it: a state machine, called with the bus's lock held.

    Raising :class:`RemoteProtocolError` from ``opened`` or ``received`` faults the channel.
    ``state`` is one dataclass with everything needed to resume the device elsewhere.
    """

    @property
    def offer(self) -> Offer: ...

    @property
    def state(self) -> Any: ...

    def opened(self, channel: Channel) -> None:
        """The guest opened the channel; packets may be sent from now on."""

    def closed(self) -> None:
        """The channel is no longer open, for whatever reason."""

    def received(self, packet: Packet) -> None:
        """The guest sent a packet."""


@runtime_checkable
class RestorableDevice(ChannelDevice, Protocol):
    """A device that can go on with a channel which the guest opened on another computer."""

    def restored(self, channel: Channel) -> None:
        """In place of ``opened``: the device's ``state`` is as it was, and so is *channel*."""


@runtime_checkable
class DeviceElsewhere(ChannelDevice, Protocol):
    """A device in another process, which has the rings to itself; nothing is received here."""

    @property
    def signal(self) -> int:
        """The eventfd that the other process waits for; the guest's signals raise it."""

    def signalled(self) -> None:
        """Raise :attr:`signal`."""

    def open_rings(
        self, channel: Channel, pages: array[int], downstream: int, target_vp: int
    ) -> None:
        """As :meth:`Channel.open`; :class:`RemoteProtocolError` if those pages are no rings."""

    def moved(self, target_vp: int) -> None:
        """Another VP is to be interrupted from now on."""


class HostPort(Protocol):
    """The hypervisor below the bus; messages are queued there while the guest's slot is busy."""

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> None: ...

    def signal_event(self, vp: int, sint: int, flag: int) -> None: ...

    def connect_signal(self, connection_id: int, channel: Channel) -> None:
        """Call ``channel.process()`` when the guest signals *connection_id*."""

    def disconnect_signal(self, connection_id: int) -> None: ...


class Channel:
    """One channel; made by :meth:`hvhost.vmbus.server.VmbusServer.add_device`."""

    def __init__(
        self,
        channel_id: int,
        device: ChannelDevice,
        memory: GuestMemory,
        port: HostPort,
        *,
        violation: Callable[[str], None],
        gpadl: Callable[[int, int], Gpadl],
    ) -> None:
        self.channel_id = channel_id
        self.device = device
        self.offer = device.offer
        #: Its device, if that is in another process.
        self.elsewhere = device if isinstance(device, DeviceElsewhere) else None
        # As Hyper-V builds it: the SINT in bits 12 to 15 above the channel id.
        self.connection_id = VMBUS_MESSAGE_SINT << 12 | channel_id
        self.state = ChannelState.OFFERED
        self.target_vp = 0
        #: The guest opened it and has not closed it yet, faulted or not.
        self.held_open = False
        #: The GPADL its rings lie in, while it is held open.
        self.ring_gpadl: int | None = None
        self._downstream = 0
        #: No packets are taken from the guest; whoever ends that calls :meth:`process`.
        self.paused = False
        #: Called whenever what came was handed over and what waited was sent, as far as it goes.
        self.settle: Callable[[], None] | None = None
        #: Sees what came before it is parsed, and takes what it can: how many bytes, whole packets
        #: from the start on, which it counts. For devices with many small packets of one shape.
        self.serve: Callable[[bytes], int] | None = None
        self.packets_received = 0
        self.packets_sent = 0
        self.interrupts = 0
        #: Why it was faulted last.
        self.fault_reason = ""
        self._memory, self._port = memory, port
        self._violation, self._find_gpadl = violation, gpadl
        self._incoming: IncomingRing | None = None
        self._outgoing: OutgoingRing | None = None
        self._queue: deque[bytes] = deque()
        self._processing = False
        self._interrupt_wanted = False

    def __repr__(self) -> str:
        return f"<Channel {self.channel_id} {self.offer.name} {self.state.value}>"

    @property
    def is_open(self) -> bool:
        return self.state is ChannelState.OPEN

    @property
    def queued(self) -> int:
        """Packets that wait for room in the guest's ring."""
        return len(self._queue)

    @property
    def outgoing_size(self) -> int:
        """Bytes of the ring towards the guest; open channels only."""
        if self._outgoing is None:
            raise LocalProtocolError(f"{self!r} has no ring.")
        return self._outgoing.size

    # For devices.

    def send(
        self,
        payload: Buffer,
        *,
        packet_type: PacketType = PacketType.DATA_INBAND,
        transaction_id: int = 0,
        completion_requested: bool = False,
        header: bytes = b"",
        more: bool = False,
    ) -> bool:
        """Send one packet; it waits if the ring is full. False if the channel is not open.

        *header* stands between descriptor and payload (``TransferPages.pack()``). *more* leaves it
        to a later :meth:`flush` to interrupt the guest. A guest whose ring is broken or never
        emptied faults the channel.
        """
        if self.state is not ChannelState.OPEN:
            return False
        packet = encode_packet(
            packet_type,
            COMPLETION_REQUESTED if completion_requested else 0,
            transaction_id,
            payload,
            header,
        )
        if self._processing:
            self._append(packet)  # an error unwinds the device, up to process()
            return True
        try:
            self._append(packet)
            if not more:
                self._interrupt()
        except RemoteProtocolError as error:
            self.fault(str(error))
            return False
        return True

    def flush(self) -> None:
        """Interrupt the guest for what was sent with *more*; does nothing where that is due."""
        if not self._processing:
            self._interrupt()

    def interrupt_now(self) -> None:
        """Interrupt the guest for what was sent so far, if it does not read anyway; it need not
        wait until all that it sent was handled.
        """
        self._interrupt()

    def send_completion(self, transaction_id: int, payload: Buffer = b"") -> bool:
        """Answer the packet which carried *transaction_id*; as :meth:`send`."""
        return self.send(payload, packet_type=PacketType.COMP, transaction_id=transaction_id)

    def send_completions(self, transaction_ids: Sequence[int], payload: Buffer) -> bool:
        """Answer several packets alike, in order; as :meth:`send`, at the cost of few packets."""
        outgoing = self._outgoing
        if outgoing is None or self._queue or not self._processing:
            return all(self.send_completion(each, payload) for each in transaction_ids)
        packets = [encode_packet(PacketType.COMP, 0, each, payload) for each in transaction_ids]
        if not outgoing.write_all(packets):
            return all(self.send_completion(each, payload) for each in transaction_ids)
        self.packets_sent += len(packets)
        self._interrupt_wanted = True
        return True

    def send_encoded(self, packets: Sequence[bytes]) -> None:
        """Send packets as :func:`encode_packet` makes them, from within :meth:`process` only."""
        outgoing = self._outgoing
        if outgoing is None:
            return
        if not self._queue and outgoing.write_all(packets):
            self.packets_sent += len(packets)
            self._interrupt_wanted = True
            return
        for packet in packets:
            self._append(packet)

    def gpadl(self, handle: int) -> Gpadl:
        """A list of pages the guest made for this channel; look it up anew for every use.

        :class:`RemoteProtocolError` if there is none (any more).
        """
        return self._find_gpadl(handle, self.channel_id)

    def fault(self, reason: str) -> None:
        """Stop this channel for *reason*; the guest may close it and open it again."""
        if self.state not in _ALIVE or self.state is ChannelState.FAULTED:
            return
        self.fault_reason = reason
        self._leave(ChannelState.FAULTED)
        self._violation(f"channel {self.channel_id} ({self.offer.name}) faulted: {reason}")

    # For the hypervisor.

    def process(self) -> bool:
        """The guest signalled: send what waits, take what came.

        True if so much came that the rest was left for another call, which must follow: the guest
        does not signal again. Nothing is raised for what a guest does.
        """
        if self.state is not ChannelState.OPEN:
            return False
        if self.elsewhere is not None:
            self.elsewhere.signalled()
            return False
        try:
            self._processing = True
            try:
                more = self._drain()
                if self.settle is not None and self.is_open:
                    self.settle()
            finally:
                self._processing = False
            self._interrupt()
        except RemoteProtocolError as error:
            self.fault(str(error))
            return False
        return more

    # For the bus.

    def open(self, gpadl: Gpadl, downstream: int, target_vp: int) -> None:
        """Set up both rings in *gpadl*: *downstream* pages from guest to host, the others back.

        :class:`RemoteProtocolError`, and nothing done, if they cannot be rings.
        """
        incoming, outgoing = None, None
        if self.elsewhere is not None:
            self.elsewhere.open_rings(self, gpadl.ring_pages(), downstream, target_vp)
        else:
            from_guest, to_guest = self._rings(gpadl, downstream)
            incoming, outgoing = IncomingRing(from_guest), OutgoingRing(to_guest)
        self._enter(ChannelState.OPEN)
        self._incoming, self._outgoing, self._downstream = incoming, outgoing, downstream
        self.paused, self.settle, self.serve = False, None, None
        self.target_vp, self.held_open, self.ring_gpadl = target_vp, True, gpadl.handle
        self._port.connect_signal(self.connection_id, self)

    def _rings(self, gpadl: Gpadl, downstream: int) -> tuple[RingBuffer, RingBuffer]:
        pfns = gpadl.ring_pages()
        if not 0 < downstream < len(pfns):
            raise RemoteProtocolError(
                f"the host's ring starts at page {downstream} of {len(pfns)} pages."
            )
        return (
            RingBuffer(self._memory, pfns[:downstream]),
            RingBuffer(self._memory, pfns[downstream:]),
        )

    def save(self, *, offered: bool) -> SavedChannel:
        """All of it that a guest relies on; *offered*: the guest was told of it."""
        if self.elsewhere is not None and self.is_open:
            raise LocalProtocolError(f"{self!r} is served by another process, which has its rings.")
        rings = None
        if self._incoming is not None and self._outgoing is not None:
            rings = SavedRings(
                self._downstream,
                self._incoming.read_index,
                self._incoming.guest_has_room,
                self._outgoing.write_index,
                self._outgoing.pending_send_size,
                tuple(self._queue),
                self._interrupt_wanted,
            )
        return SavedChannel(
            self.channel_id,
            self.offer,
            offered,
            self.state,
            self.target_vp,
            self.held_open,
            self.ring_gpadl,
            self.paused,
            self.packets_received,
            self.packets_sent,
            self.interrupts,
            rings,
        )

    def restore(self, saved: SavedChannel) -> None:
        """Become what :meth:`save` described; its GPADLs are there again.

        The device is not told. :class:`RemoteProtocolError` if the rings cannot be that.
        """
        self.state, self.target_vp = saved.state, saved.target_vp
        self.held_open, self.ring_gpadl = saved.held_open, saved.ring_gpadl
        self.paused, self.packets_received = saved.paused, saved.packets_received
        self.packets_sent, self.interrupts = saved.packets_sent, saved.interrupts
        rings = saved.rings
        if (rings is not None) is not self.is_open or (rings and saved.ring_gpadl is None):
            raise RemoteProtocolError(f"{self!r} and its rings contradict each other.")
        if rings is None or saved.ring_gpadl is None:
            return
        from_guest, to_guest = self._rings(self.gpadl(saved.ring_gpadl), rings.downstream)
        self._incoming = IncomingRing.restore(from_guest, rings.read_index, rings.guest_has_room)
        self._outgoing = OutgoingRing.restore(to_guest, rings.write_index, rings.pending_send_size)
        self._downstream, self._interrupt_wanted = rings.downstream, rings.interrupt_wanted
        self._queue.extend(rings.queue)
        self._port.connect_signal(self.connection_id, self)

    def start(self) -> None:
        """Tell the device, once the guest knows that its channel is open."""
        try:
            self.device.opened(self)
        except RemoteProtocolError as error:
            self.fault(str(error))
        if self.process():
            self.fault("the guest filled the ring before it knew that the channel is open.")

    def move(self, target_vp: int) -> None:
        """Interrupt that VP from now on."""
        self.target_vp = target_vp
        if self.elsewhere is not None and self.is_open:
            self.elsewhere.moved(target_vp)

    def close(self) -> None:
        """The guest closed it."""
        self._let_go()
        if self.state is not ChannelState.RESCINDED:
            self._leave(ChannelState.CLOSED)

    def rescind(self) -> None:
        """The device is gone; the guest still has to let go of the channel."""
        self._leave(ChannelState.RESCINDED)

    def release(self) -> None:
        """The guest let go of a rescinded channel."""
        self._enter(ChannelState.RELEASED)

    def disconnect(self) -> None:
        """The guest's connection is over."""
        self._let_go()
        self._leave(ChannelState.OFFERED)

    def _let_go(self) -> None:
        self.held_open, self.ring_gpadl = False, None

    def _enter(self, state: ChannelState) -> None:
        if state not in _NEXT[self.state]:
            raise LocalProtocolError(f"{self!r} cannot become {state.value}.")
        self.state = state

    def _leave(self, state: ChannelState) -> None:
        """Enter a state that is not open, and tell the device if it was."""
        was_open = self.is_open
        self._enter(state)
        if was_open:
            self._incoming = self._outgoing = None
            self._queue.clear()
            self._interrupt_wanted = False
            self._port.disconnect_signal(self.connection_id)
            self.device.closed()

    def _append(self, packet: bytes) -> None:
        outgoing = self._outgoing
        assert outgoing is not None
        if not self._queue and outgoing.write(packet):
            self.packets_sent += 1
            self._interrupt_wanted = True
            return
        if not outgoing.can_ever_hold(packet):
            raise RemoteProtocolError(
                f"the guest's ring is too small for a packet of {len(packet)} bytes."
            )
        if len(self._queue) >= QUEUE_LIMIT:
            raise RemoteProtocolError(
                f"the guest does not empty its ring; {len(self._queue)} packets wait for it."
            )
        self._queue.append(packet)
        if len(self._queue) == 1:
            self._flush()

    def _flush(self) -> None:
        """Write what waits; if not all fits, make sure that the guest tells us of new room."""
        outgoing, queue = self._outgoing, self._queue
        assert outgoing is not None
        while queue:
            if outgoing.write(queue[0]):
                queue.popleft()
                self.packets_sent += 1
                self._interrupt_wanted = True
            elif outgoing.waits_for(queue[0]):
                return
            else:
                outgoing.ask_for_room(queue[0])  # and try again: room may have come before that
        if outgoing.pending_send_size:
            outgoing.ask_for_room(None)

    def _drain(self) -> bool:
        incoming, received = self._incoming, self.device.received
        assert incoming is not None
        if self._queue:
            self._flush()
        budget = PROCESS_PACKETS
        incoming.mask()
        while True:
            while not self.paused and len(self._queue) <= QUEUE_THROTTLE:
                if self.serve is not None and (used := incoming.offer_batch(self.serve)):
                    budget -= used >> 6
                    if budget <= 0:
                        return True
                    continue
                packets = incoming.read_batch()
                if not packets:
                    break
                self.packets_received += len(packets)
                for packet in packets:
                    received(packet)
                    if self.state is not ChannelState.OPEN:
                        return False
                budget -= len(packets)
                if budget <= 0:
                    return True
                if incoming.was_emptied:
                    break
            else:  # paused, or too much waits: the guest signals new room
                incoming.unmask()
                return False
            if not incoming.unmask():
                return False
            incoming.mask()

    def _interrupt(self) -> None:
        """Interrupt the guest if it has packets to read or waits for room, and does not know."""
        incoming, outgoing = self._incoming, self._outgoing
        if incoming is None or outgoing is None:
            return
        wanted, self._interrupt_wanted = self._interrupt_wanted, False
        if incoming.guest_has_room:
            incoming.guest_has_room = False
        elif not (wanted and outgoing.guest_wants_interrupt()):
            return
        self.interrupts += 1
        self._port.signal_event(self.target_vp, VMBUS_MESSAGE_SINT, self.channel_id)
