"""Segments that come one by one reach a guest that wants it as large frames, and no others do."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.network import frame
from hvhost.network.merge import SEGMENT_LIMIT, Train, mergeable
from hvhost.network.receive import MERGE_LEAST
from simulated.frames import ethernet, sums_are_right, tcp
from simulated.netvsc import MAC, PEER, NetvscDriver, Received

SIZE = 1400
GOOD = {0: 1 << 3}


def started(*, merging: bool = True, mtu: int = 1500) -> NetvscDriver:
    driver = NetvscDriver(sections=256)
    driver.start(merging=merging, mtu=mtu)
    return driver


def segment(
    payload: bytes, sequence: int, *, ipv6: bool = False, flags: int = 0x10, good: bool = True
) -> bytes:
    return tcp(
        payload, ipv6=ipv6, sequence=sequence & 0xFFFFFFFF, flags=flags, to=MAC, sender=PEER,
        good=good,
    )  # fmt: skip


def segments(payload: bytes, *, ipv6: bool = False, sequence: int = 1) -> list[bytes]:
    return [
        segment(payload[start : start + SIZE], sequence + start, ipv6=ipv6)
        for start in range(0, len(payload), SIZE)
    ]


def received(driver: NetvscDriver, frames: list[bytes]) -> list[Received]:
    driver.wire.incoming.extend(frame.NO_OFFLOAD + each for each in frames)
    return driver.pull()


def infos(each: Received) -> dict[int, int]:
    return {kind: value for kind, value in each.infos.items() if kind != 0x80000001}


def whole(data: bytes) -> bytes:
    """A merged frame with the sum of TCP that nobody made, made."""
    where = frame.parse(data)
    assert where is not None
    made = bytearray(data)
    frame.set_pseudo_checksum(made, where, len(made))
    frame.finish_checksum(made, frame.Offload(1, 0, 0, 0, where.transport, 16))
    return bytes(made)


def test_only_plain_data_are_part_of_something_larger() -> None:
    def may(data: bytes) -> bool:
        where = frame.parse(data)
        assert where is not None
        return mergeable(data, where, len(data))

    data = segment(bytes(100), 1)
    datagram = bytearray(data)
    datagram[23] = frame.UDP  # what are flags of TCP are a byte of its data
    assert may(data) and not may(bytes(datagram))
    assert not may(data + bytes(4)), "what lies behind is no data"
    assert not may(segment(b"", 1)), "an acknowledgement alone"


def test_what_does_not_follow_is_not_taken() -> None:
    first = segment(bytes(100), 1)
    where = frame.parse(first)
    assert where is not None
    for sequence, follows in ((101, True), (100, False), (102, False), (1, False)):
        train = Train(first, where, len(first))
        following = segment(bytes(100), sequence)
        assert train.take(following, where, len(following)) is follows
        assert train.count == 1 + follows


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("count", [1, 2, 10, 44])
def test_segments_in_a_row_are_one_frame(count: int, ipv6: bool) -> None:
    driver, payload = started(), os.urandom(SIZE * count - 101)
    (each,) = received(driver, segments(payload, ipv6=ipv6))
    assert each.fragments == count and infos(each) == GOOD
    assert each.data[74 if ipv6 else 54 :] == payload
    assert sums_are_right(whole(each.data))
    assert driver.adapter.state.counters.merged == (count > 1)
    assert driver.adapter.state.counters.received == 1


def test_the_sequence_wraps_around() -> None:
    payload = os.urandom(5 * SIZE)
    (each,) = received(started(), segments(payload, sequence=(1 << 32) - 2 * SIZE + 7))
    assert each.data[54:] == payload


@pytest.mark.parametrize("merging", [False, True])
def test_a_wrong_sum_reaches_the_guest_alone_and_as_it_came(merging: bool) -> None:
    payload = os.urandom(3 * SIZE)
    frames = segments(payload)
    frames[1] = frames[1][:-1] + bytes((frames[1][-1] ^ 1,))
    got = received(started(merging=merging), frames)
    assert [each.data for each in got] == frames
    assert [infos(each) for each in got] == ([GOOD, {}, GOOD] if merging else [{}, {}, {}])


def test_a_guest_that_does_not_merge_gets_each() -> None:
    frames = segments(os.urandom(5 * SIZE))
    assert [each.data for each in received(started(merging=False), frames)] == frames


def _changed(data: bytes, change: str) -> bytes:
    where = frame.parse(data)
    assert where is not None
    made = bytearray(data)
    if change == "ttl":
        made[22] = 9
    elif change == "acknowledgement":
        made[45] ^= 1
    elif change == "window":
        made[49] ^= 1
    elif change == "port":
        made[35] ^= 1
    elif change == "sender":
        made[11] ^= 1
    elif change == "fin":
        made[47] |= 1
    elif change == "urgent":
        made[47] |= 0x20
    else:
        made[15] = 3
    frame.set_ip_checksum(made, where)
    frame.set_pseudo_checksum(made, where, len(made))
    frame.finish_checksum(made, frame.Offload(1, 0, 0, 0, 34, 16))
    return bytes(made)


@pytest.mark.parametrize(
    "change", ["ttl", "acknowledgement", "window", "port", "sender", "fin", "urgent", "ecn"]
)
def test_segments_that_differ_stay_apart(change: str) -> None:
    frames = segments(os.urandom(2 * SIZE))
    frames[1] = _changed(frames[1], change)
    assert [each.data for each in received(started(), frames)] == frames


def test_options_are_kept_and_have_to_be_alike() -> None:
    def stamped(payload: bytes, sequence: int, stamp: int) -> bytes:
        plain = bytearray(segment(payload, sequence))
        plain[46] = 8 << 4
        made = plain[:54] + struct.pack("!BBBBII", 1, 1, 8, 10, stamp, 5) + plain[54:]
        where = frame.parse(bytes(made))
        assert where is not None
        frame.set_lengths(made, where, len(made))
        frame.set_pseudo_checksum(made, where, len(made))
        frame.finish_checksum(made, frame.Offload(1, 0, 0, 0, 34, 16))
        return bytes(made)

    payload = os.urandom(3 * 1400)
    parts = [payload[:1400], payload[1400:2800], payload[2800:]]
    frames = [stamped(part, 1 + SIZE * n, 7 + n // 2) for n, part in enumerate(parts)]
    first, second = received(started(), frames)
    assert first.data[54:66] == frames[0][54:66] and first.data[66:] == payload[:2800]
    assert second.data == frames[2]


def test_what_is_pushed_is_the_last() -> None:
    payload = os.urandom(4 * SIZE)
    frames = segments(payload)
    frames[1] = segment(payload[SIZE : 2 * SIZE], 1 + SIZE, flags=0x18)
    first, second = received(started(), frames)
    assert (first.data[54:], second.data[54:]) == (payload[: 2 * SIZE], payload[2 * SIZE :])
    assert first.data[47] == 0x18 and second.data[47] == 0x10


def test_a_short_one_is_the_last_and_a_longer_one_the_first() -> None:
    sizes, sequence, frames, payload = (SIZE, 1000, 1000, SIZE), 1, [], b""
    for size in sizes:
        part = os.urandom(size)
        frames.append(segment(part, sequence))
        payload, sequence = payload + part, sequence + size
    got = received(started(), frames)
    assert [len(each.data) - 54 for each in got] == [SIZE + 1000, 1000, SIZE]
    assert b"".join(each.data[54:] for each in got) == payload


def test_other_frames_keep_their_place() -> None:
    frames = segments(os.urandom(3 * SIZE))
    other = ethernet(0x1234, bytes(60), to=MAC, sender=PEER)
    got = received(started(), [frames[0], frames[1], other, frames[2]])
    assert [each.fragments for each in got] == [2, 1, 1]
    assert [got[1].data, got[2].data] == [other, frames[2]]


def test_segments_of_a_vlan_are_merged_in_it_only() -> None:
    frames = segments(os.urandom(3 * SIZE))
    tags = (0x0005, 0x0005, 0x0006)
    tagged = [
        each[:12] + struct.pack("!HH", 0x8100, tag) + each[12:]
        for each, tag in zip(frames, tags, strict=True)
    ]
    got = received(started(mtu=1504), tagged)
    assert [each.fragments for each in got] == [2, 1]
    assert [infos(each)[6] >> 4 for each in got] == [5, 6]
    assert got[0].data[54:] == frames[0][54:] + frames[1][54:] and got[1].data == frames[2]


def test_unmade_sums_are_merged_unchecked_and_vouched_for() -> None:
    driver, payload = started(), os.urandom(2 * SIZE)
    unmade = frame.Offload(flags=1, csum_start=34, csum_offset=16).pack()
    for number in range(2):
        part = payload[number * SIZE : (number + 1) * SIZE]
        driver.wire.incoming.append(unmade + segment(part, 1 + number * SIZE, good=False))
    (each,) = driver.pull()
    assert each.fragments == 2 and infos(each) == GOOD and each.data[54:] == payload


@pytest.mark.parametrize(("merging", "size"), [(False, SIZE), (True, 100)])
def test_unmade_sums_are_no_reason_to_merge(merging: bool, size: int) -> None:
    """For a guest that does not want it, or of frames too small to be worth it."""
    driver = started(merging=merging)
    frames = [segment(bytes(size), 1 + size * number) for number in range(3)]
    unmade = frame.Offload(flags=1, csum_start=34, csum_offset=16).pack()
    driver.wire.incoming.extend(unmade + each for each in frames)
    assert [each.data for each in driver.pull()] == frames


def test_a_frame_has_an_end() -> None:
    payload = os.urandom(SIZE * 100)
    got = received(started(), segments(payload))
    assert len(got) > 1 and all(each.fragments <= SEGMENT_LIMIT for each in got)
    assert all(len(each.data) <= 65535 + 14 for each in got)
    assert b"".join(each.data[54:] for each in got) == payload


def test_a_frame_has_no_more_pieces_than_a_packet_to_the_guest() -> None:
    payload = os.urandom(600 * 100)
    frames = [segment(payload[at : at + 600], 1 + at) for at in range(0, len(payload), 600)]
    got = received(started(), frames)
    assert [each.fragments for each in got] == [SEGMENT_LIMIT, 100 - SEGMENT_LIMIT]
    assert b"".join(each.data[54:] for each in got) == payload


def test_small_ones_are_not_worth_it() -> None:
    frames = [segment(b"x" * 100, 1 + 100 * number) for number in range(4)]
    assert MERGE_LEAST > 154
    assert [each.data for each in received(started(), frames)] == frames


STEPS = st.lists(
    st.tuples(
        st.sampled_from([600, 1000, SIZE]),
        st.sampled_from(["next", "gap", "again", "bad", "pushed", "other", "padded"]),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60)
@given(STEPS, st.booleans())
def test_nothing_is_lost_changed_or_reordered(steps: list[tuple[int, str]], ipv6: bool) -> None:
    driver, frames, sequence = started(), [], 1
    for number, (size, how) in enumerate(steps):
        part = bytes([number]) * size
        if how == "gap":
            sequence += 77
        flags = 0x18 if how == "pushed" else 0x10
        made = segment(part, sequence, ipv6=ipv6, flags=flags, good=how != "bad")
        if how == "other":
            made = ethernet(0x1234, part, to=MAC, sender=PEER)
        elif how != "again":
            sequence += size
        frames.append(made + b"\xee" * 4 if how == "padded" else made)
    got = received(driver, frames)
    start = 74 if ipv6 else 54
    position = 0
    for each in got:
        if each.fragments == 1:
            assert each.data == frames[position]
            position += 1
            continue
        taken = frames[position : position + each.fragments]
        assert each.data[start:] == b"".join(one[start:] for one in taken)
        assert all(sums_are_right(one) for one in taken) and sums_are_right(whole(each.data))
        position += each.fragments
    assert position == len(frames)
    assert len(driver.adapter._receive_buffer.free) == driver.sections  # type: ignore[union-attr]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=3), st.booleans())
def test_no_header_makes_it_fail(changes: list[tuple[int, int]], ipv6: bool) -> None:
    """And no header makes the guest get more, or other, bytes than came."""
    driver = started()
    frames = [bytearray(each) for each in segments(os.urandom(3 * SIZE), ipv6=ipv6)]
    for position, value in changes:
        frames[1][position] = value
    unmade = frame.Offload(flags=1, csum_start=34, csum_offset=16).pack()
    driver.wire.incoming.extend(unmade + bytes(each) for each in frames)
    got = driver.pull()
    assert not driver.guest.faults
    assert sum(len(each.data) for each in got) <= sum(map(len, frames))
    assert len(driver.adapter._receive_buffer.free) == driver.sections  # type: ignore[union-attr]
