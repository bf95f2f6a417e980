"""NVSP: how a guest's network driver and its host agree on versions, buffers and sub-channels.

Source: ``drivers/net/hyperv/hyperv_net.h`` of Linux 6.1 (``struct nvsp_message`` and what is in
it); the order of messages as ``netvsc.c`` sends them. Every message starts with its type and has
room for the largest one, 40 bytes in all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final
from uuid import UUID

from hvhost.errors import RemoteProtocolError
from hvhost.wire import U16, U32, U64, Buffer, Record

HV_NIC_GUID: Final = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
NETVSC_RECEIVE_BUFFER_ID: Final = 0xCAFE
NETVSC_SEND_BUFFER_ID: Final = 0
#: ``send_buf_section_index`` of a message that lies in no section.
NETVSC_INVALID_INDEX: Final = 0xFFFFFFFF
#: Entries of the table by which a guest chooses the channel to send on.
VRSS_SEND_TAB_SIZE: Final = 16
VRSS_CHANNEL_MAX: Final = 64
#: Ranges of one transfer-page packet that hold one segment merged from several.
NVSP_RSC_MAX: Final = 562
MESSAGE_SIZE: Final = 40

#: ``channel_type`` of a message that carries RNDIS.
RMC_DATA: Final = 0
RMC_CONTROL: Final = 1


class NvspVersion(IntEnum):
    """``NVSP_PROTOCOL_VERSION_*``."""

    V1 = 0x2
    V2 = 0x30002
    V4 = 0x40000
    V5 = 0x50000
    V6 = 0x60000
    V61 = 0x60001


class MessageType(IntEnum):
    """``NVSP_MSG_TYPE_*`` that this host sends or takes."""

    INIT = 1
    INIT_COMPLETE = 2
    SEND_NDIS_VER = 100
    SEND_RECV_BUF = 101
    SEND_RECV_BUF_COMPLETE = 102
    REVOKE_RECV_BUF = 103
    SEND_SEND_BUF = 104
    SEND_SEND_BUF_COMPLETE = 105
    REVOKE_SEND_BUF = 106
    SEND_RNDIS_PKT = 107
    SEND_RNDIS_PKT_COMPLETE = 108
    SEND_NDIS_CONFIG = 125
    SEND_VF_ASSOCIATION = 128
    SWITCH_DATA_PATH = 129
    OID_QUERY_EX = 131
    OID_QUERY_EX_COMPLETE = 132
    SUBCHANNEL = 133
    SEND_INDIRECTION_TABLE = 134


class Status(IntEnum):
    """``NVSP_STAT_*``."""

    NONE = 0
    SUCCESS = 1
    FAIL = 2
    PROTOCOL_TOO_NEW = 3
    PROTOCOL_TOO_OLD = 4
    INVALID_RNDIS_PKT = 5
    BUSY = 6
    PROTOCOL_UNSUPPORTED = 7


class Capability(IntFlag):
    """``struct nvsp_2_vsc_capability``."""

    VMQ = 1 << 0
    CHIMNEY = 1 << 1
    SRIOV = 1 << 2
    IEEE8021Q = 1 << 3
    CORRELATION_ID = 1 << 4
    TEAMING = 1 << 5
    VSUBNETID = 1 << 6
    RSC = 1 << 7


class SubchannelOperation(IntEnum):
    """``enum nvsp_subchannel_operation``."""

    NONE = 0
    ALLOCATE = 1


@dataclass(frozen=True, slots=True)
class Init(Record):
    """The guest's proposal; Linux proposes one version at a time."""

    min_protocol_ver: U32
    max_protocol_ver: U32


@dataclass(frozen=True, slots=True)
class InitComplete(Record):
    """``struct nvsp_message_init_complete``: the version agreed on, if *status* is a success."""

    negotiated_protocol_ver: U32
    max_mdl_chain_len: U32
    status: U32


@dataclass(frozen=True, slots=True)
class SendBuffer(Record):
    """SEND_RECV_BUF and SEND_SEND_BUF: memory that the guest lends, as a GPADL."""

    gpadl_handle: U32
    id: U16


@dataclass(frozen=True, slots=True)
class SendReceiveBufferComplete(Record):
    """The receive buffer in one section of *num_sub_allocs* pieces, which is all Linux takes."""

    status: U32
    num_sections: U32
    offset: U32
    sub_alloc_size: U32
    num_sub_allocs: U32
    end_offset: U32


@dataclass(frozen=True, slots=True)
class SendSendBufferComplete(Record):
    """``struct nvsp_1_message_send_send_buffer_complete``: bytes of each section of it."""

    status: U32
    section_size: U32


@dataclass(frozen=True, slots=True)
class RevokeBuffer(Record):
    """``struct nvsp_1_message_revoke_receive_buffer``, and that of the send buffer."""

    id: U16


@dataclass(frozen=True, slots=True)
class SendRndisPacket(Record):
    """``struct nvsp_1_message_send_rndis_packet``: where an RNDIS message lies, sizes in bytes."""

    channel_type: U32
    send_buf_section_index: U32 = NETVSC_INVALID_INDEX
    send_buf_section_size: U32 = 0


@dataclass(frozen=True, slots=True)
class SendRndisPacketComplete(Record):
    """``struct nvsp_1_message_send_rndis_packet_complete``."""

    status: U32


@dataclass(frozen=True, slots=True)
class SendNdisConfig(Record):
    """*mtu* with the Ethernet header."""

    mtu: U32
    reserved: U32
    capability: U64


@dataclass(frozen=True, slots=True)
class SwitchDataPath(Record):
    """``struct nvsp_4_sw_datapath``: whether the guest sends here or by a virtual function."""

    active_datapath: U32


@dataclass(frozen=True, slots=True)
class SubchannelRequest(Record):
    """``struct nvsp_5_subchannel_request``: so many channels besides the first one."""

    op: U32
    num_subchannels: U32


@dataclass(frozen=True, slots=True)
class SubchannelComplete(Record):
    """``struct nvsp_5_subchannel_complete``: how many there are going to be."""

    status: U32
    num_subchannels: U32


@dataclass(frozen=True, slots=True)
class SendIndirectionTable(Record):
    """*offset* from the start of the message to *count* channel numbers of 32 bits."""

    count: U32
    offset: U32


#: Ranges of one packet to the guest; Linux takes up to 562.
RANGES_PER_PACKET: Final = 96
_TYPE = struct.Struct("<I")
_RNDIS = struct.Struct("<IIII")


def peek(payload: Buffer) -> tuple[int, int, int, int]:
    """A message's type and, of SEND_RNDIS_PKT, channel type, send buffer section and its size.

    The fast path's :class:`SendRndisPacket`; :class:`RemoteProtocolError` if it is too short.
    """
    if len(payload) < _RNDIS.size:
        raise RemoteProtocolError(f"an NVSP message has {len(payload)} bytes only.")
    kind, channel_type, index, size = _RNDIS.unpack_from(payload)
    return kind, channel_type, index, size


def body_offset() -> int:
    """Where a message's body starts."""
    return _TYPE.size


def encode(kind: MessageType, body: Record) -> bytes:
    """A message of full length."""
    return (_TYPE.pack(kind) + body.pack()).ljust(MESSAGE_SIZE, b"\0")


def indirection_table(entries: list[int]) -> bytes:
    """The message that tells a guest which channel to send on."""
    offset = MESSAGE_SIZE
    head = encode(MessageType.SEND_INDIRECTION_TABLE, SendIndirectionTable(len(entries), offset))
    return head + struct.pack(f"<{len(entries)}I", *entries)


_TRANSFER_PAGES = [struct.Struct(f"<HBBI{2 * count}I") for count in range(RANGES_PER_PACKET + 1)]


def transfer_pages_header(pageset: int, ranges: list[int]) -> bytes:
    """``vmtransfer_page_packet_header``: *ranges* are byte_count, byte_offset, byte_count….

    The fast path's :meth:`hvhost.vmbus.ring.TransferPages.pack`.
    """
    count = len(ranges) >> 1
    return _TRANSFER_PAGES[count].pack(pageset, 0, 0, count, *ranges)
