"""VMBus channel messages: what guest and host post to each other to set the bus up.

Sources: ``linux/hyperv.h`` (``vmbus_channel_message_type`` and the structures beside it), names as
there. Every message is a fixed record after an 8-byte header; the two GPADL messages carry a list
behind it in ``data``. No I/O: :func:`decode` makes a typed message of bytes, :func:`encode` the
way back, for both directions, so that a simulated guest speaks with the same code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from typing import Annotated, ClassVar, Final

from hvhost.errors import RemoteProtocolError
from hvhost.partition.synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT
from hvhost.vmbus.saved import MAX_USER_DEFINED_BYTES as MAX_USER_DEFINED_BYTES
from hvhost.wire import U8, U16, U32, U64, Buffer, Bytes120, Guid, Record

#: The SINT on which VMBus messages and channel interrupts arrive.
VMBUS_MESSAGE_SINT: Final = 2
#: Message connection of guests up to protocol 4.1.
VMBUS_MESSAGE_CONNECTION_ID: Final = 1
#: Message connection of guests from protocol 5.0 on.
VMBUS_MESSAGE_CONNECTION_ID_4: Final = 4
#: Bytes of one posted message.
MAX_SIZE_CHANNEL_MESSAGE: Final = HV_MESSAGE_PAYLOAD_BYTE_COUNT
#: Channel ids are flags of a SynIC event page: 1 to 2047 (``HV_EVENT_FLAGS_COUNT``).
MAX_CHANNEL_RELIDS: Final = 2048

#: ``status`` of results: zero or an NTSTATUS.
STATUS_SUCCESS: Final = 0
STATUS_UNSUCCESSFUL: Final = 0xC0000001
STATUS_CONNECTION_REFUSED: Final = 0xC0000236


class Version(IntEnum):
    """Protocol versions this host accepts: major in the high 16 bits, minor in the low ones.

    Older ones (1.1, 0.13) signal through a shared interrupt page and are refused; a guest that
    knows them knows a newer one too.
    """

    WIN8 = 0x2_0004
    WIN8_1 = 0x3_0000
    WIN10 = 0x4_0000
    WIN10_V4_1 = 0x4_0001
    WIN10_V5 = 0x5_0000
    WIN10_V5_1 = 0x5_0001
    WIN10_V5_2 = 0x5_0002
    WIN10_V5_3 = 0x5_0003


def format_version(version: int) -> str:
    """``"5.3"`` for 0x50003."""
    return f"{version >> 16}.{version & 0xFFFF}"


class MessageType(IntEnum):
    """``enum vmbus_channel_message_type``; 18 to 20 and 25 are not used by guests we know."""

    OFFERCHANNEL = 1
    RESCIND_CHANNELOFFER = 2
    REQUESTOFFERS = 3
    ALLOFFERS_DELIVERED = 4
    OPENCHANNEL = 5
    OPENCHANNEL_RESULT = 6
    CLOSECHANNEL = 7
    GPADL_HEADER = 8
    GPADL_BODY = 9
    GPADL_CREATED = 10
    GPADL_TEARDOWN = 11
    GPADL_TORNDOWN = 12
    RELID_RELEASED = 13
    INITIATE_CONTACT = 14
    VERSION_RESPONSE = 15
    UNLOAD = 16
    UNLOAD_RESPONSE = 17
    TL_CONNECT_REQUEST = 21
    MODIFYCHANNEL = 22
    TL_CONNECT_RESULT = 23
    MODIFYCHANNEL_RESPONSE = 24


class OfferFlags(IntFlag):
    """``chn_flags`` of an offer."""

    ENUMERATE_DEVICE_INTERFACE = 0x1
    SERVER_SUPPORTS_TRANSFER_PAGES = 0x2
    SERVER_SUPPORTS_GPADLS = 0x4
    NAMED_PIPE_MODE = 0x10
    LOOPBACK_OFFER = 0x100
    PARENT_OFFER = 0x200
    REQUEST_MONITORED_NOTIFICATION = 0x400
    TLNPI_PROVIDER_OFFER = 0x2000


#: ``pipe_mode``, the first four user-defined bytes of an offer with ``NAMED_PIPE_MODE``.
VMBUS_PIPE_TYPE_BYTE: Final = 0
VMBUS_PIPE_TYPE_MESSAGE: Final = 4

# The bytes behind the fixed part, up to the end of the message: decode() and encode() carry them.
Rest = Annotated[bytes, "0s"]


@dataclass(frozen=True, slots=True)
class OfferChannel(Record):  # struct vmbus_channel_offer_channel
    """The host has a device; ``mmio_megabytes`` is what it needs of the MMIO windows."""

    message_type: ClassVar[MessageType] = MessageType.OFFERCHANNEL
    if_type: Guid
    if_instance: Guid
    reserved1: U64
    reserved2: U64
    chn_flags: U16
    mmio_megabytes: U16
    user_def: Bytes120
    sub_channel_index: U16
    reserved3: U16
    child_relid: U32
    monitorid: U8
    monitor_allocated: U8
    is_dedicated_interrupt: U16
    connection_id: U32


@dataclass(frozen=True, slots=True)
class RescindChannelOffer(Record):  # struct vmbus_channel_rescind_offer
    """The device is gone."""

    message_type: ClassVar[MessageType] = MessageType.RESCIND_CHANNELOFFER
    child_relid: U32


@dataclass(frozen=True, slots=True)
class RequestOffers(Record):
    """The guest wants all offers, now and from now on."""

    message_type: ClassVar[MessageType] = MessageType.REQUESTOFFERS


@dataclass(frozen=True, slots=True)
class AllOffersDelivered(Record):
    """Those that there were have been sent."""

    message_type: ClassVar[MessageType] = MessageType.ALLOFFERS_DELIVERED


@dataclass(frozen=True, slots=True)
class OpenChannel(Record):  # struct vmbus_channel_open_channel
    """``downstream_ringbuffer_pageoffset`` counts pages of the GPADL before the host's ring."""

    message_type: ClassVar[MessageType] = MessageType.OPENCHANNEL
    child_relid: U32
    openid: U32
    ringbuffer_gpadlhandle: U32
    target_vp: U32
    downstream_ringbuffer_pageoffset: U32
    userdata: Bytes120 = bytes(MAX_USER_DEFINED_BYTES)


@dataclass(frozen=True, slots=True)
class OpenChannelResult(Record):  # struct vmbus_channel_open_result
    """``status`` is zero, or an NTSTATUS."""

    message_type: ClassVar[MessageType] = MessageType.OPENCHANNEL_RESULT
    child_relid: U32
    openid: U32
    status: U32


@dataclass(frozen=True, slots=True)
class CloseChannel(Record):  # struct vmbus_channel_close_channel
    """The guest uses the channel no longer; there is no answer."""

    message_type: ClassVar[MessageType] = MessageType.CLOSECHANNEL
    child_relid: U32


@dataclass(frozen=True, slots=True)
class GpadlHeader(Record):  # struct vmbus_channel_gpadl_header
    """``data`` is the start of ``range_buflen`` bytes of ``struct gpa_range``."""

    message_type: ClassVar[MessageType] = MessageType.GPADL_HEADER
    child_relid: U32
    gpadl: U32
    range_buflen: U16
    rangecount: U16
    data: Rest = b""


@dataclass(frozen=True, slots=True)
class GpadlBody(Record):  # struct vmbus_channel_gpadl_body
    """``data`` continues the list; guests fill ``msgnumber`` each in its own way."""

    message_type: ClassVar[MessageType] = MessageType.GPADL_BODY
    msgnumber: U32
    gpadl: U32
    data: Rest = b""


@dataclass(frozen=True, slots=True)
class GpadlCreated(Record):  # struct vmbus_channel_gpadl_created
    """``creation_status`` is zero, or an NTSTATUS."""

    message_type: ClassVar[MessageType] = MessageType.GPADL_CREATED
    child_relid: U32
    gpadl: U32
    creation_status: U32


@dataclass(frozen=True, slots=True)
class GpadlTeardown(Record):  # struct vmbus_channel_gpadl_teardown
    """The guest wants the memory back."""

    message_type: ClassVar[MessageType] = MessageType.GPADL_TEARDOWN
    child_relid: U32
    gpadl: U32


@dataclass(frozen=True, slots=True)
class GpadlTorndown(Record):  # struct vmbus_channel_gpadl_torndown
    """The host does not touch the memory any more."""

    message_type: ClassVar[MessageType] = MessageType.GPADL_TORNDOWN
    gpadl: U32


@dataclass(frozen=True, slots=True)
class RelidReleased(Record):  # struct vmbus_channel_relid_released
    """The guest let go of a rescinded channel; its number is free."""

    message_type: ClassVar[MessageType] = MessageType.RELID_RELEASED
    child_relid: U32


@dataclass(frozen=True, slots=True)
class InitiateContact(Record):  # struct vmbus_channel_initiate_contact
    """From 5.0 on ``interrupt_page`` holds the SINT (byte 0) and VTL (byte 1) for messages."""

    message_type: ClassVar[MessageType] = MessageType.INITIATE_CONTACT
    vmbus_version_requested: U32
    target_vcpu: U32
    interrupt_page: U64
    monitor_page1: U64
    monitor_page2: U64

    @property
    def msg_sint(self) -> int:
        return self.interrupt_page & 0xFF

    @property
    def msg_vtl(self) -> int:
        return self.interrupt_page >> 8 & 0xFF


@dataclass(frozen=True, slots=True)
class VersionResponse(Record):  # struct vmbus_channel_version_response
    """Whether the version that was asked for is spoken, and where messages go then."""

    message_type: ClassVar[MessageType] = MessageType.VERSION_RESPONSE
    version_supported: U8
    connection_state: U8 = 0
    padding: U16 = 0
    msg_conn_id: U32 = 0


@dataclass(frozen=True, slots=True)
class Unload(Record):
    """The guest ends the connection, as before a kernel starts another."""

    message_type: ClassVar[MessageType] = MessageType.UNLOAD


@dataclass(frozen=True, slots=True)
class UnloadResponse(Record):
    """All is undone; nothing of the guest's memory is used any more."""

    message_type: ClassVar[MessageType] = MessageType.UNLOAD_RESPONSE


@dataclass(frozen=True, slots=True)
class TlConnectRequest(Record):  # struct vmbus_channel_tl_connect_request
    """A program in the guest connects to a service of the host by hv_sock."""

    message_type: ClassVar[MessageType] = MessageType.TL_CONNECT_REQUEST
    guest_endpoint_id: Guid
    host_service_id: Guid


@dataclass(frozen=True, slots=True)
class TlConnectResult(Record):
    """``status`` is zero, or an NTSTATUS; a connection comes as an offer."""

    message_type: ClassVar[MessageType] = MessageType.TL_CONNECT_RESULT
    guest_endpoint_id: Guid
    host_service_id: Guid
    status: U32


@dataclass(frozen=True, slots=True)
class ModifyChannel(Record):  # struct vmbus_channel_modifychannel
    """The channel shall interrupt virtual processor ``target_vp`` from now on."""

    message_type: ClassVar[MessageType] = MessageType.MODIFYCHANNEL
    child_relid: U32
    target_vp: U32


@dataclass(frozen=True, slots=True)
class ModifyChannelResponse(Record):  # struct vmbus_channel_modifychannel_response
    """``status`` is zero, or an NTSTATUS; from version 5.3 on."""

    message_type: ClassVar[MessageType] = MessageType.MODIFYCHANNEL_RESPONSE
    child_relid: U32
    status: U32


GuestMessage = (
    RequestOffers
    | OpenChannel
    | CloseChannel
    | GpadlHeader
    | GpadlBody
    | GpadlTeardown
    | RelidReleased
    | InitiateContact
    | Unload
    | TlConnectRequest
    | ModifyChannel
)
HostMessage = (
    OfferChannel
    | RescindChannelOffer
    | AllOffersDelivered
    | OpenChannelResult
    | GpadlCreated
    | GpadlTorndown
    | VersionResponse
    | UnloadResponse
    | TlConnectResult
    | ModifyChannelResponse
)
Message = GuestMessage | HostMessage

_HEADER = struct.Struct("<II")  # struct vmbus_channel_message_header: type, padding
_RECORDS: dict[int, type[Message]] = {
    record.message_type: record for record in (*GuestMessage.__args__, *HostMessage.__args__)
}


def decode(message: Buffer) -> Message:
    """The typed message in *message*; bytes behind a fixed-size record are ignored.

    :class:`RemoteProtocolError` if it is cut short or of a type this host does not know.
    """
    if len(message) < _HEADER.size:
        raise RemoteProtocolError(
            f"a channel message of {len(message)} bytes is shorter than its own header."
        )
    number: int = _HEADER.unpack_from(message)[0]
    record = _RECORDS.get(number)
    if record is None:
        raise RemoteProtocolError(
            f"channel message type {number} is unknown; this host speaks VMBus up to 5.3."
        )
    decoded = record.unpack(message, _HEADER.size)
    if isinstance(decoded, GpadlHeader | GpadlBody):
        return replace(decoded, data=bytes(message[_HEADER.size + record.wire_size() :]))
    return decoded


def encode(message: Message) -> bytes:
    """The bytes of *message*, header first."""
    encoded = _HEADER.pack(message.message_type, 0) + message.pack()
    if isinstance(message, GpadlHeader | GpadlBody):
        return encoded + message.data
    return encoded
