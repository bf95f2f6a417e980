"""Integration services: the framing and messages that all of them share.

Source: ``linux/hyperv.h`` (``vmbuspipe_hdr``, ``icmsg_hdr``, ``icmsg_negotiate`` and the messages),
``drivers/hv/hv_util.c`` for what guests answer. No I/O.

A message is one in-band packet: pipe header, message header, body. The host offers versions with
NEGOTIATE, the guest picks one of the framework's and one of the service's, or none; from then on
every request of the host is sent back by the guest, its body filled in, with the RESPONSE flag.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Annotated, Final, NamedTuple

from hvhost.errors import RemoteProtocolError
from hvhost.vmbus.channel import Offer
from hvhost.vmbus.protocol import (
    MAX_USER_DEFINED_BYTES,
    VMBUS_PIPE_TYPE_MESSAGE,
    OfferFlags,
)
from hvhost.wire import U32, Record

HV_S_OK: Final = 0
HV_E_FAIL: Final = 0x80004005

#: ``reason_code`` of a request that a person made (``SHTDN_REASON_FLAG_PLANNED`` of Windows).
SHTDN_REASON_FLAG_PLANNED: Final = 0x80000000
DISPLAY_MESSAGE_BYTES: Final = 2048


class IcMessageType(IntEnum):
    """``ICMSGTYPE_*``."""

    NEGOTIATE = 0
    HEARTBEAT = 1
    KVPEXCHANGE = 2
    SHUTDOWN = 3
    TIMESYNC = 4
    VSS = 5
    FCOPY = 7


class IcFlags(IntFlag):
    """``ICMSGHDRFLAG_*``."""

    TRANSACTION = 1
    REQUEST = 2
    RESPONSE = 4


class IcVersion(NamedTuple):
    """``struct ic_version``."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


#: What the framework's versions are, oldest first.
FRAMEWORK_VERSIONS: Final = (IcVersion(1, 0), IcVersion(3, 0))
HEARTBEAT_VERSIONS: Final = (IcVersion(1, 0), IcVersion(3, 0))
SHUTDOWN_VERSIONS: Final = (IcVersion(1, 0), IcVersion(3, 0), IcVersion(3, 1), IcVersion(3, 2))


class ShutdownFlags(IntFlag):
    """``flags`` of a shutdown message; no flag means power off."""

    FORCE = 1
    RESTART = 2
    HIBERNATE = 4


class IcMessage(NamedTuple):
    """One message of the guest, ``data`` being its body."""

    framework: IcVersion
    type: int
    version: IcVersion
    status: int
    transaction_id: int
    flags: int
    data: bytes


_PIPE_DATA: Final = 1  # vmbuspipe_hdr.flags of every message
# vmbuspipe_hdr: flags, msgsize; icmsg_hdr: icverframe, icmsgtype, icvermsg, icmsgsize, status,
# ictransaction_id, icflags, reserved.
_HEADER = struct.Struct("<IIHHHHHHIBB2x")
_PIPE_HEADER_SIZE: Final = 8
HEADER_SIZE: Final = _HEADER.size
_NEGOTIATE = struct.Struct("<HHI")  # icframe_vercnt, icmsg_vercnt, reserved
_VERSION = struct.Struct("<HH")
_CHOICE = struct.Struct("<HHIHHHH")
_HEARTBEAT = struct.Struct("<Q32x")
_SEQUENCE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class ShutdownMessage(Record):  # struct shutdown_msg_data
    """``timeout_seconds`` is the time a guest has before it is forced; zero leaves it to itself."""

    reason_code: U32
    timeout_seconds: U32
    flags: U32
    display_message: Annotated[bytes, "2048s"]


def encode(
    message_type: IcMessageType,
    data: bytes,
    *,
    framework: IcVersion,
    version: IcVersion,
    transaction_id: int,
    flags: int = IcFlags.TRANSACTION | IcFlags.REQUEST,
    status: int = HV_S_OK,
) -> bytes:
    """A message as the payload of a packet."""
    return (
        _HEADER.pack(
            _PIPE_DATA,
            HEADER_SIZE - _PIPE_HEADER_SIZE + len(data),
            *framework,
            message_type,
            *version,
            len(data),
            status,
            transaction_id,
            flags,
        )
        + data
    )


def decode(payload: bytes) -> IcMessage:
    """The message in a packet's payload.

    The pipe header is not looked at: a guest echoes ours, even in front of a shorter answer.
    :class:`RemoteProtocolError` if the message is cut short.
    """
    if len(payload) < HEADER_SIZE:
        raise RemoteProtocolError(
            f"an integration service message of {len(payload)} bytes is shorter than its header."
        )
    (
        _,
        _,
        framework_major,
        framework_minor,
        message_type,
        major,
        minor,
        size,
        status,
        transaction_id,
        flags,
    ) = _HEADER.unpack_from(payload)
    end = HEADER_SIZE + size
    if end > len(payload):
        raise RemoteProtocolError(
            f"an integration service message announces {size} bytes and has "
            f"{len(payload) - HEADER_SIZE}."
        )
    return IcMessage(
        IcVersion(framework_major, framework_minor),
        message_type,
        IcVersion(major, minor),
        status,
        transaction_id,
        flags,
        payload[HEADER_SIZE:end],
    )


def negotiate_body(framework: Sequence[IcVersion], versions: Sequence[IcVersion]) -> bytes:
    """Body of the host's NEGOTIATE: all versions it can speak."""
    return _NEGOTIATE.pack(len(framework), len(versions), 0) + b"".join(
        _VERSION.pack(*version) for version in (*framework, *versions)
    )


def parse_choice(data: bytes) -> tuple[IcVersion, IcVersion] | None:
    """The guest's choice of (framework, service) version, ``None`` if it likes none.

    :class:`RemoteProtocolError` if the answer is cut short or chooses several.
    """
    if len(data) < _NEGOTIATE.size:
        raise RemoteProtocolError(f"a version negotiation was answered with {len(data)} bytes.")
    counts = _NEGOTIATE.unpack_from(data)[:2]
    if 0 in counts:
        return None
    if counts != (1, 1) or len(data) < _CHOICE.size:
        raise RemoteProtocolError(
            f"the guest chose {counts[0]} framework and {counts[1]} message versions in "
            f"{len(data)} bytes, not one of each."
        )
    _, _, _, *numbers = _CHOICE.unpack_from(data)
    return IcVersion(numbers[0], numbers[1]), IcVersion(numbers[2], numbers[3])


def heartbeat_body(sequence: int) -> bytes:
    """``struct heartbeat_msg_data``."""
    return _HEARTBEAT.pack(sequence)


def parse_heartbeat(data: bytes) -> int:
    """The sequence number a guest sent back (one more than it got)."""
    if len(data) < _SEQUENCE.size:
        raise RemoteProtocolError(f"a heartbeat was answered with {len(data)} bytes.")
    sequence: int = _SEQUENCE.unpack_from(data)[0]
    return sequence


def integration_offer(name: str, interface_type: str, interface_instance: str) -> Offer:
    """The offer of a service: a pipe of messages, as hosts make it."""
    pipe_mode = VMBUS_PIPE_TYPE_MESSAGE.to_bytes(4, "little")
    return Offer(
        interface_type=uuid.UUID(interface_type),
        interface_instance=uuid.UUID(interface_instance),
        name=name,
        flags=OfferFlags.ENUMERATE_DEVICE_INTERFACE | OfferFlags.NAMED_PIPE_MODE,
        user_defined=pipe_mode.ljust(MAX_USER_DEFINED_BYTES, b"\0"),
    )


HEARTBEAT_OFFER: Final = integration_offer(
    "heartbeat", "57164f39-9115-4e78-ab55-382f3bd5422d", "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"
)
SHUTDOWN_OFFER: Final = integration_offer(
    "shutdown", "0e0b6031-5213-4934-818b-38d90ced39db", "b6650ff7-33bc-4840-8048-e0676786f393"
)
