"""Ring buffers: the two byte streams of a channel, in guest memory.

Source: ``linux/hyperv.h`` (``hv_ring_buffer``, ``vmpacket_descriptor`` and the packet headers).

The rules, in one place:

* A ring is a header page and data pages. The writer owns ``write_index`` and
  ``pending_send_sz``, the reader ``read_index`` and ``interrupt_mask``; equal indices mean empty,
  so a ring is never filled to its last byte.
* A packet is a descriptor, an optional header, the payload padded to 8 bytes, and 8 bytes behind
  it which repeat where it started. Indices are multiples of 8.
* A reader at work masks interrupts; having unmasked, it looks once more.
* A writer without room says in ``pending_send_sz`` how much it needs; the reader interrupts it once
  there is more than that.

The guest may write anything anywhere at any time. So an index of the guest is loaded once and
checked, an index of ours is kept here and never read back, and packets are copied before they are
parsed, never the other way round.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from hvhost.errors import GuestMemoryError, LocalProtocolError, RemoteProtocolError
from hvhost.partition.atomic import barrier
from hvhost.partition.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from hvhost.vmbus.gpadl import GpaRange, pack_ranges, parse_ranges, range_views
from hvhost.wire import Buffer

# struct hv_ring_buffer, in 32-bit words.
WRITE_INDEX: Final = 0
READ_INDEX: Final = 1
INTERRUPT_MASK: Final = 2
PENDING_SEND_SIZE: Final = 3
FEATURE_BITS: Final = 16
FEAT_PENDING_SEND_SZ: Final = 1

#: ``flags`` of a packet whose sender wants a completion.
COMPLETION_REQUESTED: Final = 1

#: At most so many packets and (unless one packet is larger) bytes are taken in one batch.
BATCH_PACKETS: Final = 128
BATCH_BYTES: Final = 1 << 16

_DESCRIPTOR = struct.Struct("<HHHHQ")  # type, offset8, len8, flags, trans_id
_TRAILER = struct.Struct("<Q")
_TRAILER_SIZE = 8
_LARGEST_LENGTH8 = 0xFFFF
_GPA_DIRECT = struct.Struct("<II")  # reserved, range_cnt
_TRANSFER_PAGES = struct.Struct("<HBBI")  # xfer_pageset_id, sender_owns_set, reserved, range_cnt
_TRANSFER_RANGE = struct.Struct("<II")  # byte_count, byte_offset
_PADDING = tuple(bytes(-length & 7) for length in range(8))


class PacketType(IntEnum):
    """``enum vmbus_packet_type`` without its invalid zero."""

    ADD_XFER_PAGESET = 0x2
    RM_XFER_PAGESET = 0x3
    ESTABLISH_GPADL = 0x4
    TEARDOWN_GPADL = 0x5
    DATA_INBAND = 0x6
    DATA_USING_XFER_PAGES = 0x7
    DATA_USING_GPADL = 0x8
    DATA_USING_GPA_DIRECT = 0x9
    CANCEL_REQUEST = 0xA
    COMP = 0xB
    DATA_USING_ADDITIONAL_PKT = 0xC
    ADDITIONAL_DATA = 0xD


_TYPES: dict[int, PacketType] = {int(kind): kind for kind in PacketType}
_GPA_DIRECT_TYPE = PacketType.DATA_USING_GPA_DIRECT
_TRANSFER_PAGES_TYPE = PacketType.DATA_USING_XFER_PAGES


class TransferPages(NamedTuple):
    """Header of a transfer-page packet: pieces of an agreed buffer as (byte_count, byte_offset)."""

    xfer_pageset_id: int
    sender_owns_set: int
    ranges: tuple[tuple[int, int], ...]

    def pack(self) -> bytes:
        """The packet header's bytes."""
        return _TRANSFER_PAGES.pack(
            self.xfer_pageset_id, self.sender_owns_set, 0, len(self.ranges)
        ) + b"".join(_TRANSFER_RANGE.pack(*item) for item in self.ranges)


class Packet(NamedTuple):
    """One packet, wholly in host memory. A named tuple: one is made for every packet.

    ``payload`` includes the padding to 8 bytes (the wire does not say where it starts).
    ``transfer`` is the header of a transfer-page packet, ``header`` that of any other kind.
    """

    type: PacketType
    flags: int
    transaction_id: int
    payload: bytes
    header: bytes = b""
    transfer: TransferPages | None = None

    @property
    def completion_requested(self) -> bool:
        return bool(self.flags & COMPLETION_REQUESTED)

    @property
    def ranges(self) -> tuple[GpaRange, ...]:
        """What a GPA-direct packet points at, as it names it; none for any other.

        :class:`RemoteProtocolError` if its list of pages is not one.
        """
        if self.type is not _GPA_DIRECT_TYPE:
            return ()
        return parse_ranges(self.header, self._range_count(), _GPA_DIRECT.size)

    def views(self, memory: GuestMemory) -> list[memoryview]:
        """The guest memory a GPA-direct packet points at, in order, neighbours joined; no copy.

        :class:`RemoteProtocolError` if its list of pages is not one,
        :class:`hvhost.errors.GuestMemoryError` if a page is not RAM.
        """
        return range_views(self.header, self._range_count(), _GPA_DIRECT.size, memory)

    def _range_count(self) -> int:
        if len(self.header) < _GPA_DIRECT.size:
            raise RemoteProtocolError("a GPA-direct packet is shorter than its header.")
        count: int = _GPA_DIRECT.unpack_from(self.header)[1]
        return count


def encode_packet(
    packet_type: int,
    flags: int,
    transaction_id: int,
    payload: Buffer,
    header: bytes = b"",
) -> bytes:
    """A packet as it lies in the ring, without the 8 bytes behind it; *header* in whole words."""
    length = len(payload)
    header_length8 = 2 + (len(header) >> 3)
    length8 = header_length8 + (length + 7 >> 3)
    if length8 > _LARGEST_LENGTH8 or len(header) & 7:
        raise LocalProtocolError(
            f"a packet with {len(header)} bytes of header and {length} of payload cannot be sent."
        )
    descriptor = _DESCRIPTOR.pack(packet_type, header_length8, length8, flags, transaction_id)
    return b"".join((descriptor, header, payload, _PADDING[length & 7]))


def gpa_direct_header(ranges: tuple[GpaRange, ...]) -> bytes:
    """Header of a packet that points at guest memory (``vmdata_gpa_direct``)."""
    return _GPA_DIRECT.pack(0, len(ranges)) + pack_ranges(ranges)


def _parse_transfer_pages(header: bytes) -> TransferPages:
    if len(header) < _TRANSFER_PAGES.size:
        raise RemoteProtocolError("a transfer-page packet is shorter than its header.")
    pageset, owns, _, count = _TRANSFER_PAGES.unpack_from(header)
    end = _TRANSFER_PAGES.size + count * _TRANSFER_RANGE.size
    if end > len(header):
        raise RemoteProtocolError(
            f"a transfer-page packet announces {count} ranges in {len(header)} bytes of header."
        )
    ranges = tuple(_TRANSFER_RANGE.iter_unpack(header[_TRANSFER_PAGES.size : end]))
    return TransferPages(pageset, owns, ranges)


class RingBuffer:
    """The memory of one direction: a header page and the data pages behind it.

    *pfns* are guest page frame numbers, in order; :class:`RemoteProtocolError` if there are fewer
    than two or one is not RAM. ``header`` is the header page as 32-bit words, ``size`` the bytes
    of data.
    """

    __slots__ = ("_data", "_pages", "header", "size")

    def __init__(self, memory: GuestMemory, pfns: Sequence[int]) -> None:
        if len(pfns) < 2:
            raise RemoteProtocolError(f"a ring buffer of {len(pfns)} pages has no room for data.")
        self.size = (len(pfns) - 1) * PAGE_SIZE
        self.header = memory.view(pfns[0] << PAGE_SHIFT, PAGE_SIZE).cast("I")
        self._data: memoryview | None = None
        self._pages: list[memoryview] = []
        first = pfns[1]
        if all(pfn == first + number for number, pfn in enumerate(pfns[1:])):
            try:  # the common case: one view, at most two slices per access
                self._data = memory.view(first << PAGE_SHIFT, self.size)
            except GuestMemoryError:  # neighbours, but not in the same region: page by page
                self._data = None
        if self._data is None:
            self._pages = [memory.view(pfn << PAGE_SHIFT, PAGE_SIZE) for pfn in pfns[1:]]

    def index(self, word: int) -> int:
        """An index of the guest's, loaded once; :class:`RemoteProtocolError` if out of range."""
        value = self.header[word]
        if value >= self.size or value & 7:  # checked() once more, for the sake of speed
            self.checked(word, value)
        return value

    def checked(self, word: int, value: int) -> int:
        """*value*, if *word* could have it; :class:`RemoteProtocolError` otherwise."""
        if not 0 <= value < self.size or value & 7:
            name = "write" if word == WRITE_INDEX else "read"
            raise RemoteProtocolError(
                f"ring {name} index {value:#x} is not a packet boundary in {self.size:#x} bytes."
            )
        return value

    def read(self, offset: int, length: int) -> bytes:
        """A copy of *length* (at most ``size``) bytes from *offset* on, around the end."""
        data = self._data
        end = offset + length
        if data is not None:
            if end <= self.size:
                return data[offset:end].tobytes()
            return data[offset:].tobytes() + data[: end - self.size].tobytes()
        pieces = []
        while length:
            start = offset & PAGE_SIZE - 1
            piece = self._pages[offset >> PAGE_SHIFT][start : start + length]
            pieces.append(piece)
            length -= len(piece)
            offset = (offset + len(piece)) % self.size
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Copy *data* (at most ``size`` bytes) to *offset*, around the end."""
        length, view = len(data), self._data
        end = offset + length
        if view is not None:
            if end <= self.size:
                view[offset:end] = data
            else:
                split = self.size - offset
                view[offset:] = data[:split]
                view[: end - self.size] = data[split:]
            return
        done = 0
        while done < length:
            start = offset & PAGE_SIZE - 1
            count = min(length - done, PAGE_SIZE - start)
            self._pages[offset >> PAGE_SHIFT][start : start + count] = data[done : done + count]
            done += count
            offset = (offset + count) % self.size


class IncomingRing:
    """Reader of the ring that the guest fills."""

    __slots__ = ("_ring", "guest_has_room", "read_index", "was_emptied")

    def __init__(self, ring: RingBuffer) -> None:
        self._ring = ring
        self.read_index = ring.index(READ_INDEX)
        #: The last batch was all there was; :meth:`unmask` tells what came since.
        self.was_emptied = False
        #: Set when a batch made the room the guest waits for; whoever interrupts it, clears it.
        self.guest_has_room = False

    @classmethod
    def restore(cls, ring: RingBuffer, read_index: int, guest_has_room: bool) -> IncomingRing:
        """A reader that goes on at *read_index*, whatever the guest wrote over it since."""
        incoming = cls.__new__(cls)
        incoming._ring = ring
        incoming.was_emptied = False
        incoming.read_index = ring.checked(READ_INDEX, read_index)
        incoming.guest_has_room = guest_has_room
        return incoming

    def mask(self) -> None:
        """Tell the guest not to signal: we are reading anyway."""
        self._ring.header[INTERRUPT_MASK] = 1

    def unmask(self) -> bool:
        """Ask for signals again; true if packets came meanwhile and nobody would signal them."""
        self._ring.header[INTERRUPT_MASK] = 0
        barrier()
        return self._ring.header[WRITE_INDEX] != self.read_index

    def offer_batch(self, serve: Callable[[bytes], int]) -> int:
        """Show *serve* a copy of what there is; the bytes, whole packets from the start on, that it
        took. What it left is for :meth:`read_batch`.
        """
        ring = self._ring
        available = (ring.index(WRITE_INDEX) - self.read_index) % ring.size
        if not available:
            return 0
        used = serve(ring.read(self.read_index, min(available, BATCH_BYTES)))
        if used:
            self._advance(used)
        return used

    def read_batch(self) -> list[Packet]:
        """The next packets, with one update of the read index; empty if there are none.

        :class:`RemoteProtocolError` if the guest's index or a packet is impossible.
        """
        ring = self._ring
        available = ring.index(WRITE_INDEX) - self.read_index
        if not available:
            return []
        if available < 0:
            available += ring.size
        size = min(available, BATCH_BYTES)
        packets, used, missing = self._parse(ring.read(self.read_index, size), available)
        if missing:  # one packet larger than a batch: copied anew, and parsed from that copy only
            packets, used, _ = self._parse(ring.read(self.read_index, missing), missing)
        self._advance(used)
        self.was_emptied = used == available
        return packets

    @staticmethod
    def _parse(data: bytes, available: int) -> tuple[list[Packet], int, int]:
        """Packets in *data*, the bytes they take, and the bytes the first needs if it is larger."""
        packets: list[Packet] = []
        position, end = 0, len(data)
        while position < end and len(packets) < BATCH_PACKETS:
            if end - position < _DESCRIPTOR.size:
                if end < available:
                    break
                raise RemoteProtocolError(
                    f"the ring ends {end - position} bytes into a packet descriptor."
                )
            number, offset8, length8, flags, transaction_id = _DESCRIPTOR.unpack_from(
                data, position
            )
            body = position + (offset8 << 3)
            behind = position + (length8 << 3)
            following = behind + _TRAILER_SIZE
            if not 2 <= offset8 <= length8 or following > available:
                raise RemoteProtocolError(
                    f"a packet of {length8 << 3} bytes with its payload at {offset8 << 3} does not "
                    f"fit in the {available - position} bytes written."
                )
            if following > end:
                if packets:
                    break
                return packets, 0, following
            kind = _TYPES.get(number)
            if kind is None:
                raise RemoteProtocolError(f"packet type {number:#x} is unknown.")
            header = data[position + _DESCRIPTOR.size : body]
            payload = data[body:behind]
            if kind is _TRANSFER_PAGES_TYPE:
                transfer = _parse_transfer_pages(header)
                packets.append(Packet(kind, flags, transaction_id, payload, b"", transfer))
            else:
                packets.append(Packet(kind, flags, transaction_id, payload, header))
            position = following
        return packets, position, 0

    def _advance(self, used: int) -> None:
        """Give *used* bytes back to the guest, and see whether it waits for them."""
        ring, header = self._ring, self._ring.header
        self.read_index = (self.read_index + used) % ring.size
        header[READ_INDEX] = self.read_index
        if not header[FEATURE_BITS] & FEAT_PENDING_SEND_SZ:
            return
        barrier()
        wanted = header[PENDING_SEND_SIZE]
        if wanted:
            room = (self.read_index - ring.index(WRITE_INDEX)) % ring.size or ring.size
            # A null transition (there was room before) was signalled by whoever made that room.
            if room - used <= wanted < room:
                self.guest_has_room = True


class OutgoingRing:
    """Writer of the ring that the guest empties."""

    __slots__ = ("_ring", "pending_send_size", "write_index")

    def __init__(self, ring: RingBuffer) -> None:
        self._ring = ring
        self.write_index = ring.index(WRITE_INDEX)
        ring.index(READ_INDEX)
        self.pending_send_size = 0
        ring.header[PENDING_SEND_SIZE] = 0
        ring.header[FEATURE_BITS] |= FEAT_PENDING_SEND_SZ

    @classmethod
    def restore(cls, ring: RingBuffer, write_index: int, pending_send_size: int) -> OutgoingRing:
        """A writer that goes on at *write_index*; the header is as that writer left it."""
        outgoing = cls.__new__(cls)
        outgoing._ring = ring
        outgoing.write_index = ring.checked(WRITE_INDEX, write_index)
        outgoing.pending_send_size = pending_send_size
        return outgoing

    @property
    def size(self) -> int:
        """Bytes of data pages."""
        return self._ring.size

    def can_ever_hold(self, packet: bytes) -> bool:
        """Whether *packet* fits in the ring when that is empty."""
        return len(packet) + _TRAILER_SIZE < self._ring.size

    def write(self, packet: bytes) -> bool:
        """Append an encoded packet; false, and nothing done, if there is no room for it."""
        ring, start = self._ring, self.write_index
        total = len(packet) + _TRAILER_SIZE
        room = (ring.index(READ_INDEX) - start) % ring.size or ring.size
        if total >= room:
            return False
        ring.write(start, packet + _TRAILER.pack(start << 32))
        self.write_index = (start + total) % ring.size
        ring.header[WRITE_INDEX] = self.write_index
        return True

    def write_all(self, packets: Sequence[bytes]) -> bool:
        """As :meth:`write`, of several packets at once: all of them, or none."""
        ring, start = self._ring, self.write_index
        position, pieces = start, list[bytes]()
        for packet in packets:
            pieces += packet, _TRAILER.pack(position << 32)
            position = (position + len(packet) + _TRAILER_SIZE) % ring.size
        data = b"".join(pieces)
        room = (ring.index(READ_INDEX) - start) % ring.size or ring.size
        if len(data) >= room:
            return False
        ring.write(start, data)
        self.write_index = position
        ring.header[WRITE_INDEX] = position
        return True

    def ask_for_room(self, packet: bytes | None) -> None:
        """Have the guest signal once *packet* fits; ``None`` withdraws that."""
        self.pending_send_size = 0 if packet is None else len(packet) + _TRAILER_SIZE
        self._ring.header[PENDING_SEND_SIZE] = self.pending_send_size
        barrier()

    def waits_for(self, packet: bytes) -> bool:
        """Whether the guest was already asked for room for *packet*."""
        return self.pending_send_size == len(packet) + _TRAILER_SIZE

    def guest_wants_interrupt(self) -> bool:
        """Whether the guest is not reading at the moment; ask after writing."""
        barrier()
        return not self._ring.header[INTERRUPT_MASK]
