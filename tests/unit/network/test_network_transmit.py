"""Frames of a guest: what is remembered of earlier messages changes nothing about the next ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.network import frame, transmit
from hvhost.network.buffers import Span
from hvhost.network.state import AdapterState, Counters
from simulated.frames import tcp
from simulated.netvsc import MAC, rndis_packet

CHECKSUM, LARGE_SEND, VLAN, HASH = 0, 2, 6, 8
INFOS = st.lists(
    st.sampled_from(
        [
            (CHECKSUM, 0x5 | 34 << 16),
            (CHECKSUM, 0x9 | 34 << 16),
            (CHECKSUM, 0x5 | 1023 << 16),
            (CHECKSUM, 0x14 | 34 << 16),
            (CHECKSUM, 0x5),
            (CHECKSUM, 0),
            (LARGE_SEND, 1448 | 34 << 20 | 1 << 30),
            (LARGE_SEND, 100 | 34 << 20 | 1 << 30),
            (LARGE_SEND, 100 | 38 << 20 | 1 << 30),
            (VLAN, 5 << 4),
            (HASH, 77),
        ]
    ),
    max_size=6,
)
#: Words of a message that are made wrong: which, and what is put there.
FAULTS = st.lists(
    st.tuples(
        st.integers(0, 22),
        st.one_of(st.integers(0, 120), st.sampled_from([0xFFFFFFFF, 0x80000000, 0x100, 5000])),
    ),
    max_size=2,
)


def message(
    size: int, infos: list[tuple[int, int]], faults: list[tuple[int, int]], sender: bytes
) -> bytes:
    made = bytearray(rndis_packet(tcp(b"x" * size, sender=sender), *infos))
    for word, value in faults:
        struct.pack_into("<I", made, 4 * word, value)
    return bytes(made)


MESSAGES = st.lists(
    st.builds(
        message,
        st.sampled_from([0, 1, 20, 180, 600]),
        INFOS,
        FAULTS,
        st.sampled_from([MAC, MAC, MAC, bytes(6)]),
    ),
    min_size=1,
    max_size=6,
)


def outcome(data: bytes, cut: int, *, may_spoof: bool) -> object:
    """What becomes of the messages in *data*, which lies in two pieces of memory."""
    memory = memoryview(bytearray(data))
    span = Span([memory[:cut], memory[cut:]] if 0 < cut < len(data) else [memory])
    state = AdapterState(MAC)
    try:
        found = transmit.frames(state, span, len(data), may_spoof=may_spoof)
    except RemoteProtocolError as error:
        return str(error)
    return [b"".join(each) for each in found], state.counters


@settings(deadline=None, max_examples=300)
@given(MESSAGES, st.integers(0, 400), st.booleans())
def test_it_makes_no_difference_what_came_before(
    messages: list[bytes], cut: int, may_spoof: bool
) -> None:
    for data in (*messages, b"".join(messages)):
        remembered = outcome(data, cut, may_spoof=may_spoof)
        kept = dict(transmit._shapes)
        transmit._shapes.clear()
        assert outcome(data, cut, may_spoof=may_spoof) == remembered
        transmit._shapes.update(kept)


@pytest.mark.parametrize(
    ("word", "value", "sentence"),
    [
        (0, 9, "type 0x9"),  # no frame
        (1, 2000, "came in"),  # longer than what there is
        (1, 60, "60 bytes puts"),  # shorter than its frame
        (3, 2000, "2000 bytes of data"),
        (3, 13, None),  # no whole frame: not sent
        (3, 50, None),  # the sum would be outside
    ],
)
def test_a_known_shape_with_other_lengths_is_checked(
    word: int, value: int, sentence: str | None
) -> None:
    info = [(CHECKSUM, 0x5 | 34 << 16)]
    good = message(20, info, [], MAC)
    transmit._shapes.clear()
    assert isinstance(outcome(good, 0, may_spoof=False), tuple) and len(transmit._shapes) == 1
    bad = outcome(message(20, info, [(word, value)], MAC), 0, may_spoof=False)
    if sentence is not None:
        assert sentence in str(bad)
    else:
        assert isinstance(bad, tuple) and bad[0] == [] and bad[1].transmit_errors == 1


@pytest.mark.parametrize("infos", [[], [(HASH, 1)]])
def test_a_frame_of_a_known_shape_is_a_whole_one(infos: list[tuple[int, int]]) -> None:
    transmit._shapes.clear()
    for size, count in ((14, 1), (13, 0), (0, 0), (14, 1)):
        got, counters = counted(rndis_packet((MAC * 3)[:size], *infos), may_spoof=True)
        assert (len(got), counters.transmit_errors) == (count, 1 - count)


@pytest.mark.parametrize("size", [1, 8, 32, 36, 43])
def test_a_packet_ends_with_a_whole_header(size: int) -> None:
    good = message(20, [], [], MAC)
    for data in (good[:size], good + good[:size]):
        assert f"{size} bytes has no whole header" in str(outcome(data, 0, may_spoof=False))


def raw(length: int, offset: int, size: int, info: tuple[int, int], body: bytes) -> bytes:
    """A data message whose parts are where they are said to be; offsets from its ninth byte."""
    head = struct.pack("<11I", 1, length, offset, size, 0, 0, 0, *info, 0, 0)
    return (head + body).ljust(length, b"\0")


def test_information_has_to_end_inside_a_message_of_a_known_shape() -> None:
    item = struct.pack("<4I", 16, HASH, 12, 1)
    transmit._shapes.clear()
    good = raw(200, 36, 100, (36, 16), item)
    outcome(good, 0, may_spoof=True)
    assert len(transmit._shapes) == 1
    short = bytearray(raw(200, 36, 14, (36, 16), item))
    struct.pack_into("<I", short, 4, 58)  # the information would end at 60
    assert "leaves the message" in str(outcome(bytes(short), 0, may_spoof=True))


def test_information_elsewhere_is_read_each_time() -> None:
    data = tcp(b"x" * 100)
    filler = bytes(16)
    plain, tagged = (
        raw(76 + len(data), 68, len(data), (52, 16), filler + struct.pack("<4I", *item) + data)
        for item in ((16, HASH, 12, 5 << 4), (16, VLAN, 12, 5 << 4))
    )
    transmit._shapes.clear()
    first, second = (outcome(each, 0, may_spoof=False) for each in (plain, tagged))
    assert isinstance(first, tuple) and isinstance(second, tuple)
    assert first[0] == [bytes(10) + data]
    assert second[0] == [bytes(10) + data[:12] + b"\x81\0\0\5" + data[12:]]


def test_a_frame_far_behind_its_header_is_found_each_time() -> None:
    data = tcp(b"x" * 1000)
    far = raw(508 + len(data), 500, len(data), (36, 0), bytes(464) + data)
    transmit._shapes.clear()
    for _ in range(2):
        got = outcome(far, 0, may_spoof=False)
        assert isinstance(got, tuple) and got[0] == [bytes(10) + data]


def counted(data: bytes, *, may_spoof: bool = False) -> tuple[list[bytes], Counters]:
    """As :func:`outcome`, of messages without a mistake."""
    got = outcome(data, 0, may_spoof=may_spoof)
    assert isinstance(got, tuple)
    return got


@pytest.mark.parametrize("info", [(HASH, 1), (CHECKSUM, 0x5 | 34 << 16), (VLAN, 5 << 4)])
def test_frames_are_counted_as_sent_or_as_from_somebody_else(info: tuple[int, int]) -> None:
    transmit._shapes.clear()
    for _ in range(2):  # decoded, and remembered
        data = message(20, [info], [], MAC) * 3 + message(20, [info], [], bytes(6))
        frames, counters = counted(data)
        data_of = tcp(b"x" * 20, sender=MAC)
        tag = b"\x81\x00\x00\x05" if info[0] == VLAN else b""
        assert [each[10:] for each in frames] == [data_of[:12] + tag + data_of[12:]] * 3
        assert counters == Counters(transmitted=3, transmitted_bytes=3 * 74, spoofed=1)
        frames, counters = counted(data, may_spoof=True)
        assert counters == Counters(transmitted=4, transmitted_bytes=4 * 74)


def test_a_packet_has_so_many_messages_and_no_more() -> None:
    tiny = rndis_packet(bytes(6) + MAC + b"\x12\x34")
    limit = transmit.MESSAGES_PER_PACKET
    for count in (limit - 1, limit, limit + 1):
        transmit._shapes.clear()
        assert len(counted(tiny * count)[0]) == min(count, limit)
        assert len(counted(tiny * count)[0]) == min(count, limit)


@pytest.mark.parametrize(("bit", "field"), [(0x5, 18), (0x9, 8)])
def test_a_sum_has_to_lie_in_the_frame(bit: int, field: int) -> None:
    """TCP's and UDP's, from byte 34 on, in a frame that just holds it, and in a shorter one."""
    transmit._shapes.clear()
    body = tcp(b"x" * 100)
    for _ in range(2):  # decoded, and remembered
        whole, counters = counted(rndis_packet(body[: 34 + field], (CHECKSUM, bit | 34 << 16)))
        assert len(whole) == 1 and whole[0][0] == frame.NEEDS_CSUM
        short, counters = counted(rndis_packet(body[: 33 + field], (CHECKSUM, bit | 34 << 16)))
        assert short == [] and counters.transmit_errors == 1


def test_a_sum_may_begin_behind_the_ethernet_header_and_not_before() -> None:
    for offset, count in ((13, 0), (14, 1)):
        got, _ = counted(rndis_packet(tcp(b"x" * 100), (CHECKSUM, 0x5 | offset << 16)))
        assert len(got) == count


@pytest.mark.parametrize("vlan", [[], [(VLAN, 0x7B << 4)]])
def test_an_ip_header_s_sum_is_made_here(vlan: list[tuple[int, int]]) -> None:
    good = tcp(b"x" * 300)
    bad = good[:24] + bytes(2) + good[26:]
    tag = b"\x81\x00\x00\x7b" if vlan else b""
    moved = frame.Offload(1, 0, 0, 0, 34 + len(tag), 16).pack()
    other = MAC + MAC + b"\x08\x06" + bytes(200)
    for _ in range(2):  # decoded, and remembered
        (sent,), _ = counted(rndis_packet(bad, (CHECKSUM, 0x10), *vlan))
        assert sent == bytes(10) + good[:12] + tag + good[12:]
        (sent,), _ = counted(rndis_packet(bad, (CHECKSUM, 0x15 | 34 << 16), *vlan))
        assert sent == moved + good[:12] + tag + good[12:]
        (sent,), _ = counted(rndis_packet(other, (CHECKSUM, 0x10)))
        assert sent == bytes(10) + other, "what is not IP has no such sum"


@pytest.mark.parametrize("vlan", [[], [(VLAN, 0x7B << 4)]])
def test_an_ip_header_s_sum_is_the_guest_s_if_it_does_not_ask(vlan: list[tuple[int, int]]) -> None:
    bad = bytearray(tcp(b"x" * 300))
    bad[24] ^= 1
    tag = b"\x81\x00\x00\x7b" if vlan else b""
    transmit._shapes.clear()
    for _ in range(2):
        (sent,), _ = counted(rndis_packet(bytes(bad), *vlan))
        assert sent == bytes(10) + bad[:12] + tag + bad[12:]


def test_headers_to_be_worked_on_lie_anywhere_and_end_with_their_frame() -> None:
    good = tcp(b"x" * 20)
    bad = good[:24] + bytes(2) + good[26:]
    several = rndis_packet(bad, (CHECKSUM, 0x10)) * 3
    assert counted(several)[0] == [bytes(10) + good] * 3
    item = struct.pack("<4I", 16, CHECKSUM, 12, 0x10)
    for offset in (200, 260, 300, 1000):
        far = raw(8 + offset + 400, offset, len(bad), (36, 16), item)
        far = far[: 8 + offset] + bad + far[8 + offset + len(bad) :]
        assert counted(far)[0] == [bytes(10) + good]


@pytest.mark.parametrize("info", [(HASH, 1), (VLAN, 0x7B << 4)])
def test_the_sizes_that_a_frame_may_have(info: tuple[int, int]) -> None:
    tag = 4 if info[0] == VLAN else 0
    for size, count in ((13, 0), (14, 1), (frame.FRAME_LIMIT, 1), (frame.FRAME_LIMIT + 1, 0)):
        data = rndis_packet((MAC * 2).ljust(size, b"x")[:size], info)
        transmit._shapes.clear()
        for _ in range(2):  # decoded, and remembered
            got, counters = counted(data, may_spoof=True)
            assert [len(each) for each in got] == [10 + size + tag] * count
            assert counters.transmit_errors == 1 - count


def test_more_information_than_its_size_s_first_byte_tells_is_read_each_time() -> None:
    """Its data lie in it, so that all of it is among what is read first."""
    for last, tag in (((HASH, 1), b""), ((VLAN, 5 << 4), b"\x81\x00\x00\x05")):
        items = [(HASH, 1)] * 16 + [last]
        info = b"".join(struct.pack("<4I", 16, kind, 12, value) for kind, value in items)
        data = raw(400, 36, 60, (36, len(info)), info)
        for _ in range(2):
            (sent,), _ = counted(data, may_spoof=True)
            assert sent == bytes(10) + info[:12] + tag + info[12:60]


@pytest.mark.parametrize(("size", "kind"), [(1, 0), (1460, 0), (1461, 1)])
def test_a_large_send_of_one_segment_is_none(size: int, kind: int) -> None:
    (sent,), counters = counted(
        rndis_packet(tcp(b"x" * size), (LARGE_SEND, 1460 | 34 << 20 | 1 << 30))
    )
    offload = frame.unpack_offload(sent)
    assert offload == frame.Offload(1, kind, 54, 1460 if kind else 0, 34, 16)
    assert counters.large_sends == kind


@pytest.mark.parametrize(("mss", "count"), [(0, 0), (1, 1), (65535, 1), (65536, 0)])
def test_sizes_of_segments(mss: int, count: int) -> None:
    got, _ = counted(rndis_packet(tcp(b"x" * 99), (LARGE_SEND, mss | 34 << 20 | 1 << 30)))
    assert len(got) == count


def test_a_large_send_from_another_address_is_not_sent() -> None:
    data = message(3000, [(LARGE_SEND, 1448 | 34 << 20 | 1 << 30)], [], bytes(6))
    got, counters = counted(data)
    assert got == [] and counters.spoofed == 1
    assert len(counted(data, may_spoof=True)[0]) == 1


def test_much_information_is_read_all_the_same() -> None:
    """Sixty items of sixteen bytes, the tag last: more than what is read first."""
    data = tcp(b"x" * 300)
    infos = [(HASH, 1)] * 59 + [(VLAN, 5 << 4)]
    (sent,), _ = counted(rndis_packet(data, *infos))
    assert sent == bytes(10) + data[:12] + b"\x81\x00\x00\x05" + data[12:]


def test_what_is_remembered_is_bounded() -> None:
    for number in range(2 * transmit.SHAPE_LIMIT):
        outcome(message(20, [(HASH, number)], [], MAC), 0, may_spoof=False)
    assert 0 < len(transmit._shapes) <= transmit.SHAPE_LIMIT
