"""VSTOR: what a guest's storage driver and the controller say to each other.

Source: ``drivers/scsi/storvsc_drv.c`` of Linux 6.1 and ``sys/dev/hyperv/storvsc/hv_vstorage.h`` of
FreeBSD 14. Every message is a packet of one size: a header of 12 bytes, then what the operation
needs; 64 bytes from version 5.1 on, 48 before (without the last fields of a SCSI request). Answers
repeat the request's packet with ``COMPLETE_IO`` as their operation, in a completion packet.

A conversation: BEGIN_INITIALIZATION, QUERY_PROTOCOL_VERSION until one is accepted,
QUERY_PROPERTIES, on fibre channel FCHBA_DATA, END_INITIALIZATION, then CREATE_SUB_CHANNELS if the
guest wants any, and EXECUTE_SRB from there on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple
from uuid import UUID

from hvhost.errors import RemoteProtocolError
from hvhost.wire import U8, U16, U32, U64, Bytes4, Bytes8, Bytes16, Record

HV_SCSI_GUID: Final = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
HV_SYNTHFC_GUID: Final = UUID("2f9bcc4a-0069-4af3-b76b-6fd0be528cda")

PACKET_SIZE: Final = 64
OLD_PACKET_SIZE: Final = 48
MAX_CMD_LEN: Final = 16
SENSE_BUFFER_SIZE: Final = 20

#: ``flags`` of channel properties.
SUPPORTS_MULTI_CHANNEL: Final = 1
#: Completion status: a 32-bit NTSTATUS.
STATUS_SUCCESS: Final = 0
STATUS_INVALID_PARAMETER: Final = 0xC000000D
STATUS_INVALID_DEVICE_REQUEST: Final = 0xC0000010
STATUS_REVISION_MISMATCH: Final = 0xC0000059


class Operation(IntEnum):
    """``enum vstor_packet_operation``."""

    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FCHBA_DATA = 12
    CREATE_SUB_CHANNELS = 13


class StorageVersion(IntEnum):
    """Versions as the guest names them: major in the high byte, minor in the low one."""

    WIN6 = 0x0200
    WIN7 = 0x0402
    WIN8 = 0x0501
    WIN8_1 = 0x0600
    WIN10 = 0x0602

    def __str__(self) -> str:
        return f"{self >> 8}.{self & 0xFF}"


class SrbStatus(IntEnum):
    """The integer part of ``srb_status``."""

    SUCCESS = 0x01
    ABORTED = 0x02
    ERROR = 0x04
    INVALID_REQUEST = 0x06
    DATA_OVERRUN = 0x12
    INVALID_LUN = 0x20


class SrbFlags(IntFlag):
    """Flags in ``srb_status`` above the integer."""

    QUEUE_FROZEN = 0x40
    AUTOSENSE_VALID = 0x80


@dataclass(frozen=True, slots=True)
class PacketHeader(Record):
    """``struct vstor_packet`` up to its union."""

    operation: U32
    flags: U32 = 0
    status: U32 = 0


@dataclass(frozen=True, slots=True)
class ScsiRequest(Record):
    """``struct vmscsi_request`` as far as all versions have it.

    What 5.1 added behind it (queue tag and action, flags, time-out, sort key) asks for nothing that
    this controller does differently: all commands are simple, ordered tags.
    """

    length: U16
    srb_status: U8
    scsi_status: U8
    port_number: U8
    path_id: U8
    target_id: U8
    lun: U8
    cdb_length: U8
    sense_info_length: U8
    data_in: U8
    reserved: U8
    data_transfer_length: U32
    cdb: Bytes16
    padding: Bytes4 = bytes(4)


@dataclass(frozen=True, slots=True)
class ChannelProperties(Record):
    """``struct vmstorage_channel_properties``."""

    reserved: U32 = 0
    max_channel_count: U16 = 0
    reserved1: U16 = 0
    flags: U32 = 0
    max_transfer_bytes: U32 = 0
    reserved2: U64 = 0


@dataclass(frozen=True, slots=True)
class ProtocolVersion(Record):
    """``struct vmstorage_protocol_version``."""

    major_minor: U16
    revision: U16 = 0


@dataclass(frozen=True, slots=True)
class SubChannelCount(Record):
    """``sub_channel_count`` of ``struct vstor_packet``."""

    count: U16


@dataclass(frozen=True, slots=True)
class WorldWideNames(Record):
    """``struct hv_fc_wwn_packet``: the names are big-endian numbers."""

    primary_active: U8
    reserved1: U8
    reserved2: U16
    primary_port: Bytes8
    primary_node: Bytes8
    secondary_port: Bytes8
    secondary_node: Bytes8


HEADER_SIZE: Final = PacketHeader.wire_size()
#: For comparisons: that of an enumeration's member costs more.
EXECUTE_SRB: Final = int(Operation.EXECUTE_SRB)
_COMMAND = struct.Struct("<I13xBBBBxxxI16s")
_COMPLETION = struct.Struct("<III")
_SRB_STATUS = struct.Struct("<BB")
_TRANSFERRED = struct.Struct("<I")
_SRB_STATUS_OFFSET = HEADER_SIZE + 2
_SENSE_LENGTH_OFFSET = HEADER_SIZE + 9
_TRANSFERRED_OFFSET = HEADER_SIZE + 12
_SENSE_OFFSET = HEADER_SIZE + 16


class Command(NamedTuple):
    """What matters of a packet, if it is EXECUTE_SRB: else only ``operation`` means anything."""

    operation: int
    path_id: int
    target_id: int
    lun: int
    cdb_length: int
    data_transfer_length: int
    cdb: bytes


def parse_command(payload: bytes) -> Command:
    """A packet of the guest; :class:`RemoteProtocolError` if its size or its command cannot be.

    The fast path: one look at :class:`PacketHeader` and :class:`ScsiRequest` together.
    """
    if len(payload) < OLD_PACKET_SIZE:
        raise RemoteProtocolError(
            f"a storage packet has {len(payload)} bytes, not {OLD_PACKET_SIZE} or {PACKET_SIZE}."
        )
    command = _make_command(_COMMAND.unpack_from(payload))
    if command.operation == EXECUTE_SRB and not 0 < command.cdb_length <= MAX_CMD_LEN:
        raise RemoteProtocolError(f"a SCSI command has {command.cdb_length} bytes, not 1 to 16.")
    return command


def parse_operation(number: int) -> Operation:
    """What a packet asks; :class:`RemoteProtocolError` if it is none of the above."""
    try:
        return Operation(number)
    except ValueError:
        raise RemoteProtocolError(f"storage operation {number} is unknown.") from None


_make_command = Command._make


def complete(payload: bytes, status: int = STATUS_SUCCESS, body: Record | None = None) -> bytes:
    """The answer to the packet *payload*: *status*, and *body* in place of what it carried."""
    answer = bytearray(payload[:PACKET_SIZE])
    _COMPLETION.pack_into(answer, 0, Operation.COMPLETE_IO, 0, status)
    if body is not None:
        content = body.pack()
        answer[HEADER_SIZE : HEADER_SIZE + len(content)] = content
    return bytes(answer)


def complete_request(
    payload: bytes, srb_status: int, scsi_status: int, transferred: int, sense: bytes = b""
) -> bytes:
    """The answer to EXECUTE_SRB; with *sense*, which replaces the command, it is marked valid.

    *transferred* is in bytes. The fast path: the request's own bytes with a few fields set.
    """
    answer = bytearray(payload[:PACKET_SIZE])
    _COMPLETION.pack_into(answer, 0, 1, 0, STATUS_SUCCESS)  # COMPLETE_IO
    _TRANSFERRED.pack_into(answer, _TRANSFERRED_OFFSET, transferred)
    length = 0
    if sense:
        length = min(len(sense), answer[_SENSE_LENGTH_OFFSET], SENSE_BUFFER_SIZE)
        srb_status |= SrbFlags.AUTOSENSE_VALID
        answer[_SENSE_OFFSET : _SENSE_OFFSET + length] = sense[:length]
    answer[_SENSE_LENGTH_OFFSET] = length
    _SRB_STATUS.pack_into(answer, _SRB_STATUS_OFFSET, srb_status, scsi_status)
    return bytes(answer)


def notice(operation: Operation, size: int) -> bytes:
    """A packet nobody asked for, of *size* bytes, such as ENUMERATE_BUS."""
    return PacketHeader(operation).pack().ljust(size, b"\0")
