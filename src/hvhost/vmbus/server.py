"""The bus: one guest's connection to its devices.

Source: ``linux/hyperv.h`` and, for what guests expect in which order, ``drivers/hv/channel_mgmt.c``
and ``connection.c`` of Linux 6.1 and ``sys/dev/hyperv/vmbus`` of FreeBSD 14.

A connection: INITIATE_CONTACT (repeated with lower versions until one is accepted), REQUESTOFFERS,
offers, then per channel GPADL, OPENCHANNEL, traffic, CLOSECHANNEL, teardown. It ends with UNLOAD,
a new INITIATE_CONTACT (a kernel started by kexec) or a reset of the machine.

A guest that breaks a rule of one channel faults that channel; one that breaks a rule of the bus is
not answered, or refused. Either way there is one log line and one ``fault`` event, and everything
else goes on. The caller holds one lock around every call into the bus.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable
from typing import Final

from hvhost.errors import HvHostError, LocalProtocolError, RemoteProtocolError
from hvhost.partition.hypercall import HypercallStatus
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.channel import (
    Channel,
    ChannelDevice,
    ChannelState,
    HostPort,
    Offer,
    Packet,
    RestorableDevice,
)
from hvhost.vmbus.gpadl import Gpadl, GpadlTable
from hvhost.vmbus.protocol import (
    MAX_CHANNEL_RELIDS,
    MAX_SIZE_CHANNEL_MESSAGE,
    MAX_USER_DEFINED_BYTES,
    STATUS_CONNECTION_REFUSED,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    VMBUS_MESSAGE_CONNECTION_ID,
    VMBUS_MESSAGE_CONNECTION_ID_4,
    VMBUS_MESSAGE_SINT,
    AllOffersDelivered,
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    HostMessage,
    InitiateContact,
    Message,
    ModifyChannel,
    ModifyChannelResponse,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
    Version,
    VersionResponse,
    decode,
    encode,
    format_version,
)
from hvhost.vmbus.saved import SavedBus, SavedChannel

__all__ = ["HostPort", "VmbusServer"]

logger = logging.getLogger(__name__)

#: ``message_type`` of every SynIC message of the bus.
VMBUS_SYNIC_MESSAGE_TYPE: Final = 1
#: Violations reported until the machine is started anew; a guest must not fill the log.
MAX_VIOLATIONS: Final = 1000
#: Calls of ``Channel.process`` for one signal that came as a hypercall.
SIGNAL_ROUNDS: Final = 256

_CONNECTION_ID_MASK = 0xFF_FFFF  # union hv_connection_id: 24 bits, the rest reserved


class _Absent:
    """Stands on a channel whose device is gone, until the guest let go of it."""

    state = None

    def __init__(self, offer: Offer) -> None:
        self.offer = offer

    def opened(self, channel: Channel) -> None:
        raise LocalProtocolError(f"{channel!r} has no device.")

    def closed(self) -> None:
        """Nobody is there to care."""

    def received(self, packet: Packet) -> None:
        """Nor to read."""


class VmbusServer:
    """The host's end of the bus of one machine.

    *processors* is the number of VPs, *on_event* gets ``("bus", "5.3")`` when a guest connected
    and ``("fault", sentence)`` when it did something wrong.
    """

    def __init__(
        self,
        memory: GuestMemory,
        port: HostPort,
        *,
        on_event: Callable[[str, str], None],
        processors: int = 1,
    ) -> None:
        self._memory, self._port = memory, port
        self._on_event, self._processors = on_event, processors
        #: Asked when the guest's endpoint (first) connects to a service of the host (second): true
        #: if a device was added for it, false to refuse.
        self.on_connect: Callable[[uuid.UUID, uuid.UUID], bool] = lambda endpoint, service: False
        self._channels: dict[int, Channel] = {}
        self._violations = 0
        self._version: Version | None = None
        self._message_vp = 0
        self._offers_requested = False
        self._offered: set[int] = set()
        self._gpadls = GpadlTable(memory)
        self._handlers: dict[type[Message], Callable[[Message], None]] = {}
        handlers: tuple[tuple[type[Message], Callable[..., None]], ...] = (
            (InitiateContact, self._initiate_contact),
            (RequestOffers, self._request_offers),
            (GpadlHeader, self._gpadl_header),
            (GpadlBody, self._gpadl_body),
            (GpadlTeardown, self._gpadl_teardown),
            (OpenChannel, self._open_channel),
            (CloseChannel, self._close_channel),
            (ModifyChannel, self._modify_channel),
            (RelidReleased, self._relid_released),
            (TlConnectRequest, self._tl_connect_request),
            (Unload, self._unload),
        )
        self._handlers.update(handlers)

    # For the machine.

    @property
    def version(self) -> str | None:
        """The negotiated protocol version as ``"5.3"``, ``None`` while no guest is connected."""
        return None if self._version is None else format_version(self._version)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """All channels by id, rescinded ones included until the guest let go of them."""
        return tuple(self._channels[number] for number in sorted(self._channels))

    def add_device(self, device: ChannelDevice) -> Channel:
        """Put *device* on the bus; offered at once if the guest has asked for offers.

        :class:`LocalProtocolError` if its identity is taken or the bus is full. The identity of a
        device just removed is free, but the new offer waits until the guest let go of the old one.
        """
        offer = device.offer
        if len(offer.user_defined) != MAX_USER_DEFINED_BYTES:
            raise LocalProtocolError(
                f"the offer of {offer.name} has {len(offer.user_defined)} user-defined bytes."
            )
        for other in self._channels.values():
            if other.offer.identity == offer.identity and other.state != ChannelState.RESCINDED:
                raise LocalProtocolError(f"{offer.name} is on the bus already, as {other!r}.")
        for number in range(1, MAX_CHANNEL_RELIDS):
            if number not in self._channels:
                break
        else:
            raise LocalProtocolError(f"the bus is full; {offer.name} cannot be added.")
        channel = self._channels[number] = self._new_channel(number, device)
        self._offer_new_channels()
        return channel

    def _new_channel(self, number: int, device: ChannelDevice) -> Channel:
        return Channel(
            number,
            device,
            self._memory,
            self._port,
            violation=self._violation,
            gpadl=self._find_gpadl,
        )

    def remove_device(self, channel: Channel) -> None:
        """Take a device off the bus; its id is in use until the guest released it."""
        if self._channels.get(channel.channel_id) is not channel or (
            channel.state is ChannelState.RESCINDED
        ):
            raise LocalProtocolError(f"{channel!r} is not on the bus.")
        channel.rescind()
        if channel.channel_id in self._offered:
            self._post(RescindChannelOffer(channel.channel_id))
        else:
            self._release(channel)

    def save(self) -> SavedBus:
        """All that a guest relies on, between two calls into the bus; nothing changes."""
        return SavedBus(
            self._version,
            self._message_vp,
            self._offers_requested,
            self._violations,
            self._gpadls.save(),
            tuple(
                channel.save(offered=channel.channel_id in self._offered)
                for channel in self.channels
            ),
        )

    def restore(self, saved: SavedBus, devices: Iterable[ChannelDevice]) -> None:
        """Be the bus that was *saved*; on a new one, with memory and processors in place.

        *devices* are those of then, each with its state, sub-channels' too. One that is missing is
        rescinded, one that is new is offered. Nobody needs to signal again: what the guest sent
        meanwhile is taken. :class:`HvHostError` if *saved* is damaged or does not fit the devices.
        """
        if self._channels or self._version is not None:
            raise LocalProtocolError("only a new bus without devices can be restored.")
        try:
            self._restore(saved, {device.offer.identity: device for device in devices})
        except (RemoteProtocolError, ValueError) as error:
            raise HvHostError(
                f"the saved state of the bus is damaged or of another machine: {error} "
                "Start the machine anew."
            ) from error

    def _restore(
        self, saved: SavedBus, devices: dict[tuple[uuid.UUID, uuid.UUID, int], ChannelDevice]
    ) -> None:
        self._version = None if saved.version is None else Version(saved.version)
        self._check_vp(saved.message_vp)
        self._message_vp, self._violations = saved.message_vp, saved.violations
        for item in saved.gpadls:
            self._gpadls.start(item.channel_id, item.handle, item.range_count, item.size, item.data)
        restored: list[tuple[Channel, RestorableDevice]] = []
        missing: list[Channel] = []
        for old in saved.channels:
            device: ChannelDevice | None = None
            if old.state is not ChannelState.RESCINDED:
                device = devices.pop(old.offer.identity, None)
            channel = self._restore_channel(old, device or _Absent(old.offer))
            if device is None and old.state is not ChannelState.RESCINDED:
                missing.append(channel)
            elif device is not None and channel.is_open:
                if not isinstance(device, RestorableDevice):
                    raise RemoteProtocolError(f"{channel!r} has a device that cannot go on.")
                restored.append((channel, device))
        self._offers_requested = saved.offers_requested
        for channel, device in restored:
            device.restored(channel)
        for channel in missing:
            self.remove_device(channel)
        for device in devices.values():
            self.add_device(device)
        for channel, _ in restored:
            self._process(channel)

    def _restore_channel(self, saved: SavedChannel, device: ChannelDevice) -> Channel:
        number = saved.channel_id
        if not 0 < number < MAX_CHANNEL_RELIDS or number in self._channels:
            raise RemoteProtocolError(f"channel {number} cannot be, or is there twice.")
        if device.offer != saved.offer:
            raise RemoteProtocolError(f"the guest knows another {saved.offer.name}.")
        self._check_vp(saved.target_vp)
        channel = self._channels[number] = self._new_channel(number, device)
        channel.restore(saved)
        if saved.offered:
            self._offered.add(number)
        return channel

    def reset(self) -> None:
        """The machine was reset: no guest is connected, every device waits to be offered."""
        self._disconnect()

    # For the hypervisor.

    def post_message(self, connection_id: int, payload: bytes) -> int:
        """The guest's HvPostMessage ([TLFS] 11.10), *payload* already copied; its HV_STATUS."""
        if connection_id & _CONNECTION_ID_MASK not in (
            VMBUS_MESSAGE_CONNECTION_ID,
            VMBUS_MESSAGE_CONNECTION_ID_4,
        ):
            return HypercallStatus.INVALID_CONNECTION_ID
        if len(payload) > MAX_SIZE_CHANNEL_MESSAGE:
            return HypercallStatus.INVALID_PARAMETER
        try:
            message = decode(payload)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise RemoteProtocolError(f"{message.message_type.name} is for hosts to send.")
            if self._version is None and not isinstance(message, InitiateContact):
                raise RemoteProtocolError(
                    f"{message.message_type.name} came without a connection; "
                    "the guest has to negotiate a version first."
                )
            handler(message)
        except RemoteProtocolError as error:
            self._violation(str(error))
        return HypercallStatus.SUCCESS

    def signal(self, connection_id: int) -> int:
        """The guest's HvSignalEvent ([TLFS] 11.11), where the hypervisor hands it to us."""
        number = connection_id & _CONNECTION_ID_MASK
        for channel in self._channels.values():
            if channel.connection_id == number and channel.is_open:
                break
        else:
            return HypercallStatus.INVALID_CONNECTION_ID
        self._process(channel)
        return HypercallStatus.SUCCESS

    @staticmethod
    def _process(channel: Channel) -> None:
        for _ in range(SIGNAL_ROUNDS):
            if not channel.process():
                break
        else:
            channel.fault("the guest fills the ring faster than it can be read, without a pause.")

    # Messages of the guest.

    def _initiate_contact(self, message: InitiateContact) -> None:
        """The answer goes where the guest wants it, or to VP 0 if that does not exist."""
        self._disconnect()  # a kernel that was started over the last one
        number = message.vmbus_version_requested
        known = number in Version.__members__.values()
        self._message_vp = message.target_vcpu if message.target_vcpu < self._processors else 0
        wrong = None
        if message.target_vcpu >= self._processors:
            wrong = f"the guest wants messages on VP {message.target_vcpu}, which does not exist."
        elif (
            known
            and number >= Version.WIN10_V5
            and (message.msg_sint, message.msg_vtl) != (VMBUS_MESSAGE_SINT, 0)
        ):
            wrong = (
                f"the guest wants messages on SINT {message.msg_sint} of VTL {message.msg_vtl}, "
                f"this host sends them on SINT {VMBUS_MESSAGE_SINT} of VTL 0."
            )
        if wrong or not known:
            logger.info("VMBus version %s refused", format_version(number))
            self._post(VersionResponse(version_supported=0))
            if wrong:
                raise RemoteProtocolError(wrong)
            return
        self._version = Version(number)
        self._post(
            VersionResponse(
                version_supported=1,
                msg_conn_id=VMBUS_MESSAGE_CONNECTION_ID_4
                if number >= Version.WIN10_V5
                else VMBUS_MESSAGE_CONNECTION_ID,
            )
        )
        self._on_event("bus", format_version(number))

    def _request_offers(self, message: RequestOffers) -> None:
        if self._offers_requested:
            raise RemoteProtocolError("the guest asked for offers twice in one connection.")
        self._offers_requested = True
        self._offer_new_channels()
        self._post(AllOffersDelivered())

    def _gpadl_header(self, message: GpadlHeader) -> None:
        number, handle = message.child_relid, message.gpadl
        try:
            channel = self._channel(number)
            gpadl = self._gpadls.start(
                number, handle, message.rangecount, message.range_buflen, message.data
            )
        except RemoteProtocolError as error:
            self._gpadl_failed(number, handle, error)
            return
        if gpadl is not None:
            self._post(GpadlCreated(channel.channel_id, handle, STATUS_SUCCESS))

    def _gpadl_body(self, message: GpadlBody) -> None:
        number = self._gpadls.channel_of(message.gpadl)
        if number is None:
            raise RemoteProtocolError(
                f"page numbers for GPADL {message.gpadl:#x} came without a header."
            )
        try:
            gpadl = self._gpadls.extend(message.gpadl, message.data)
        except RemoteProtocolError as error:
            self._gpadl_failed(number, message.gpadl, error)
            return
        if gpadl is not None:
            self._post(GpadlCreated(number, message.gpadl, STATUS_SUCCESS))

    def _gpadl_failed(self, number: int, handle: int, error: RemoteProtocolError) -> None:
        self._post(GpadlCreated(number, handle, STATUS_UNSUCCESSFUL))
        self._blame(number, error)

    def _gpadl_teardown(self, message: GpadlTeardown) -> None:
        number, handle = message.child_relid, message.gpadl
        if self._gpadls.channel_of(handle) != number:
            raise RemoteProtocolError(
                f"the guest tears down GPADL {handle:#x}, which channel {number} does not have."
            )
        channel = self._channels[number]
        if channel.ring_gpadl == handle:
            channel.fault("the guest took the ring buffer away while the channel was open.")
        self._gpadls.remove(handle)
        self._post(GpadlTorndown(handle))

    def _open_channel(self, message: OpenChannel) -> None:
        number = message.child_relid
        try:
            channel = self._channel(number)
            if channel.state is ChannelState.RESCINDED:  # the guest did not know yet
                self._post(OpenChannelResult(number, message.openid, STATUS_UNSUCCESSFUL))
                return
            if channel.held_open:
                raise RemoteProtocolError("the guest opened it twice.")
            self._check_vp(message.target_vp)
            gpadl = self._gpadls.get(message.ringbuffer_gpadlhandle, number)
            channel.open(gpadl, message.downstream_ringbuffer_pageoffset, message.target_vp)
        except RemoteProtocolError as error:
            self._post(OpenChannelResult(number, message.openid, STATUS_UNSUCCESSFUL))
            self._blame(number, error)
            return
        self._post(OpenChannelResult(number, message.openid, STATUS_SUCCESS))
        channel.start()

    def _close_channel(self, message: CloseChannel) -> None:
        channel = self._channel(message.child_relid)
        if channel.held_open:
            channel.close()
        else:
            self._blame(channel.channel_id, "the guest closed it without having opened it.")

    def _modify_channel(self, message: ModifyChannel) -> None:
        version = self._version or 0
        if version < Version.WIN10_V4_1:
            raise RemoteProtocolError("MODIFYCHANNEL exists from VMBus 4.1 on only.")
        error, status = None, STATUS_SUCCESS
        try:
            channel = self._channel(message.child_relid)
            if not channel.held_open and channel.state is not ChannelState.RESCINDED:
                raise RemoteProtocolError("the guest moved it while it was not open.")
            self._check_vp(message.target_vp)
            channel.move(message.target_vp)
        except RemoteProtocolError as refused:
            error, status = refused, STATUS_UNSUCCESSFUL
        if version >= Version.WIN10_V5_3:  # earlier ones send no answer
            self._post(ModifyChannelResponse(message.child_relid, status))
        if error is not None:
            self._blame(message.child_relid, error)

    def _relid_released(self, message: RelidReleased) -> None:
        channel = self._channel(message.child_relid)
        if channel.state is ChannelState.RESCINDED:
            self._release(channel)
        elif channel.held_open:
            self._blame(channel.channel_id, "the guest released it while it was open.")
        else:  # it has no use for the offer, which stands until the next connection
            logger.info("the guest declined %r", channel)
            self._gpadls.remove_channel(channel.channel_id)

    def _tl_connect_request(self, message: TlConnectRequest) -> None:
        """Guests up to 4.0 are not told of a refusal and left to their own time-out."""
        if self.on_connect(message.guest_endpoint_id, message.host_service_id):
            return
        if (self._version or 0) >= Version.WIN10_V4_1:
            self._post(
                TlConnectResult(
                    message.guest_endpoint_id, message.host_service_id, STATUS_CONNECTION_REFUSED
                )
            )

    def _unload(self, message: Unload) -> None:
        self._disconnect()
        self._post(UnloadResponse())

    # The rest.

    def _post(self, message: HostMessage) -> None:
        self._port.post_message(
            self._message_vp, VMBUS_MESSAGE_SINT, VMBUS_SYNIC_MESSAGE_TYPE, encode(message)
        )

    def _channel(self, number: int) -> Channel:
        if number not in self._offered:
            raise RemoteProtocolError(f"the guest was offered no channel {number}.")
        return self._channels[number]

    def _check_vp(self, vp: int) -> None:
        if vp >= self._processors:
            raise RemoteProtocolError(f"VP {vp} does not exist, there are {self._processors}.")

    def _find_gpadl(self, handle: int, channel_id: int) -> Gpadl:
        return self._gpadls.get(handle, channel_id)

    def _offer_new_channels(self) -> None:
        """Offer what the guest has not seen, unless it still holds the like of it rescinded."""
        if not self._offers_requested:
            return
        leaving = {
            channel.offer.identity
            for channel in self._channels.values()
            if channel.state is ChannelState.RESCINDED
        }
        for number, channel in sorted(self._channels.items()):
            offer = channel.offer
            if number in self._offered or offer.identity in leaving:
                continue
            self._offered.add(number)
            self._post(
                OfferChannel(
                    if_type=offer.interface_type,
                    if_instance=offer.interface_instance,
                    reserved1=0,
                    reserved2=0,
                    chn_flags=offer.flags,
                    mmio_megabytes=offer.mmio_megabytes,
                    user_def=offer.user_defined,
                    sub_channel_index=offer.sub_channel_index,
                    reserved3=0,
                    child_relid=number,
                    # No monitor pages: the guest signals by hypercall, which costs us no polling.
                    monitorid=0,
                    monitor_allocated=0,
                    is_dedicated_interrupt=int(offer.is_dedicated_interrupt),
                    connection_id=channel.connection_id,
                )
            )

    def _release(self, channel: Channel) -> None:
        channel.release()
        self._gpadls.remove_channel(channel.channel_id)
        self._offered.discard(channel.channel_id)
        del self._channels[channel.channel_id]
        self._offer_new_channels()

    def _disconnect(self) -> None:
        """The connection is over: close what is open, forget what the guest had."""
        self._version = None
        self._offers_requested = False
        self._offered.clear()
        self._gpadls = GpadlTable(self._memory)
        for channel in self.channels:
            if self._channels.get(channel.channel_id) is not channel:
                continue  # a sub-channel, which went with the channel before it
            if channel.state is ChannelState.RESCINDED:
                channel.release()
                del self._channels[channel.channel_id]
            else:
                channel.disconnect()

    def _blame(self, number: int, error: RemoteProtocolError | str) -> None:
        """One line for a violation: by the channel it faults, or by the bus."""
        if number not in self._offered:
            self._violation(str(error))
            return
        channel = self._channels[number]
        if channel.state in (ChannelState.FAULTED, ChannelState.RESCINDED):
            self._violation(f"channel {number} ({channel.offer.name}): {error}")
        else:
            channel.fault(str(error))

    def _violation(self, sentence: str) -> None:
        self._violations += 1
        if self._violations > MAX_VIOLATIONS:
            return
        if self._violations == MAX_VIOLATIONS:
            sentence += " This was the last one to be reported."
        logger.warning("%s", sentence)
        self._on_event("fault", sentence)
