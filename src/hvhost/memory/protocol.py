"""Dynamic memory on the wire; no I/O.

Sources: ``drivers/hv/hv_balloon.c`` and ``linux/hyperv.h`` of Linux 6.1, names as there; all
messages are in-band packets and start with ``struct dm_header``. Pages are of 4 KiB.

The guest speaks first: it asks for a version, then reports its capabilities; from then on it
reports its status once a second, and the host asks for pages (balloon), gives them back (unballoon)
or adds memory (hot-add), one at a time. Transaction ids are each side's own: Linux numbers its
answers anew, so they tell nothing about what they answer, and are not looked at.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import MIB
from hvhost.vmbus.channel import Offer
from hvhost.wire import U16, U32, U64, Buffer, Record

HV_DM_GUID: Final = uuid.UUID("525074dc-8985-46e2-8057-a307dc18a502")
#: The instance that Hyper-V gives its one dynamic memory device.
HV_DM_INSTANCE: Final = uuid.UUID("1eccfd72-4b41-45ef-b73a-4a6e44c12924")
OFFER: Final = Offer(HV_DM_GUID, HV_DM_INSTANCE, "memory")

VERSION_1, VERSION_2, VERSION_3 = 0x00000003, 0x00010000, 0x00020000
VERSIONS: Final = (VERSION_3, VERSION_2, VERSION_1)
PAGES_PER_MIB: Final = MIB // PAGE_SIZE
#: ``dm_mem_page_range``: 40 bits of page frame number, 24 of page count.
START_BITS: Final = 40
RANGE_PAGES_MAX: Final = (1 << 24) - 1
#: Hyper-V sends up to one page of message, and Linux receives no more.
MESSAGE_MAX: Final = PAGE_SIZE
_START_MASK = (1 << START_BITS) - 1


class DmMessageType(IntEnum):
    """``enum dm_message_type``."""

    ERROR = 0
    VERSION_REQUEST = 1
    VERSION_RESPONSE = 2
    CAPABILITIES_REPORT = 3
    CAPABILITIES_RESPONSE = 4
    STATUS_REPORT = 5
    BALLOON_REQUEST = 6
    BALLOON_RESPONSE = 7
    UNBALLOON_REQUEST = 8
    UNBALLOON_RESPONSE = 9
    MEM_HOT_ADD_REQUEST = 10
    MEM_HOT_ADD_RESPONSE = 11
    INFO_MESSAGE = 12


@dataclass(frozen=True, slots=True)
class DmHeader(Record):
    """``struct dm_header``; ``size`` counts the header too."""

    type: U16
    size: U16
    trans_id: U32


@dataclass(frozen=True, slots=True)
class PageRange:
    """Pages in a row: first page frame number and how many."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


# What the guest sends.


@dataclass(frozen=True, slots=True)
class _VersionRequest(Record):
    version: U32
    flags: U32


@dataclass(frozen=True, slots=True)
class VersionRequest:
    """``struct dm_version_request``: major in the upper half, minor in the lower."""

    version: int
    is_last_attempt: bool


@dataclass(frozen=True, slots=True)
class _Capabilities(Record):
    caps: U64
    min_page_count: U64
    max_page_number: U64


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``struct dm_capabilities``: what the driver can do; *hot_add_alignment* in bytes."""

    balloon: bool
    hot_add: bool
    hot_add_alignment: int


@dataclass(frozen=True, slots=True)
class Status(Record):
    """``struct dm_status``, in pages.

    Of Linux, ``num_committed`` is what its programs were promised, what is ballooned, what was
    added and is not online, and a floor below which it does not balloon.
    """

    num_avail: U64
    num_committed: U64
    page_file_size: U64 = 0
    zero_free: U64 = 0
    page_file_writes: U32 = 0
    io_diff: U32 = 0


@dataclass(frozen=True, slots=True)
class BalloonResponse:
    """``struct dm_balloon_response``: pages the guest gave; the last of them without *more*."""

    ranges: tuple[PageRange, ...]
    more: bool

    @property
    def pages(self) -> int:
        return sum(each.count for each in self.ranges)


@dataclass(frozen=True, slots=True)
class UnballoonResponse:
    """``struct dm_unballoon_response``: all was taken back."""


@dataclass(frozen=True, slots=True)
class HotAddResponse(Record):
    """``struct dm_hot_add_response``.

    No pages with *result* 1 means that the guest never will; with 0, that it may later.
    """

    page_count: U32
    result: U32


GuestMessage = (
    VersionRequest | Capabilities | Status | BalloonResponse | UnballoonResponse | HotAddResponse
)

_RANGES = struct.Struct("<II")


def decode(payload: Buffer) -> GuestMessage:
    """A message of the guest; :class:`RemoteProtocolError` for what it must not send.

    Page ranges are checked to be within their message and not empty, not against any memory.
    """
    header = DmHeader.unpack(payload)
    if not DmHeader.wire_size() <= header.size <= len(payload):
        raise RemoteProtocolError(
            f"a memory message of {len(payload)} bytes says that it has {header.size}."
        )
    body = bytes(payload[DmHeader.wire_size() : header.size])
    if header.type == DmMessageType.VERSION_REQUEST:
        version = _VersionRequest.unpack(body)
        return VersionRequest(version.version, bool(version.flags & 1))
    if header.type == DmMessageType.CAPABILITIES_REPORT:
        caps = _Capabilities.unpack(body).caps
        return Capabilities(bool(caps & 1), bool(caps & 2), MIB << (caps >> 2 & 0xF))
    if header.type == DmMessageType.STATUS_REPORT:
        return Status.unpack(body)
    if header.type == DmMessageType.BALLOON_RESPONSE:
        return _balloon_response(body)
    if header.type == DmMessageType.UNBALLOON_RESPONSE:
        return UnballoonResponse()
    if header.type == DmMessageType.MEM_HOT_ADD_RESPONSE:
        return HotAddResponse.unpack(body)
    raise RemoteProtocolError(f"the guest sent a memory message of type {header.type}.")


def _balloon_response(body: bytes) -> BalloonResponse:
    if len(body) < _RANGES.size:
        raise RemoteProtocolError(f"a balloon response of {len(body)} bytes is cut short.")
    _, flags = _RANGES.unpack_from(body)
    count = flags >> 1
    if count > (len(body) - _RANGES.size) // 8:
        raise RemoteProtocolError(
            f"a balloon response announces {count} page ranges and has {len(body)} bytes."
        )
    words = struct.unpack_from(f"<{count}Q", body, _RANGES.size)
    ranges = tuple(PageRange(word & _START_MASK, word >> START_BITS) for word in words)
    if not all(each.count for each in ranges):
        raise RemoteProtocolError("a balloon response holds a range of no pages.")
    return BalloonResponse(ranges, bool(flags & 1))


# What the host sends.


def pack_ranges(ranges: Sequence[PageRange]) -> bytes:
    """``union dm_mem_page_range`` of each."""
    return b"".join(
        (each.start | each.count << START_BITS).to_bytes(8, "little") for each in ranges
    )


def message(kind: DmMessageType, trans_id: int, body: bytes) -> bytes:
    """A message with its header."""
    return DmHeader(kind, DmHeader.wire_size() + len(body), trans_id & 0xFFFFFFFF).pack() + body


def version_response(trans_id: int, *, accepted: bool) -> bytes:
    """``struct dm_version_response``."""
    return message(DmMessageType.VERSION_RESPONSE, trans_id, struct.pack("<Q", accepted))


def capabilities_response(trans_id: int, *, accepted: bool = True) -> bytes:
    """``struct dm_capabilities_resp_msg``."""
    return message(DmMessageType.CAPABILITIES_RESPONSE, trans_id, struct.pack("<Q", accepted))


def maximum_message(trans_id: int, pages: int) -> bytes:
    """``struct dm_info_msg`` with ``INFO_TYPE_MAX_PAGE_CNT``, from version 1.0 on."""
    info = struct.pack("<IIQ", 0, 8, pages)
    body = struct.pack("<II", 0, len(info)) + info
    return message(DmMessageType.INFO_MESSAGE, trans_id, body)


def balloon_request(trans_id: int, pages: int) -> bytes:
    """``struct dm_balloon``: the guest is to give *pages*."""
    return message(DmMessageType.BALLOON_REQUEST, trans_id, struct.pack("<II", pages, 0))


#: Ranges that one unballoon request holds.
UNBALLOON_RANGES_MAX: Final = (MESSAGE_MAX - DmHeader.wire_size() - _RANGES.size) // 8


def unballoon_request(trans_id: int, ranges: Sequence[PageRange], *, more: bool) -> bytes:
    """``struct dm_unballoon_request``: up to :data:`UNBALLOON_RANGES_MAX` ranges of pages back."""
    body = _RANGES.pack(more, len(ranges)) + pack_ranges(ranges)
    return message(DmMessageType.UNBALLOON_REQUEST, trans_id, body)


def hot_add_request(trans_id: int, pages: PageRange, region: PageRange | None = None) -> bytes:
    """``struct dm_hot_add``: *pages* to use from now on.

    With a *region*, that much address space is set aside for them and for later ones; without, they
    lie in a region that the guest has, or the guest makes one around them.
    """
    ranges = [pages] if region is None else [pages, region]
    return message(DmMessageType.MEM_HOT_ADD_REQUEST, trans_id, pack_ranges(ranges))


@dataclass(slots=True)
class PageSet:
    """Which pages are in the balloon: one byte a page, up to the highest page seen."""

    marks: bytearray = field(default_factory=bytearray)
    count: int = 0

    def add(self, pages: PageRange) -> None:
        """Put *pages* in; :class:`RemoteProtocolError` if one of them is there already."""
        if len(self.marks) < pages.end:
            self.marks.extend(bytes(pages.end - len(self.marks)))
        if self.marks.find(1, pages.start, pages.end) >= 0:
            raise RemoteProtocolError(
                f"the guest gave pages {pages.start:#x}+{pages.count:#x} a second time."
            )
        self.marks[pages.start : pages.end] = b"\1" * pages.count
        self.count += pages.count

    def take(self, count: int, ranges_max: int) -> list[PageRange]:
        """Take up to *count* pages out again, lowest first, in up to *ranges_max* ranges."""
        taken: list[PageRange] = []
        position = 0
        while count and len(taken) < ranges_max:
            start = self.marks.find(1, position)
            if start < 0:
                break
            limit = min(len(self.marks), start + min(count, RANGE_PAGES_MAX))
            end = self.marks.find(0, start, limit)
            end = limit if end < 0 else end
            self.marks[start:end] = bytes(end - start)
            taken.append(PageRange(start, end - start))
            count -= end - start
            self.count -= end - start
            position = end
        return taken
