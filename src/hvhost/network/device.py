"""netvsc: a network adapter as a device of the bus.

Source: ``drivers/net/hyperv`` of Linux 6.1 for what a guest expects, in which order.

Life of an adapter: the guest negotiates NVSP, tells its MTU, lends a receive and a send buffer,
initialises RNDIS, asks what there is, opens sub-channels if it wants to spread its load, and sets
a packet filter; from then on frames move. What comes while there is no filter, or with the link
down, is lost. Closing the first channel ends all of it.

Frames go from guest memory to the wire and back without a copy in between. A frame that the wire
does not take at once keeps its memory, because the guest gets its completion only afterwards; while
one waits, nothing more is taken from the guest. The guest's receive buffer holds back the other
direction: what does not fit stays in the wire.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from hvhost.errors import RemoteProtocolError
from hvhost.network import protocol, rndis, transmit
from hvhost.network.buffers import (
    SECTION_SIZE,
    SEND_SECTION_SIZE,
    ReceiveBuffer,
    SendBuffer,
    Span,
)
from hvhost.network.control import ControlSide
from hvhost.network.protocol import (
    NETVSC_INVALID_INDEX,
    NETVSC_RECEIVE_BUFFER_ID,
    Capability,
    MessageType,
    NvspVersion,
    Status,
)
from hvhost.network.receive import Receiver, Source
from hvhost.network.rndis import RndisStatus
from hvhost.network.state import AdapterState
from hvhost.network.toeplitz import FlowTable
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.channel import Channel, ChannelDevice, Offer, Packet, PacketType
from hvhost.wire import Record

#: Control messages that may wait for a free section of the receive buffer.
CONTROL_LIMIT: Final = 64
#: Packets that may have been handled before the guest hears of it, and bytes of one of which it
#: hears at once.
COMPLETIONS: Final = 32
LARGE_PACKET: Final = 16 * 1024
#: Largest MTU a guest may ask for; smallest frame buffers are made for.
MAXIMUM_MTU: Final = 65535 - 14
MINIMUM_MTU: Final = 68
_MAXIMUM_MDL_CHAIN = 34
_RNDIS_DATA = protocol.encode(
    MessageType.SEND_RNDIS_PKT, protocol.SendRndisPacket(protocol.RMC_DATA)
)
_RNDIS_CONTROL = protocol.encode(
    MessageType.SEND_RNDIS_PKT, protocol.SendRndisPacket(protocol.RMC_CONTROL)
)
_DONE = protocol.encode(
    MessageType.SEND_RNDIS_PKT_COMPLETE, protocol.SendRndisPacketComplete(Status.SUCCESS)
)
# Of an enumeration, but once: they are looked at for every packet.
_COMP, _INBAND = PacketType.COMP, PacketType.DATA_INBAND
_GPA_DIRECT = PacketType.DATA_USING_GPA_DIRECT
_SEND_RNDIS_PKT = int(MessageType.SEND_RNDIS_PKT)
#: A guest that never stops sending is not waited for when its adapter goes.
_ROUNDS: Final = 8
_INSTANCES = uuid.UUID("c7f0b2a5-6a0f-4c6c-a0a5-6e6574767363")


class Wire(Source, Protocol):
    """What an adapter is plugged into; nothing of it ever blocks."""

    def send(self, buffers: transmit.Buffers) -> bool:
        """Take one frame with its offload header; false, and nothing done, if it cannot now."""
        ...

    def watch(self, *, read: bool, write: bool) -> None:
        """Which of the two the adapter waits for."""
        ...


class Bus(Protocol):
    """Where an adapter puts its sub-channels."""

    def add_device(self, device: ChannelDevice) -> Channel: ...

    def remove_device(self, channel: Channel) -> None: ...


class NetworkAdapter:
    """One adapter; all of it is called with the bus's lock held."""

    def __init__(
        self,
        name: str,
        mac: bytes,
        memory: GuestMemory,
        bus: Bus,
        wire: Wire,
        *,
        queues: int = 1,
        may_spoof: bool = False,
    ) -> None:
        self.state = AdapterState(mac)
        instance = uuid.uuid5(_INSTANCES, mac.hex())
        self.offer = Offer(protocol.HV_NIC_GUID, instance, f"network adapter {name}")
        self.wire = wire
        self.queues = max(1, min(queues, protocol.VRSS_CHANNEL_MAX))
        self._memory, self._bus, self._may_spoof = memory, bus, may_spoof
        self._control = ControlSide(
            self.state,
            mac=mac,
            name=name,
            queues=self.queues,
            may_change_mac=may_spoof,
            changed=self._control_changed,
        )
        self._channel: Channel | None = None
        self._subchannels: dict[int, tuple[SubChannel, Channel]] = {}
        self._receiver: Receiver | None = None
        self._receive_buffer: ReceiveBuffer | None = None
        self._send_buffer: SendBuffer | None = None
        self._waiting: deque[tuple[transmit.Buffers | None, Channel, int]] = deque()
        # Transactions to be completed once all that came with them was handled.
        self._done: dict[Channel, list[int]] = {}
        self._controls: deque[bytes] = deque()
        self._watching = (False, False)
        #: Set by the machine: handles a channel anew, outside of what is being done now.
        self.process_later: Callable[[Channel], None] = lambda channel: None

    @property
    def is_open(self) -> bool:
        return self._channel is not None

    # For the machine.

    def set_link(self, up: bool) -> None:
        """Plug the adapter in, or pull its plug, and tell the guest."""
        if self.state.link == up:
            return
        self.state.link = up
        if self.state.initialized:
            status = RndisStatus.MEDIA_CONNECT if up else RndisStatus.MEDIA_DISCONNECT
            self._send_control(rndis.indication(status))
            self._flush()
        self._watch()

    def quiesce(self) -> int:
        """Pull the plug and answer all that the guest sent, since the adapter is to be removed.

        How many packets came so far, on all channels: no more come once the guest knows. Linux
        waits for the completion of what it sent to an adapter that is gone, without end and with
        the lock of all its interfaces held (``rndis_filter_halt_device``).
        """
        self.set_link(False)
        if self._waiting:
            self._finish_waiting()
        for channel in self._channels():
            for _ in range(_ROUNDS):
                if not channel.process():
                    break
        return sum(channel.packets_received for channel in self._channels())

    def readable(self) -> bool:
        """The wire has frames; true if there may be more to be taken now."""
        receiver = self._receiver
        if receiver is None:
            return False
        if not self._listens:
            return receiver.discard(self.wire)
        if self._blocked:
            return False
        more = receiver.pull(self.wire)
        self._flush()
        self._watch()
        return more and not self._blocked

    def writable(self) -> None:
        """The wire takes frames again."""
        self._drain()
        if not self._waiting:
            self._go_on()
        self._watch()

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._channel = channel
        channel.settle = self.settle

    def closed(self) -> None:
        self._channel = None
        for number in list(self._subchannels):
            _, channel = self._subchannels.pop(number)
            self._bus.remove_device(channel)
        state = self.state
        state.version = None
        state.receive_buffer = state.send_buffer = None
        state.initialized = state.merging = False
        state.filter = 0
        state.subchannels = 0
        # The next to open it may be another kernel, and need not speak of these.
        fresh = AdapterState(state.mac)
        state.mtu, state.capabilities = fresh.mtu, fresh.capabilities
        state.scaling, state.multicast = fresh.scaling, fresh.multicast
        self._receiver = self._receive_buffer = self._send_buffer = None
        self._waiting.clear()
        self._done.clear()
        self._controls.clear()
        self._watch()

    def received(self, packet: Packet) -> None:
        assert self._channel is not None
        self.take(self._channel, packet)

    # Packets, of all channels.

    def take(self, channel: Channel, packet: Packet) -> None:
        """A packet on *channel*, the first one or another."""
        kind = packet.type
        if kind is _COMP:
            if self._receive_buffer is None:
                raise RemoteProtocolError("the guest completed a packet without a receive buffer.")
            self._receive_buffer.take_back(packet.transaction_id)
            return
        if kind is not _INBAND and kind is not _GPA_DIRECT:
            raise RemoteProtocolError(f"a network adapter got a packet {kind.name}.")
        message, channel_type, index, size = protocol.peek(packet.payload)
        if message == _SEND_RNDIS_PKT:
            self._rndis(channel, packet, channel_type, index, size)
        elif channel is self._channel:
            self._nvsp(channel, message, packet)
        else:
            raise RemoteProtocolError(f"NVSP message {message} came on a sub-channel.")

    def _rndis(
        self, channel: Channel, packet: Packet, channel_type: int, index: int, size: int
    ) -> None:
        span, size = self._span(packet, index, size)
        if channel_type == protocol.RMC_CONTROL:
            message = span.read(0, min(size, rndis.CONTROL_LIMIT))
            channel.send_completion(packet.transaction_id, _DONE)
            answer = self._control.answer(message)
            if answer is not None:
                self._send_control(answer)
            return
        state = self.state
        if state.version is None or not state.initialized:
            raise RemoteProtocolError("a frame came before RNDIS was initialised.")
        waiting, send = self._waiting, self.wire.send
        for buffers in transmit.frames(state, span, size, may_spoof=self._may_spoof):
            if state.link and (waiting or not send(buffers)):
                waiting.append((buffers, channel, 0))
        if waiting:
            waiting.append((None, channel, packet.transaction_id))
            for other in self._channels():
                other.paused = True
        else:
            done = self._done.get(channel)
            if done is None or size >= LARGE_PACKET:
                # The guest's TCP keeps back what is too much for the device, two large packets it
                # may be: it makes the next while the rest is handled.
                self._done.setdefault(channel, [])
                channel.send_completion(packet.transaction_id, _DONE)
                channel.interrupt_now()
                return
            done.append(packet.transaction_id)
            if len(done) >= COMPLETIONS:
                channel.send_completions(done, _DONE)
                done.clear()

    def _span(self, packet: Packet, index: int, size: int) -> tuple[Span, int]:
        """Where a packet's RNDIS messages lie, and how many bytes they take."""
        pieces: list[memoryview]
        if index == NETVSC_INVALID_INDEX:
            pieces = []
        elif self._send_buffer is None:
            raise RemoteProtocolError("the guest names a section, but has no send buffer.")
        else:
            section = self._send_buffer.section(index, size)
            if packet.type is not _GPA_DIRECT:
                return section, size
            pieces = section.slice(0, size)
        if packet.type is _GPA_DIRECT:
            pieces += packet.views(self._memory)
        span = Span(pieces)
        return span, span.length

    def _drain(self) -> None:
        """Write what waits; a completion stands behind the frames that it is for."""
        waiting = self._waiting
        while waiting:
            buffers, channel, transaction = waiting[0]
            if buffers is None:
                channel.send_completion(transaction, _DONE)
            elif not self.wire.send(buffers):
                return
            waiting.popleft()

    def _go_on(self) -> None:
        """Nothing waits for the wire any more: packets are taken again."""
        for channel in self._channels():
            channel.paused = False
            self.process_later(channel)

    # NVSP.

    def _nvsp(self, channel: Channel, kind: int, packet: Packet) -> None:
        payload, offset = packet.payload, protocol.body_offset()
        if kind == MessageType.INIT:
            self._reply(packet, MessageType.INIT_COMPLETE, self._negotiate(payload))
        elif self.state.version is None:
            raise RemoteProtocolError(f"NVSP message {kind} came before a version was agreed on.")
        elif kind == MessageType.SEND_NDIS_CONFIG:
            config = protocol.SendNdisConfig.unpack(payload, offset)
            mtu = config.mtu - 14
            if not MINIMUM_MTU <= mtu <= MAXIMUM_MTU:
                raise RemoteProtocolError(f"the guest wants an MTU of {mtu} bytes.")
            if self._receive_buffer is not None:  # its sections are made for the MTU there was
                raise RemoteProtocolError("the guest changes its MTU with its receive buffer lent.")
            self.state.mtu, self.state.capabilities = mtu, Capability(config.capability)
        elif kind == MessageType.SEND_NDIS_VER:
            # 6.1 or 6.30; what they have in common is all that is used. That both words are there,
            # peek() has seen to.
            pass
        elif kind == MessageType.SEND_RECV_BUF:
            body = protocol.SendBuffer.unpack(payload, offset)
            self._reply(packet, MessageType.SEND_RECV_BUF_COMPLETE, self._lend_receive(body))
        elif kind == MessageType.SEND_SEND_BUF:
            body = protocol.SendBuffer.unpack(payload, offset)
            if self._send_buffer is not None:
                raise RemoteProtocolError("the guest lent a second send buffer.")
            self._send_buffer = SendBuffer(channel.gpadl(body.gpadl_handle), self._memory)
            self.state.send_buffer = body.gpadl_handle
            answer = protocol.SendSendBufferComplete(Status.SUCCESS, SEND_SECTION_SIZE)
            self._reply(packet, MessageType.SEND_SEND_BUF_COMPLETE, answer)
        elif kind == MessageType.REVOKE_RECV_BUF:
            self._receiver = self._receive_buffer = self.state.receive_buffer = None
            self._controls.clear()
        elif kind == MessageType.REVOKE_SEND_BUF:
            self._send_buffer = self.state.send_buffer = None
            self._finish_waiting()
        elif kind == MessageType.SUBCHANNEL:
            request = protocol.SubchannelRequest.unpack(payload, offset)
            self._open_subchannels(packet, request)
        elif kind == MessageType.SWITCH_DATA_PATH:
            channel.send_completion(packet.transaction_id)
        else:
            raise RemoteProtocolError(f"NVSP message {kind} is unknown or for hosts to send.")

    def _reply(self, packet: Packet, kind: MessageType, body: Record) -> None:
        assert self._channel is not None
        self._channel.send_completion(packet.transaction_id, protocol.encode(kind, body))

    def _negotiate(self, payload: bytes) -> protocol.InitComplete:
        request = protocol.Init.unpack(payload, protocol.body_offset())
        if self._receive_buffer is not None:
            raise RemoteProtocolError("the guest negotiates anew with its buffers lent.")
        known = [
            version
            for version in NvspVersion
            if request.min_protocol_ver <= version <= request.max_protocol_ver
        ]
        self.state.version = max(known, default=None)
        status = Status.SUCCESS if known else Status.PROTOCOL_UNSUPPORTED
        return protocol.InitComplete(self.state.version or 0, _MAXIMUM_MDL_CHAIN, status)

    def _lend_receive(self, body: protocol.SendBuffer) -> protocol.SendReceiveBufferComplete:
        assert self._channel is not None
        if self._receive_buffer is not None:
            raise RemoteProtocolError("the guest lent a second receive buffer.")
        if body.id != NETVSC_RECEIVE_BUFFER_ID:
            raise RemoteProtocolError(f"a receive buffer came as number {body.id:#x}.")
        gpadl = self._channel.gpadl(body.gpadl_handle)
        buffer = ReceiveBuffer(gpadl, self._memory)
        self._receive_buffer = buffer
        self._receiver = Receiver(self.state, buffer, self._deliver, self._flush)
        self.state.receive_buffer = body.gpadl_handle
        return protocol.SendReceiveBufferComplete(
            Status.SUCCESS, 1, 0, SECTION_SIZE, buffer.count, SECTION_SIZE * buffer.count
        )

    def _finish_waiting(self) -> None:
        """The guest takes its send buffer back: frames that still wait are lost, not unfinished."""
        lost, self._waiting = self._waiting, deque()
        for buffers, channel, transaction in lost:
            if buffers is None:
                channel.send_completion(transaction, _DONE)
        self._go_on()

    # Sub-channels.

    def _open_subchannels(self, packet: Packet, request: protocol.SubchannelRequest) -> None:
        if request.op != protocol.SubchannelOperation.ALLOCATE or self._subchannels:
            raise RemoteProtocolError("the guest asks for sub-channels in a way there is none.")
        count = min(request.num_subchannels, self.queues - 1)
        self.state.subchannels = count
        self._reply(
            packet, MessageType.SUBCHANNEL, protocol.SubchannelComplete(Status.SUCCESS, count)
        )
        for number in range(1, count + 1):
            device = SubChannel(self, number)
            self._subchannels[number] = device, self._bus.add_device(device)
        if count and (self.state.version or 0) >= NvspVersion.V5:
            assert self._channel is not None
            entries = [number % (count + 1) for number in range(protocol.VRSS_SEND_TAB_SIZE)]
            self._channel.send(protocol.indirection_table(entries))

    def _channels(self) -> list[Channel]:
        found = [] if self._channel is None else [self._channel]
        return found + [item.channel for item, _ in self._subchannels.values() if item.channel]

    # Towards the guest.

    @property
    def _blocked(self) -> bool:
        """The guest does not empty a ring."""
        channel = self._channel
        if channel is not None and channel.queued:
            return True
        for item, _ in self._subchannels.values():  # not any(): it costs more than all the rest
            if item.channel is not None and item.channel.queued:
                return True
        return False

    def _deliver(self, number: int, ranges: list[int], sections: list[int]) -> None:
        if self._channel is None or self._receive_buffer is None:
            return  # it just faulted
        channel, payload = self._channel, _RNDIS_DATA
        if number > 0:
            found = self._subchannels.get(number)
            if found is not None and found[0].channel is not None:
                channel = found[0].channel
        elif number < 0:
            payload = _RNDIS_CONTROL
        channel.send(
            payload,
            packet_type=PacketType.DATA_USING_XFER_PAGES,
            transaction_id=self._receive_buffer.lend(sections),
            completion_requested=True,
            header=protocol.transfer_pages_header(NETVSC_RECEIVE_BUFFER_ID, ranges),
            more=True,
        )

    def _send_control(self, message: bytes) -> None:
        if len(self._controls) >= CONTROL_LIMIT:
            raise RemoteProtocolError("the guest asks and asks, and takes no answers.")
        self._controls.append(message)
        self._send_controls()

    def _send_controls(self) -> None:
        receiver, buffer = self._receiver, self._receive_buffer
        if receiver is None or buffer is None:
            return
        while self._controls and buffer.free:
            receiver.control(self._controls.popleft())

    def _flush(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.flush()
        for item, _ in self._subchannels.values():
            if item.channel is not None:
                item.channel.flush()

    def settle(self) -> None:
        """The guest's packets were handled: it hears so, and sections may have come back."""
        if self._done:
            for channel, transactions in self._done.items():
                if transactions:
                    channel.send_completions(transactions, _DONE)
            self._done.clear()
        if self._controls:
            self._send_controls()
        self._watch()

    @property
    def _listens(self) -> bool:
        """Frames are for the guest. Else they are lost, not kept: it would get them much later."""
        return self.state.link and self.state.filter != 0

    def _watch(self) -> None:
        state, buffer = self.state, self._receive_buffer
        read = buffer is not None and (
            not (state.link and state.filter)  # what nobody listens to is lost
            or (len(buffer.free) > buffer.kept_free(state.merging) and not self._blocked)
        )
        wanted = read, bool(self._waiting)
        if wanted != self._watching:
            self._watching = wanted
            self.wire.watch(read=wanted[0], write=wanted[1])

    def _control_changed(self) -> None:
        receiver = self._receiver
        if receiver is not None and receiver.flows.scaling is not self.state.scaling:
            receiver.flows = FlowTable(self.state.scaling)

    def subchannel_closed(self) -> None:
        """A sub-channel is no longer open: what it had waiting is not sent."""
        waited = bool(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[1].is_open)
        self._done = {each: ids for each, ids in self._done.items() if each.is_open}
        if waited and not self._waiting:
            self._go_on()
        self._watch()


class SubChannel:
    """Another channel of an adapter, number *number* of it."""

    def __init__(self, adapter: NetworkAdapter, number: int) -> None:
        first = adapter.offer
        self.offer = Offer(
            first.interface_type,
            first.interface_instance,
            f"{first.name}, channel {number}",
            sub_channel_index=number,
        )
        self.state = None  # the adapter's holds it all
        self.channel: Channel | None = None
        self._adapter = adapter

    def opened(self, channel: Channel) -> None:
        self.channel = channel
        channel.settle = self._adapter.settle

    def closed(self) -> None:
        self.channel = None
        self._adapter.subchannel_closed()

    def received(self, packet: Packet) -> None:
        assert self.channel is not None
        self._adapter.take(self.channel, packet)
