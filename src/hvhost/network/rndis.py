"""RNDIS as Hyper-V's network adapter speaks it: control messages, data messages, per-packet info.

Source: [MS-RNDIS]; ``include/linux/rndis.h`` and ``drivers/net/hyperv/hyperv_net.h`` of Linux 6.1.
A message is a header (type and length) and a body; offsets inside count from the body's start.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from hvhost.errors import RemoteProtocolError
from hvhost.wire import U32, Record

MAJOR_VERSION: Final = 1
MINOR_VERSION: Final = 0
DF_CONNECTIONLESS: Final = 1
MEDIUM_802_3: Final = 0
HEADER_SIZE: Final = 8
#: A data message up to its per-packet information: header and ``struct rndis_packet``.
PACKET_SIZE: Final = 44
#: Largest control message a guest may send.
CONTROL_LIMIT: Final = 8192
#: Bytes of per-packet information that a guest may send with one frame.
PER_PACKET_INFO_LIMIT: Final = 1024


class RndisType(IntEnum):
    """``RNDIS_MSG_*``."""

    PACKET = 1
    INIT = 2
    HALT = 3
    QUERY = 4
    SET = 5
    RESET = 6
    INDICATE = 7
    KEEPALIVE = 8
    INIT_C = 0x80000002
    QUERY_C = 0x80000004
    SET_C = 0x80000005
    RESET_C = 0x80000006
    KEEPALIVE_C = 0x80000008


class RndisStatus(IntEnum):
    """``RNDIS_STATUS_*`` that this host uses."""

    SUCCESS = 0
    MEDIA_CONNECT = 0x4001000B
    MEDIA_DISCONNECT = 0x4001000C
    LINK_SPEED_CHANGE = 0x40010013
    NETWORK_CHANGE = 0x40010018
    FAILURE = 0xC0000001
    NOT_SUPPORTED = 0xC00000BB
    MULTICAST_FULL = 0xC0010009
    INVALID_LENGTH = 0xC0010014
    INVALID_DATA = 0xC0010015


class Oid(IntEnum):
    """Object identifiers ([MS-RNDIS] 2.2.10 and the NDIS 6 ones that Linux and FreeBSD ask for)."""

    GEN_SUPPORTED_LIST = 0x00010101
    GEN_HARDWARE_STATUS = 0x00010102
    GEN_MEDIA_SUPPORTED = 0x00010103
    GEN_MEDIA_IN_USE = 0x00010104
    GEN_MAXIMUM_FRAME_SIZE = 0x00010106
    GEN_LINK_SPEED = 0x00010107
    GEN_TRANSMIT_BLOCK_SIZE = 0x0001010A
    GEN_RECEIVE_BLOCK_SIZE = 0x0001010B
    GEN_VENDOR_ID = 0x0001010C
    GEN_VENDOR_DESCRIPTION = 0x0001010D
    GEN_CURRENT_PACKET_FILTER = 0x0001010E
    GEN_MAXIMUM_TOTAL_SIZE = 0x00010111
    GEN_MAC_OPTIONS = 0x00010113
    GEN_MEDIA_CONNECT_STATUS = 0x00010114
    GEN_VENDOR_DRIVER_VERSION = 0x00010116
    GEN_RECEIVE_SCALE_CAPABILITIES = 0x00010203
    GEN_RECEIVE_SCALE_PARAMETERS = 0x00010204
    GEN_RNDIS_CONFIG_PARAMETER = 0x0001021B
    GEN_XMIT_OK = 0x00020101
    GEN_RCV_OK = 0x00020102
    GEN_XMIT_ERROR = 0x00020103
    GEN_RCV_ERROR = 0x00020104
    GEN_RCV_NO_BUFFER = 0x00020105
    GEN_FRIENDLY_NAME = 0x00020216
    IEEE_802_3_PERMANENT_ADDRESS = 0x01010101
    IEEE_802_3_CURRENT_ADDRESS = 0x01010102
    IEEE_802_3_MULTICAST_LIST = 0x01010103
    IEEE_802_3_MAXIMUM_LIST_SIZE = 0x01010104
    OFFLOAD_ENCAPSULATION = 0x0101010A
    TCP_OFFLOAD_CURRENT_CONFIG = 0xFC01020B
    TCP_OFFLOAD_PARAMETERS = 0xFC01020C
    TCP_OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01020D


class PacketFilter(IntFlag):
    """``NDIS_PACKET_TYPE_*``."""

    DIRECTED = 0x01
    MULTICAST = 0x02
    ALL_MULTICAST = 0x04
    BROADCAST = 0x08
    PROMISCUOUS = 0x20


class InfoType(IntEnum):
    """``enum ndis_per_pkt_info_type``, as far as used; internal ones have bit 31 set.

    ``NBL_HASH_INFO`` is FreeBSD's ``HN_NDIS_PKTINFO_TYPE_HASHINF``; Linux does not look at it.
    """

    TCPIP_CHKSUM = 0
    TCP_LARGESEND = 2
    IEEE_8021Q = 6
    NBL_HASH_VALUE = 8
    NBL_HASH_INFO = 9
    INTERNAL_PACKET_ID = 0x80000001


# struct ndis_tcp_ip_checksum_info; offsets count from the frame's first byte.
TRANSMIT_IS_IPV4: Final = 1 << 0
TRANSMIT_IS_IPV6: Final = 1 << 1
TRANSMIT_TCP_CHECKSUM: Final = 1 << 2
TRANSMIT_UDP_CHECKSUM: Final = 1 << 3
TRANSMIT_IP_HEADER_CHECKSUM: Final = 1 << 4
RECEIVE_TCP_CHECKSUM_SUCCEEDED: Final = 1 << 3
RECEIVE_UDP_CHECKSUM_SUCCEEDED: Final = 1 << 4
RECEIVE_IP_CHECKSUM_SUCCEEDED: Final = 1 << 5

# struct rndis_pktinfo_id: fragments of one large frame.
PACKET_ID_VERSION: Final = 1
FRAGMENT: Final = 1
FRAGMENT_FIRST: Final = 2
FRAGMENT_LAST: Final = 4


@dataclass(frozen=True, slots=True)
class Header(Record):
    """What each RNDIS message begins with; *msg_len* in bytes, with these."""

    ndis_msg_type: U32
    msg_len: U32


@dataclass(frozen=True, slots=True)
class Initialize(Record):
    """``struct rndis_initialize_request``; *max_xfer_size* in bytes."""

    req_id: U32
    major_ver: U32
    minor_ver: U32
    max_xfer_size: U32


@dataclass(frozen=True, slots=True)
class InitializeComplete(Record):
    """*max_pkt_per_msg* frames may come in one message, each aligned to 1 << *alignment* bytes."""

    req_id: U32
    status: U32
    major_ver: U32
    minor_ver: U32
    dev_flags: U32
    medium: U32
    max_pkt_per_msg: U32
    max_xfer_size: U32
    pkt_alignment_factor: U32
    af_list_offset: U32 = 0
    af_list_size: U32 = 0


@dataclass(frozen=True, slots=True)
class Query(Record):
    """A query or a set request."""

    req_id: U32
    oid: U32
    info_buflen: U32
    info_buf_offset: U32
    dev_vc_handle: U32


@dataclass(frozen=True, slots=True)
class QueryComplete(Record):
    """``struct rndis_query_complete``; the buffer's place counts from *req_id* on, in bytes."""

    req_id: U32
    status: U32
    info_buflen: U32
    info_buf_offset: U32


@dataclass(frozen=True, slots=True)
class SetComplete(Record):
    """``struct rndis_set_complete``."""

    req_id: U32
    status: U32


@dataclass(frozen=True, slots=True)
class ResetComplete(Record):
    """``struct rndis_reset_complete``."""

    status: U32
    addressing_reset: U32


@dataclass(frozen=True, slots=True)
class Request(Record):
    """HALT and KEEPALIVE."""

    req_id: U32


@dataclass(frozen=True, slots=True)
class IndicateStatus(Record):
    """``struct rndis_indicate_status``: what the host tells without being asked."""

    status: U32
    status_buflen: U32
    status_buf_offset: U32


@dataclass(frozen=True, slots=True)
class ConfigParameter(Record):
    """``struct rndis_config_parameter_info``: a name and a value, both UTF-16."""

    parameter_name_offset: U32
    parameter_name_length: U32
    parameter_type: U32
    parameter_value_offset: U32
    parameter_value_length: U32


CONFIG_PARAM_TYPE_STRING: Final = 2


def encode(kind: RndisType, body: Record, data: bytes = b"") -> bytes:
    """A control message: header, *body*, *data*."""
    packed = body.pack() + data
    return Header(kind, HEADER_SIZE + len(packed)).pack() + packed


def indication(status: RndisStatus, data: bytes = b"") -> bytes:
    """A status indication, like that of a link that went down."""
    offset = IndicateStatus.wire_size() if data else 0
    return encode(RndisType.INDICATE, IndicateStatus(status, len(data), offset), data)


def query_answer(request: int, status: RndisStatus, data: bytes) -> bytes:
    """The answer to a query; without *data* unless it succeeded."""
    body = QueryComplete(request, status, len(data), QueryComplete.wire_size())
    return encode(RndisType.QUERY_C, body, data)


def decode_control(message: bytes) -> tuple[RndisType, bytes]:
    """Type and body of a whole control message of a guest."""
    header = Header.unpack(message)
    if not HEADER_SIZE <= header.msg_len <= len(message):
        raise RemoteProtocolError(
            f"an RNDIS message of {header.msg_len} bytes came in {len(message)} bytes."
        )
    try:
        kind = RndisType(header.ndis_msg_type)
    except ValueError:
        raise RemoteProtocolError(
            f"RNDIS message type {header.ndis_msg_type:#x} is unknown."
        ) from None
    return kind, message[HEADER_SIZE : header.msg_len]


def information(body: bytes, request: Query) -> bytes:
    """The information buffer of a query or set request."""
    start, end = request.info_buf_offset, request.info_buf_offset + request.info_buflen
    if request.info_buflen and (start < Query.wire_size() or end > len(body)):
        raise RemoteProtocolError(
            f"an RNDIS request of {len(body)} bytes puts {request.info_buflen} bytes of "
            f"information at {start}."
        )
    return body[start:end]


def config_parameter(data: bytes) -> tuple[str, str]:
    """Name and value of a configuration parameter that is a string."""
    head = ConfigParameter.unpack(data)
    texts = []
    for offset, length in (
        (head.parameter_name_offset, head.parameter_name_length),
        (head.parameter_value_offset, head.parameter_value_length),
    ):
        if offset < ConfigParameter.wire_size() or offset + length > len(data):
            raise RemoteProtocolError(
                f"a configuration parameter of {len(data)} bytes puts {length} bytes at {offset}."
            )
        texts.append(data[offset : offset + length].decode("utf-16-le", "replace").rstrip("\0"))
    return texts[0], texts[1]


class DataMessage(NamedTuple):
    """A frame in a guest's message: where it is, and what comes with it.

    *length* is the message's, *data_offset* counts from its first byte.
    """

    length: int
    data_offset: int
    data_length: int
    checksum: int | None = None
    large_send: int | None = None
    vlan: int | None = None
    hash_value: int | None = None


_PACKET = struct.Struct("<11I")
_INFO = struct.Struct("<III")
_U32 = struct.Struct("<I")
_SIMPLE = struct.Struct("<11I")


def info_size(head: bytes) -> int:
    """Bytes of per-packet information that a data message says it has; *head* is its header."""
    size: int = _U32.unpack_from(head, 32)[0]
    return size


def decode_packet(head: bytes, available: int) -> DataMessage:
    """The data message at the start of *head*, which is a copy of its first bytes.

    *available* bytes are there for it in all. :class:`RemoteProtocolError` for what is not inside
    the message, for information that overlaps or repeats itself, and for too much of it.
    """
    if len(head) < PACKET_SIZE:
        raise RemoteProtocolError(f"an RNDIS packet of {available} bytes has no whole header.")
    kind, length, offset, size, _, oob_size, _, info_offset, info_size, _, _ = _PACKET.unpack_from(
        head
    )
    if kind != _DATA:
        raise RemoteProtocolError(f"RNDIS message type {kind:#x} came where frames belong.")
    body = length - HEADER_SIZE
    if length > available:
        raise RemoteProtocolError(f"an RNDIS packet of {length} bytes came in {available} bytes.")
    if offset < PACKET_SIZE - HEADER_SIZE or size > body - offset:
        raise RemoteProtocolError(
            f"an RNDIS packet of {length} bytes puts {size} bytes of data at {offset}."
        )
    if oob_size:
        raise RemoteProtocolError("an RNDIS packet has out-of-band data, which nobody uses.")
    if not info_size:
        return DataMessage(length, HEADER_SIZE + offset, size)
    if info_offset < PACKET_SIZE - HEADER_SIZE or info_size > PER_PACKET_INFO_LIMIT:
        raise RemoteProtocolError(
            f"an RNDIS packet has {info_size} bytes of per-packet information at {info_offset}."
        )
    if info_offset + info_size > body or HEADER_SIZE + info_offset + info_size > len(head):
        raise RemoteProtocolError(
            f"per-packet information of {info_size} bytes at {info_offset} leaves the message."
        )
    found = _per_packet_info(head, HEADER_SIZE + info_offset, info_size)
    return DataMessage(length, HEADER_SIZE + offset, size, *found)


def _per_packet_info(
    head: bytes, position: int, left: int
) -> tuple[int | None, int | None, int | None, int | None]:
    """Checksum, large send, VLAN and hash of the chain at *position*, *left* bytes long."""
    checksum = large_send = vlan = hash_value = None
    while left:
        if left < _INFO.size:
            raise RemoteProtocolError(f"per-packet information ends with {left} stray bytes.")
        size, kind, offset = _INFO.unpack_from(head, position)
        if not 12 <= offset <= size <= left:
            raise RemoteProtocolError(
                f"per-packet information {kind:#x} of {size} bytes with its value at {offset} "
                f"does not fit in {left} bytes."
            )
        if kind in _USED:
            if size - offset < 4:
                raise RemoteProtocolError(f"per-packet information {kind:#x} is cut short.")
            value = _U32.unpack_from(head, position + offset)[0]
            if kind == _CHECKSUM:
                checksum = value
            elif kind == _LARGE_SEND:
                large_send = value
            elif kind == _HASH:
                hash_value = value
            else:
                vlan = value
        position += size
        left -= size
    return checksum, large_send, vlan, hash_value


# Of enumerations, but once: they are looked at for every frame.
_DATA = int(RndisType.PACKET)
_CHECKSUM, _LARGE_SEND = int(InfoType.TCPIP_CHKSUM), int(InfoType.TCP_LARGESEND)
_HASH = int(InfoType.NBL_HASH_VALUE)
_USED = frozenset((_CHECKSUM, _LARGE_SEND, _HASH, int(InfoType.IEEE_8021Q)))


def information_item(kind: int, value: int) -> bytes:
    """One piece of per-packet information towards the guest."""
    return struct.pack("<IIII", 16, kind, 12, value)


def packet_header(information_bytes: bytes, data_length: int) -> bytes:
    """Header of a data message towards the guest; the frame's bytes follow it at once."""
    extra = len(information_bytes)
    return (
        _SIMPLE.pack(
            _DATA,
            PACKET_SIZE + extra + data_length,
            PACKET_SIZE - HEADER_SIZE + extra,
            data_length,
            0,
            0,
            0,
            PACKET_SIZE - HEADER_SIZE if extra else 0,
            extra,
            0,
            0,
        )
        + information_bytes
    )


def tag_of_info(value: int) -> int:
    """The 802.1Q tag control information of ``struct ndis_pkt_8021q_info``."""
    return (value & 0x7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF


def info_of_tag(tag: int) -> int:
    """``struct ndis_pkt_8021q_info`` of 802.1Q tag control information."""
    return tag >> 13 | (tag >> 12 & 1) << 3 | (tag & 0xFFF) << 4
