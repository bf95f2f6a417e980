"""Mode pages of disks: MODE SENSE and MODE SELECT.

Source: SPC-4 6.11 and 7.5, SBC-3 6.5. One thing can be changed: whether the write cache is on.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from hvhost.storage.scsi import (
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETERS,
    PARAMETER_LIST_LENGTH_ERROR,
    CheckCondition,
    OpCode,
    Sense,
    SenseKey,
)

CACHING_PAGE: Final = 0x08
CONTROL_PAGE: Final = 0x0A
INFORMATIONAL_EXCEPTIONS_PAGE: Final = 0x1C
ALL_PAGES: Final = 0x3F
SAVING_NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, 0x39, 0x00)

_CHANGEABLE, _SAVED = 1, 3
_WRITE_CACHE = 0x04
_WRITE_PROTECT = 0x80
_DPO_FUA = 0x10
_NO_BLOCK_DESCRIPTORS = 0x08
_SAVE_PAGES = 0x01
_HEADER_6, _HEADER_10 = 4, 8


@dataclass(frozen=True, slots=True)
class ModeParameters:
    """What the pages tell."""

    write_cache: bool = True
    read_only: bool = False
    blocks: int = 0
    block_size: int = 512


def allocation_length(cdb: bytes) -> int:
    """Bytes that a MODE SENSE asks for."""
    return cdb[4] if cdb[0] == OpCode.MODE_SENSE else int.from_bytes(cdb[7:9], "big")


def parameter_list_length(cdb: bytes) -> int:
    """Bytes that a MODE SELECT brings."""
    return cdb[4] if cdb[0] == OpCode.MODE_SELECT else int.from_bytes(cdb[7:9], "big")


def _pages(parameters: ModeParameters, control: int) -> dict[int, bytes]:
    caching, other = bytearray(18), bytes(10)
    if parameters.write_cache or control == _CHANGEABLE:
        caching[0] = _WRITE_CACHE
    return {
        CACHING_PAGE: bytes(caching),
        CONTROL_PAGE: other,
        INFORMATIONAL_EXCEPTIONS_PAGE: other,
    }


def mode_sense(cdb: bytes, parameters: ModeParameters) -> bytes:
    """The answer to MODE SENSE(6) or (10)."""
    control, wanted, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
    if control == _SAVED:
        raise CheckCondition(SAVING_NOT_SUPPORTED)
    pages = _pages(parameters, control)
    if (wanted not in pages and wanted != ALL_PAGES) or subpage not in (0, 0xFF):
        raise CheckCondition(INVALID_FIELD_IN_CDB)
    content = b"".join(
        struct.pack(">BB", page, len(body)) + body
        for page, body in pages.items()
        if wanted in (page, ALL_PAGES)
    )
    descriptor = b""
    if not cdb[1] & _NO_BLOCK_DESCRIPTORS:
        blocks = min(parameters.blocks, 0xFFFFFFFF)
        descriptor = struct.pack(">II", blocks, parameters.block_size)
    specific = _DPO_FUA | (_WRITE_PROTECT if parameters.read_only else 0)
    length = len(descriptor) + len(content)
    if cdb[0] == OpCode.MODE_SENSE:
        header = struct.pack(">BBBB", length + _HEADER_6 - 1, 0, specific, len(descriptor))
    else:
        header = struct.pack(">HBBHH", length + _HEADER_10 - 2, 0, specific, 0, len(descriptor))
    return header + descriptor + content


def mode_select(cdb: bytes, data: bytes, parameters: ModeParameters) -> bool:
    """Whether the write cache is to be on after a MODE SELECT; everything else must stay."""
    if cdb[1] & _SAVE_PAGES:
        raise CheckCondition(INVALID_FIELD_IN_CDB)
    if not data:
        return parameters.write_cache
    if cdb[0] == OpCode.MODE_SELECT:
        start, descriptors = _HEADER_6, data[3] if len(data) > 3 else 0
    else:
        start, descriptors = _HEADER_10, int.from_bytes(data[6:8], "big")
    if len(data) < start + descriptors:
        raise CheckCondition(PARAMETER_LIST_LENGTH_ERROR)
    write_cache = parameters.write_cache
    now = _pages(parameters, 0)
    position = start + descriptors
    while position < len(data):
        if len(data) - position < 2 or len(data) - position - 2 < data[position + 1]:
            raise CheckCondition(PARAMETER_LIST_LENGTH_ERROR)
        page, length = data[position] & 0x3F, data[position + 1]
        body = bytearray(data[position + 2 : position + 2 + length])
        if page not in now or length != len(now[page]):
            raise CheckCondition(INVALID_FIELD_IN_PARAMETERS)
        if page == CACHING_PAGE:
            write_cache = bool(body[0] & _WRITE_CACHE)
            body[0] = body[0] & ~_WRITE_CACHE | now[page][0]
        if body != now[page]:
            raise CheckCondition(INVALID_FIELD_IN_PARAMETERS)
        position += 2 + length
    return write_cache
