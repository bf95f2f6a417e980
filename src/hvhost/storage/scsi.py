"""SCSI: commands in, sense data out. Pure: bytes and numbers, no disks.

Source: SPC-4 and SBC-3 (T10), with the names of ``scsi/scsi_proto.h``. Numbers in SCSI are
big-endian.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from hvhost.errors import HvHostError
from hvhost.storage.buffers import total


class OpCode(IntEnum):
    """First byte of a command, as in ``scsi/scsi_proto.h``."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT = 0x15
    MODE_SENSE = 0x1A
    START_STOP = 0x1B
    ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_VERIFY = 0x2E
    VERIFY = 0x2F
    SYNCHRONIZE_CACHE = 0x35
    WRITE_SAME = 0x41
    UNMAP = 0x42
    READ_TOC = 0x43
    GET_CONFIGURATION = 0x46
    GET_EVENT_STATUS_NOTIFICATION = 0x4A
    READ_DISC_INFO = 0x51
    READ_TRACK_INFO = 0x52
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    WRITE_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF
    SET_CD_SPEED = 0xBB
    MECHANISM_STATUS = 0xBD


#: Service action of SERVICE_ACTION_IN_16.
READ_CAPACITY_16: Final = 0x10


class ScsiStatus(IntEnum):
    """SAM-5 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02


class SenseKey(IntEnum):
    """SPC-4 4.5.6."""

    NO_SENSE = 0x0
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    MISCOMPARE = 0xE


@dataclass(frozen=True, slots=True)
class Sense:
    """Why a command failed: key, additional code and its qualifier (SPC-4, annex F.2)."""

    key: SenseKey
    asc: int = 0
    ascq: int = 0

    def pack(self) -> bytes:
        """Fixed format, current error (SPC-4 4.5.3), 18 bytes."""
        return struct.pack(
            ">BBBIBIBBBBH", 0x70, 0, self.key, 0, 10, 0, self.asc, self.ascq, 0, 0, 0
        )

    def pack_descriptor(self) -> bytes:
        """Descriptor format, current error, without descriptors (SPC-4 4.5.2), 8 bytes."""
        return bytes((0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0))

    def __str__(self) -> str:
        return f"{self.key:x}/{self.asc:02x}/{self.ascq:02x}"


NO_SENSE = Sense(SenseKey.NO_SENSE)
MEDIUM_NOT_PRESENT = Sense(SenseKey.NOT_READY, 0x3A, 0x00)
WRITE_ERROR = Sense(SenseKey.MEDIUM_ERROR, 0x0C, 0x00)
UNRECOVERED_READ_ERROR = Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x00)
INTERNAL_TARGET_FAILURE = Sense(SenseKey.HARDWARE_ERROR, 0x44, 0x00)
PARAMETER_LIST_LENGTH_ERROR = Sense(SenseKey.ILLEGAL_REQUEST, 0x1A, 0x00)
INVALID_COMMAND = Sense(SenseKey.ILLEGAL_REQUEST, 0x20, 0x00)
LBA_OUT_OF_RANGE = Sense(SenseKey.ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD_IN_CDB = Sense(SenseKey.ILLEGAL_REQUEST, 0x24, 0x00)
LOGICAL_UNIT_NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x25, 0x00)
INVALID_FIELD_IN_PARAMETERS = Sense(SenseKey.ILLEGAL_REQUEST, 0x26, 0x00)
MEDIUM_REMOVAL_PREVENTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x53, 0x02)
MEDIUM_MAY_HAVE_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x28, 0x00)
CAPACITY_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
WRITE_PROTECTED = Sense(SenseKey.DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED = Sense(SenseKey.DATA_PROTECT, 0x27, 0x07)
MISCOMPARE = Sense(SenseKey.MISCOMPARE, 0x1D, 0x00)

#: Commands that are answered although a unit attention waits (SAM-5 5.14).
ANSWERED_ALWAYS = frozenset({OpCode.INQUIRY, OpCode.REPORT_LUNS, OpCode.REQUEST_SENSE})
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckCondition(HvHostError):  # noqa: N818 — an answer to the guest, not an accident
    """A command ends with CHECK CONDITION and this sense data."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(f"the command ends with sense {sense}.")
        self.sense = sense


def sense_of_error(error: OSError, *, writing: bool) -> Sense:
    """What the guest is told of an error of the host's file."""
    if is_out_of_space(error):
        return SPACE_ALLOCATION_FAILED
    return WRITE_ERROR if writing else UNRECOVERED_READ_ERROR


def is_out_of_space(error: OSError) -> bool:
    """Whether the host has no room (or its user no quota) for what is written."""
    return error.errno in _NO_SPACE


#: Bytes of a command by its group, the top three bits of its first byte.
COMMAND_LENGTHS: Final = (6, 10, 10, 0, 16, 12, 0, 0)
_TEN = struct.Struct(">xBIxHx")
_TWELVE = struct.Struct(">xBIIxx")
_SIXTEEN = struct.Struct(">xBQIxx")


def parse_extent(cdb: bytes) -> tuple[int, int, int]:
    """First block, number of blocks and second byte of a command that has these.

    READ, WRITE, VERIFY, WRITE SAME, SYNCHRONIZE CACHE in all their lengths; no count means 256
    blocks in the six-byte form only.
    """
    group = cdb[0] >> 5
    if group == 1 or group == 2:
        flags, lba, blocks = _TEN.unpack_from(cdb)
    elif group == 4:
        flags, lba, blocks = _SIXTEEN.unpack_from(cdb)
    elif group == 5:
        flags, lba, blocks = _TWELVE.unpack_from(cdb)
    else:
        return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256, 0
    return lba, blocks, flags


class UnmapDescriptor(NamedTuple):
    """One range of UNMAP, in blocks."""

    lba: int
    blocks: int


_UNMAP_HEADER = struct.Struct(">HHI")
_UNMAP_DESCRIPTOR = struct.Struct(">QI4x")


def parse_unmap(parameters: bytes) -> list[UnmapDescriptor]:
    """The ranges of UNMAP's parameter list (SBC-3 5.28.2); what does not fit in it is left out."""
    if len(parameters) < _UNMAP_HEADER.size:
        raise CheckCondition(PARAMETER_LIST_LENGTH_ERROR)
    _, length, _ = _UNMAP_HEADER.unpack_from(parameters)
    end = min(_UNMAP_HEADER.size + length, len(parameters))
    count = (end - _UNMAP_HEADER.size) // _UNMAP_DESCRIPTOR.size
    return [
        UnmapDescriptor(
            *_UNMAP_DESCRIPTOR.unpack_from(
                parameters, _UNMAP_HEADER.size + number * _UNMAP_DESCRIPTOR.size
            )
        )
        for number in range(count)
    ]


def give(data: Sequence[memoryview], content: bytes, allocation_length: int) -> int:
    """Copy *content* into the guest's buffers, as much as they and it take; how many bytes."""
    content = content[:allocation_length]
    position = 0
    for buffer in data:
        part = content[position : position + len(buffer)]
        buffer[: len(part)] = part
        position += len(part)
    return position


def take(data: Sequence[memoryview], length: int) -> bytes:
    """A copy of *length* bytes of the guest's data; :class:`CheckCondition` if it is shorter."""
    if total(data) < length:
        raise CheckCondition(PARAMETER_LIST_LENGTH_ERROR)
    return b"".join(data)[:length]


def report_luns(luns: Sequence[int]) -> bytes:
    """Parameter data of REPORT LUNS (SPC-4 6.33): *luns* below 256, peripheral addressing."""
    return struct.pack(">II", 8 * len(luns), 0) + b"".join(
        struct.pack(">BB6x", 0, lun) for lun in luns
    )
