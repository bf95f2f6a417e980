"""Guest memory that carries frames: pieces of it in a row, and the receive buffer's sections."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.network import frame
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.gpadl import Gpadl

#: Bytes at the start of a section for everything that comes before the frame: a header of 44 and
#: up to five pieces of information of 16.
HEADROOM: Final = 128
#: A section holds the largest frame, in whole pages: one that another kernel left in one piece
#: lies in one place, with one header.
SECTION_SIZE: Final = -(-(HEADROOM + frame.FRAME_LIMIT) // 4096) * 4096
#: Sections of the receive buffer that frames leave to control messages.
KEPT_FREE: Final = 1
#: Sections for a frame of 64 KiB in segments of 1,448 bytes.
_SEGMENTS: Final = 47
#: Section size of the send buffer; Linux makes it of so many times this size.
SEND_SECTION_SIZE: Final = 6144
_PAGE = 4096
#: Sections of a receive buffer; a guest that lends more uses the first ones.
MAXIMUM_SECTIONS: Final = 8192


class Span:
    """Memory in several pieces, addressed as if it were one."""

    __slots__ = ("_ends", "length", "views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = views
        self._ends = list(accumulate(map(len, views)))
        self.length = self._ends[-1] if views else 0

    def slice(self, start: int, length: int) -> list[memoryview]:
        """The pieces of *length* bytes from *start* on, both inside the span; no copy."""
        views, ends = self.views, self._ends
        if start + length <= ends[0]:
            return [views[0][start : start + length]]
        index = bisect_right(ends, start)
        if length and start + length == ends[-1]:  # up to the end, as most frames go
            first = views[index]
            return [first[start - ends[index] + len(first) :], *views[index + 1 :]]
        pieces = []
        while length:
            view = views[index]
            begin = start - ends[index] + len(view)
            piece = view[begin : begin + length]
            pieces.append(piece)
            length -= len(piece)
            start += len(piece)
            index += 1
        return pieces

    def read(self, start: int, length: int) -> bytes:
        """A copy of up to *length* bytes from *start* on, fewer at the span's end."""
        length = min(length, self.length - start)
        if length <= 0:
            return b""
        if start + length <= self._ends[0]:
            return self.views[0][start : start + length].tobytes()
        return b"".join(self.slice(start, length))


def span_of(gpadl: Gpadl, memory: GuestMemory) -> Span:
    """All of a GPADL's memory."""
    return Span([view for item in gpadl.ranges for view in item.views(memory)])


class SendBuffer:
    """The guest's send buffer: sections that it fills and names by number."""

    def __init__(self, gpadl: Gpadl, memory: GuestMemory) -> None:
        self._span = span_of(gpadl, memory)
        self._sections: dict[int, Span] = {}
        self.count = self._span.length // SEND_SECTION_SIZE
        if not self.count:
            raise RemoteProtocolError(
                f"a send buffer of {self._span.length} bytes holds no section of "
                f"{SEND_SECTION_SIZE}."
            )

    def section(self, index: int, size: int) -> Span:
        """All of section *index*, of which the guest names *size* bytes.

        :class:`RemoteProtocolError` if it has no such section or that is not so large.
        """
        if index >= self.count or size > SEND_SECTION_SIZE:
            raise RemoteProtocolError(
                f"the guest names {size} bytes of section {index} of {self.count} of its send "
                "buffer."
            )
        section = self._sections.get(index)
        if section is None:
            pieces = self._span.slice(index * SEND_SECTION_SIZE, SEND_SECTION_SIZE)
            section = self._sections[index] = Span(pieces)
        return section


class ReceiveBuffer:
    """The guest's receive buffer: sections that the host fills, and gets back when they were read.

    ``heads`` is each section's first page, where headers and the frame's start go; ``bodies`` what
    a frame may fill of it, from ``HEADROOM`` on; ``starts`` its first bytes, with all headers.
    """

    def __init__(self, gpadl: Gpadl, memory: GuestMemory) -> None:
        span = span_of(gpadl, memory)
        self.count = min(span.length // SECTION_SIZE, MAXIMUM_SECTIONS)
        if self.count <= KEPT_FREE:
            raise RemoteProtocolError(
                f"a receive buffer of {span.length} bytes holds {self.count} sections of "
                f"{SECTION_SIZE}, which is too few."
            )
        self.heads: list[memoryview] = []
        self.bodies: list[list[memoryview]] = []
        self.starts: list[memoryview] = []
        for number in range(self.count):
            views = span.slice(number * SECTION_SIZE, SECTION_SIZE)
            if len(views[0]) < _PAGE:
                raise RemoteProtocolError("a receive buffer does not start at a page.")
            self.heads.append(views[0][:_PAGE])
            self.bodies.append([views[0][HEADROOM:], *views[1:]])
            self.starts.append(views[0][HEADROOM : HEADROOM + frame.HEAD_SIZE])
        self.free: list[int] = list(range(self.count))
        self._lent: dict[int, tuple[int, ...]] = {}
        self._transaction = 0

    def kept_free(self, merging: bool) -> int:
        """How many sections must be left before a frame is read.

        For a guest that does not take segments merged, one frame becomes many.
        """
        return KEPT_FREE if merging else min(_SEGMENTS, self.count // 2)

    def lend(self, sections: Iterable[int]) -> int:
        """A transaction id under which the guest will give *sections*, taken off ``free``, back."""
        self._transaction += 1
        self._lent[self._transaction] = tuple(sections)
        return self._transaction

    def take_back(self, transaction: int) -> None:
        """The guest is done with what was lent; :class:`RemoteProtocolError` if nothing was."""
        sections = self._lent.pop(transaction, None)
        if sections is None:
            raise RemoteProtocolError(
                f"the guest completed transaction {transaction}, which is not under way."
            )
        self.free.extend(sections)

    @property
    def lent(self) -> int:
        """Transactions that the guest has not completed."""
        return len(self._lent)
