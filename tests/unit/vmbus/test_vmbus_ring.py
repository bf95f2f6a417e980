"""Rings against the simulated guest's own: every packet type, wrapping, and hostile contents."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import LocalProtocolError, RemoteProtocolError
from hvhost.partition.memory import PAGE_SIZE, GuestMemory, MemoryRegion
from hvhost.vmbus import ring as ring_module
from hvhost.vmbus.gpadl import GpaRange
from hvhost.vmbus.ring import (
    IncomingRing,
    OutgoingRing,
    Packet,
    PacketType,
    RingBuffer,
    TransferPages,
    encode_packet,
    gpa_direct_header,
)
from simulated.driver import GuestPacket, GuestRing

IN_A_ROW = [2, 3, 4]
SCATTERED = [9, 3, 7]
NEIGHBOUR_REGIONS = [14, 15, 16]  # 16 starts the second region
LAYOUTS = [IN_A_ROW, SCATTERED, NEIGHBOUR_REGIONS]
SIZE = 2 * PAGE_SIZE


class Rings:
    """Both ends of one ring in the same memory."""

    def __init__(self, pfns: list[int], start: int = 0) -> None:
        self.memory = GuestMemory(
            [
                MemoryRegion(0, memoryview(bytearray(16 * PAGE_SIZE))),
                MemoryRegion(16 * PAGE_SIZE, memoryview(bytearray(4 * PAGE_SIZE))),
            ]
        )
        self.guest = GuestRing(self.memory, pfns)
        self.guest.set_word(0, start)
        self.guest.set_word(1, start)
        self.guest.set_word(16, 1)
        self.ring = RingBuffer(self.memory, pfns)

    def put(self, packet: bytes) -> None:
        """Append bytes as the guest, trailer included."""
        start = self.guest.word(0)
        self.guest.put(start, packet + struct.pack("<II", 0, start))
        self.guest.set_word(0, (start + len(packet) + 8) % self.guest.size)

    def take(self) -> Iterator[GuestPacket]:
        """Read all packets as the guest."""
        index = self.guest.word(1)
        while index != self.guest.word(0):
            kind, offset8, length8, flags, number = struct.unpack(
                "<HHHHQ", self.guest.get(index, 16)
            )
            data = self.guest.get(index, length8 * 8)
            assert self.guest.get(index + length8 * 8, 8) == struct.pack("<II", 0, index)
            index = (index + length8 * 8 + 8) % self.guest.size
            self.guest.set_word(1, index)
            yield GuestPacket(kind, flags, number, data[16 : offset8 * 8], data[offset8 * 8 :])


def padded(payload: bytes) -> bytes:
    return payload + bytes(-len(payload) % 8)


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    payload = padded(draw(st.binary(max_size=600)))
    kind = draw(st.sampled_from(PacketType))
    flags, number = draw(st.integers(0, 0xFFFF)), draw(st.integers(0, 2**64 - 1))
    if kind is PacketType.DATA_USING_GPA_DIRECT:
        ranges = []
        for _ in range(draw(st.integers(0, 3))):
            offset = draw(st.integers(0, PAGE_SIZE - 1))
            count = draw(st.integers(0, 3 * PAGE_SIZE))
            pages = (offset + count + PAGE_SIZE - 1) // PAGE_SIZE
            pfn = st.integers(0, 2**64 - 1)  # only checked when used
            pfns = draw(st.lists(pfn, min_size=pages, max_size=pages))
            ranges.append(GpaRange(count, offset, array("Q", pfns)))
        return Packet(kind, flags, number, payload, gpa_direct_header(tuple(ranges)))
    if kind is PacketType.DATA_USING_XFER_PAGES:
        pairs = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
        transfer = TransferPages(
            draw(st.integers(0, 0xFFFF)),
            draw(st.integers(0, 0xFF)),
            tuple(draw(st.lists(pairs, max_size=3))),
        )
        return Packet(kind, flags, number, payload, transfer=transfer)
    header = padded(draw(st.binary(max_size=24)))
    return Packet(kind, flags, number, payload, header=header)


def encoded(packet: Packet) -> bytes:
    header = packet.header if packet.transfer is None else packet.transfer.pack()
    return encode_packet(packet.type, packet.flags, packet.transaction_id, packet.payload, header)


START = st.integers(0, SIZE // 8 - 1).map(lambda word: word * 8)


@given(st.sampled_from(LAYOUTS), START, st.lists(packets(), max_size=5))
def test_packets_of_the_guest_arrive(layout: list[int], start: int, sent: list[Packet]) -> None:
    rings = Rings(layout, start)
    incoming = IncomingRing(rings.ring)
    for packet in sent:
        rings.put(encoded(packet))
    assert incoming.read_batch() == sent
    assert incoming.read_batch() == []
    assert rings.guest.word(1) == rings.guest.word(0)


@given(st.sampled_from(LAYOUTS), START, st.lists(packets(), max_size=5))
def test_packets_of_the_host_arrive(layout: list[int], start: int, sent: list[Packet]) -> None:
    rings = Rings(layout, start)
    outgoing = OutgoingRing(rings.ring)
    for packet in sent:
        assert outgoing.write(encoded(packet))
    for packet, got in zip(sent, list(rings.take()), strict=True):
        header = encoded(packet)[16 : len(encoded(packet)) - len(packet.payload)]
        assert got == GuestPacket(
            packet.type, packet.flags, packet.transaction_id, header, packet.payload
        )


@given(st.sampled_from(LAYOUTS), START, st.data())
def test_a_ring_is_filled_up_to_its_last_word_and_no_further(
    layout: list[int], start: int, data: st.DataObject
) -> None:
    rings = Rings(layout, start)
    outgoing = OutgoingRing(rings.ring)
    first = encode_packet(6, 0, 1, bytes(8 * data.draw(st.integers(0, 900))))
    assert outgoing.write(first)
    left = SIZE - len(first) - 8
    assert not outgoing.write(encode_packet(6, 0, 2, bytes(left - 24)))
    assert not outgoing.can_ever_hold(encode_packet(6, 0, 2, bytes(SIZE - 24)))
    largest = encode_packet(6, 0, 2, bytes(range(256)) * 32)[: left - 16]
    largest = largest[:4] + struct.pack("<H", len(largest) // 8) + largest[6:]
    assert outgoing.can_ever_hold(largest)
    assert outgoing.write(largest)
    assert not outgoing.write(encode_packet(6, 0, 3, b""))
    assert [packet.transaction_id for packet in rings.take()] == [1, 2]
    assert outgoing.write(encode_packet(6, 0, 3, b""))


@given(
    layout=st.sampled_from(LAYOUTS),
    words=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 3, 16]), st.integers(0, SIZE + 64) | st.integers(0, 2**32 - 1)
        ),
        max_size=6,
    ),
    contents=st.binary(max_size=400),
    start=START,
)
def test_any_ring_content_is_packets_or_a_protocol_error(
    layout: list[int], words: list[tuple[int, int]], contents: bytes, start: int
) -> None:
    rings = Rings(layout, start)
    incoming = IncomingRing(rings.ring)
    rings.guest.put(start, padded(contents))
    rings.guest.set_word(0, (start + len(padded(contents))) % SIZE)
    for word, value in words:
        rings.guest.set_word(word, value)
    try:
        for _ in range(SIZE // 24 + 1):
            if not incoming.read_batch():
                break
        else:
            raise AssertionError("an endless ring")
    except RemoteProtocolError:
        pass


DESCRIPTOR = struct.Struct("<HHHHQ")


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"", "8 bytes into a packet descriptor"),
        (DESCRIPTOR.pack(6, 2, 2, 0, 0)[:8], "ring ends 16 bytes|does not fit"),
        (DESCRIPTOR.pack(6, 1, 2, 0, 0), "payload at 8 does not fit"),
        (DESCRIPTOR.pack(6, 3, 2, 0, 0), "payload at 24 does not fit"),
        (DESCRIPTOR.pack(6, 2, 3, 0, 0), "packet of 24 bytes .* does not fit in the 24"),
        (DESCRIPTOR.pack(6, 2, 0xFFFF, 0, 0), "packet of 524280 bytes"),
        (DESCRIPTOR.pack(0, 2, 2, 0, 0), "packet type 0x0 is unknown"),
        (DESCRIPTOR.pack(14, 2, 2, 0, 0), "packet type 0xe is unknown"),
        (DESCRIPTOR.pack(7, 2, 2, 0, 0), "transfer-page packet is shorter"),
        (DESCRIPTOR.pack(7, 3, 3, 0, 0) + struct.pack("<HBBI", 1, 0, 0, 1), "announces 1 ranges"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_impossible_packet_is_named(layout: list[int], packet: bytes, why: str) -> None:
    rings = Rings(layout, SIZE - 24)
    incoming = IncomingRing(rings.ring)
    rings.put(packet)
    with pytest.raises(RemoteProtocolError, match=why):
        incoming.read_batch()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "GPA-direct packet is shorter"),
        (struct.pack("<II", 0, 1), "range 0 of 1 is missing"),
        (struct.pack("<II", 0, 2) + bytes(8), "range 1 of 2 is missing"),
        (struct.pack("<IIII", 0, 1, 1, 0), "needs 1 page"),
        (struct.pack("<IIII", 0, 1, 0, PAGE_SIZE), "behind its first page"),
    ],
)
def test_an_impossible_list_of_pages_is_named(header: bytes, why: str) -> None:
    rings = Rings(IN_A_ROW)
    rings.put(encode_packet(9, 0, 0, b"", header))
    (packet,) = IncomingRing(rings.ring).read_batch()
    with pytest.raises(RemoteProtocolError, match=why):
        packet.views(rings.memory)
    with pytest.raises(RemoteProtocolError, match=why):
        packet.ranges  # noqa: B018


def test_only_gpa_direct_packets_point_at_memory() -> None:
    assert Packet(PacketType.DATA_INBAND, 0, 0, b"", struct.pack("<IIII", 0, 1, 0, 0)).ranges == ()


@pytest.mark.parametrize("value", [4, SIZE, SIZE + 8, 2**32 - 8])
def test_indices_outside_the_ring_are_refused(value: int) -> None:
    rings = Rings(IN_A_ROW)
    incoming, outgoing = IncomingRing(rings.ring), OutgoingRing(rings.ring)
    rings.guest.set_word(0, value)
    rings.guest.set_word(1, value)
    with pytest.raises(RemoteProtocolError, match=f"write index {value:#x}"):
        incoming.read_batch()
    with pytest.raises(RemoteProtocolError, match=f"read index {value:#x}"):
        outgoing.write(encode_packet(6, 0, 0, b""))
    for word in (0, 1):
        rings.guest.set_word(1 - word, 0)
        rings.guest.set_word(word, value)
        with pytest.raises(RemoteProtocolError):
            OutgoingRing(rings.ring)
    with pytest.raises(RemoteProtocolError):
        IncomingRing(rings.ring)


def test_our_own_indices_are_never_read_back() -> None:
    rings = Rings(IN_A_ROW)
    incoming = IncomingRing(rings.ring)
    rings.put(encode_packet(6, 0, 1, b"one"))
    rings.guest.set_word(1, 8)  # the guest writes what is ours
    assert [packet.transaction_id for packet in incoming.read_batch()] == [1]
    assert rings.guest.word(1) == 32
    other = Rings(IN_A_ROW)
    outgoing = OutgoingRing(other.ring)
    other.guest.set_word(0, 4096)
    outgoing.write(encode_packet(6, 0, 1, b"one"))
    assert other.guest.word(0) == 32


@pytest.mark.parametrize("pfns", [[], [2], [2, 99], [99, 2], [2, 2**52], [2, 3, 99]])
def test_a_ring_needs_two_pages_of_ram(pfns: list[int]) -> None:
    with pytest.raises(RemoteProtocolError):
        RingBuffer(Rings(IN_A_ROW).memory, pfns)


def test_a_batch_ends_at_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    rings = Rings(IN_A_ROW, 64)
    incoming = IncomingRing(rings.ring)
    for number in range(200):
        rings.put(encode_packet(6, 0, number, b""))
    assert [packet.transaction_id for packet in incoming.read_batch()] == list(range(128))
    assert rings.guest.word(1) == 64 + 128 * 24
    monkeypatch.setattr(ring_module, "BATCH_BYTES", 60)
    assert [packet.transaction_id for packet in incoming.read_batch()] == [128, 129]
    rest = [packet.transaction_id for _ in range(35) for packet in incoming.read_batch()]
    assert rest == list(range(130, 200))


def test_a_packet_larger_than_a_batch_is_copied_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "BATCH_BYTES", 64)
    rings = Rings(SCATTERED, SIZE - 40)
    incoming = IncomingRing(rings.ring)
    for payload in (b"small...", b"x" * 4000, b"last...."):
        rings.put(encode_packet(6, 0, 1, payload))
    got = [packet.payload for _ in range(3) for packet in incoming.read_batch()]
    assert got == [b"small...", b"x" * 4000, b"last...."]


class ChangingRing:
    """A ring whose packet grows between two copies: a guest that writes while we read."""

    def __init__(self, ring: RingBuffer, guest: GuestRing) -> None:
        self.size, self.header, self.index = ring.size, ring.header, ring.index
        self._ring, self._guest, self.reads = ring, guest, 0

    def read(self, offset: int, length: int) -> bytes:
        data = self._ring.read(offset, length)
        self.reads += 1
        self._guest.put(0, DESCRIPTOR.pack(6, 2, 900, 0, 0))
        return data


def test_a_packet_that_changes_while_it_is_read_is_judged_by_its_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rings = Rings(IN_A_ROW)
    rings.put(encode_packet(6, 0, 1, bytes(40)))
    changing = ChangingRing(rings.ring, rings.guest)
    incoming = IncomingRing(changing)  # type: ignore[arg-type] # as a ring
    assert [len(packet.payload) for packet in incoming.read_batch()] == [40]
    assert changing.reads == 1
    monkeypatch.setattr(ring_module, "BATCH_BYTES", 32)
    rings = Rings(IN_A_ROW)
    rings.put(encode_packet(6, 0, 1, bytes(40)))
    incoming = IncomingRing(ChangingRing(rings.ring, rings.guest))  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError, match="does not fit in the 64 bytes"):
        incoming.read_batch()


def test_unmasking_tells_what_came_meanwhile() -> None:
    rings = Rings(IN_A_ROW)
    incoming = IncomingRing(rings.ring)
    incoming.mask()
    assert rings.guest.word(2) == 1
    assert not incoming.unmask()
    assert rings.guest.word(2) == 0
    incoming.mask()
    rings.put(encode_packet(6, 0, 1, b""))
    assert incoming.unmask()


@given(START, st.integers(1, 20), st.integers(0, SIZE + 16))
def test_the_guest_hears_of_room_exactly_when_it_appears(
    start: int, read: int, wanted: int
) -> None:
    rings = Rings(IN_A_ROW, start)
    incoming = IncomingRing(rings.ring)
    packet = encode_packet(6, 0, 1, bytes(232))  # 256 bytes in the ring
    for _ in range(read):
        rings.put(packet)
    rings.guest.set_word(3, wanted)
    before = SIZE - rings.guest.used
    assert len(incoming.read_batch()) == read
    after = SIZE - rings.guest.used
    assert incoming.guest_has_room == bool(wanted and before <= wanted < after)


def test_a_guest_without_the_feature_bit_is_not_told_of_room() -> None:
    rings = Rings(IN_A_ROW)
    incoming = IncomingRing(rings.ring)
    rings.put(encode_packet(6, 0, 1, bytes(4096)))
    rings.guest.set_word(3, 6000)
    rings.guest.set_word(16, 0)
    incoming.read_batch()
    assert not incoming.guest_has_room


def test_the_host_says_how_much_room_it_needs() -> None:
    rings = Rings(IN_A_ROW)
    rings.guest.set_word(16, 0)
    rings.guest.set_word(3, 77)
    outgoing = OutgoingRing(rings.ring)
    assert (rings.guest.word(16) & 1, rings.guest.word(3)) == (1, 0)
    packet = encode_packet(6, 0, 0, bytes(100))
    outgoing.ask_for_room(packet)
    assert rings.guest.word(3) == len(packet) + 8 == 128
    assert outgoing.waits_for(packet)
    outgoing.ask_for_room(None)
    assert rings.guest.word(3) == 0 and not outgoing.waits_for(packet)


def test_the_guests_mask_is_respected() -> None:
    rings = Rings(IN_A_ROW)
    outgoing = OutgoingRing(rings.ring)
    assert outgoing.guest_wants_interrupt()
    rings.guest.set_word(2, 1)
    assert not outgoing.guest_wants_interrupt()


@pytest.mark.parametrize(("payload", "header"), [(bytes(524288), b""), (b"", b"odd")])
def test_a_packet_that_no_descriptor_describes_is_our_bug(payload: bytes, header: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        encode_packet(6, 0, 0, payload, header)


def test_completion_requested_is_a_flag() -> None:
    assert Packet(PacketType.DATA_INBAND, 1, 0, b"").completion_requested
    assert not Packet(PacketType.DATA_INBAND, 0, 0, b"").completion_requested


@pytest.mark.parametrize("pfns", LAYOUTS)
@pytest.mark.parametrize("start", [0, SIZE - 24, SIZE - 8])
def test_several_packets_at_once_are_all_there_or_none(pfns: list[int], start: int) -> None:
    rings = Rings(pfns, start)
    outgoing = OutgoingRing(rings.ring)
    packets = [encode_packet(PacketType.COMP, 0, number, b"%d" % number) for number in range(20)]
    assert outgoing.write_all(packets)
    assert [packet.transaction_id for packet in rings.take()] == list(range(20))
    many = [encode_packet(PacketType.COMP, 0, 1, bytes(1000))] * 9
    before = outgoing.write_index
    assert not outgoing.write_all(many)
    assert (outgoing.write_index, list(rings.take())) == (before, [])
