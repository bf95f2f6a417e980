"""Frames from the wire at their bounds: sizes, what lay there before, sums, too little room."""

from __future__ import annotations

import os
import struct

import pytest

from hvhost.network import frame
from hvhost.network.state import Counters
from simulated.frames import ethernet, ones_sum, sums_are_right, tcp
from simulated.netvsc import MAC, NO_OFFLOAD, PEER, NetvscDriver, Received

GOOD = {0: 1 << 3}


def started(*, merging: bool = True, mtu: int = 1500, sections: int = 32) -> NetvscDriver:
    driver = NetvscDriver(sections=sections)
    driver.start(merging=merging, mtu=mtu)
    return driver


def whole(size: int, *, good: bool = True) -> bytes:
    """A TCP frame of *size* bytes for the guest."""
    return tcp(os.urandom(size - 54), to=MAC, sender=PEER, flags=0x10, good=good)


def segmented(data: bytes, size: int = 1448) -> bytes:
    """It as another kernel leaves it to be cut."""
    made = bytearray(data)
    where = frame.parse(bytes(made))
    assert where is not None
    frame.set_pseudo_checksum(made, where, len(made))
    return frame.Offload(1, 1, 54, size, 34, 16).pack() + bytes(made)


def received(driver: NetvscDriver, *frames: bytes) -> list[Received]:
    driver.wire.incoming.extend(frames)
    return driver.pull()


def counters(driver: NetvscDriver) -> Counters:
    return driver.adapter.state.counters


@pytest.mark.parametrize("mtu", [68, 1500, 4000, 9000, 65521])
def test_frames_about_as_large_as_expected(mtu: int) -> None:
    """One of a kind after another, for what is expected of the next depends on the last."""
    driver = started(mtu=mtu)
    usual, first = mtu + 18, 4096 - 112
    sizes = [usual - 1, usual, usual + 1, usual + 1, usual, 100, first - 1, first, 100, first + 1]
    sizes += [65_000, 100, 65_000, 65_000, first + 4096, 100, first + 4097, 65_549, 100, 65_549]
    sizes = [max(size, 60) for size in sizes if size <= 65_549]
    for size in sizes:
        data = segmented(whole(size))
        (each,) = received(driver, data)
        assert each.data == data[10:] and each.fragments == 1, size
    assert counters(driver).received == len(sizes)
    assert counters(driver).received_bytes == sum(sizes)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (13, 0), (14, 1)])
def test_the_smallest_frame(size: int, count: int) -> None:
    driver = started()
    data = ethernet(0x1234, b"", to=MAC, sender=PEER)[:size]
    got = received(driver, NO_OFFLOAD + data)
    assert [each.data for each in got] == [data] * count
    assert counters(driver).receive_errors == 1 - count


def test_what_lay_in_a_section_before_is_not_seen() -> None:
    """A frame cut in its header of TCP, where another one's still lies: nobody vouches for it."""
    cut = whole(200)[:40]
    for before in ([], [NO_OFFLOAD + whole(200)] * 40):
        driver = started(merging=False)
        received(driver, *before)
        (each,) = received(driver, frame.Offload(1, 0, 0, 0, 34, 16).pack() + cut)
        assert each.data == cut and each.infos == {}


@pytest.mark.parametrize(("size", "stripped"), [(18, False), (19, True), (1518, True)])
def test_a_tag_is_taken_out_of_a_frame_that_is_more_than_a_tag(size: int, stripped: bool) -> None:
    driver = started()
    head = MAC + PEER + struct.pack("!HHH", 0x8100, 5, 0x1234)
    data = head + os.urandom(size - 18)
    (each,) = received(driver, NO_OFFLOAD + data)
    assert each.data == (data[:12] + data[16:] if stripped else data)
    assert each.infos == ({6: 5 << 4} if stripped else {})


def test_a_tagged_frame_too_large_without_its_tag() -> None:
    driver = started()
    data = MAC + PEER + struct.pack("!HHH", 0x8100, 5, 0x1234) + bytes(1501)
    assert received(driver, NO_OFFLOAD + data) == [] and counters(driver).receive_errors == 1


@pytest.mark.parametrize("size", [1000, 4000, 8000])
def test_all_of_a_frame_is_summed_before_the_guest_need_not(size: int) -> None:
    """Also what lies in the second page of a section, which may be anywhere."""
    driver = started(mtu=9000)
    good = tcp(os.urandom(size // 2) + bytes(size // 2), to=MAC, sender=PEER, flags=0x10)
    bad = good[:-1] + b"\1"  # the sum of what comes before is right
    for data in (good, bad):
        (each,) = received(driver, NO_OFFLOAD + data)
        assert each.data == data
        if data is bad:
            assert each.infos == {}


def test_a_sum_that_is_right_for_the_first_page_alone_is_wrong() -> None:
    driver = started(mtu=9000)
    buffer = driver.adapter._receive_buffer
    assert buffer is not None
    first = len(buffer.bodies[buffer.free[-1]][0])
    data = bytearray(whole(8000))
    assert first < len(data), "the section is not in one piece"
    data[50:52] = bytes(2)
    part = bytes(data[34:first])
    pseudo = bytes(data[26:34]) + struct.pack("!II", len(part), 6)
    struct.pack_into("!H", data, 50, ~ones_sum(pseudo + part) & 0xFFFF)
    (each,) = received(driver, NO_OFFLOAD + bytes(data))
    assert each.data == data and each.infos == {}


def test_datagrams_in_one_frame_are_cut_also_for_a_guest_that_merges() -> None:
    """What it takes in one is TCP only."""
    driver = started()
    data = tcp(os.urandom(2500), protocol=17, to=MAC, sender=PEER)
    got = received(driver, frame.Offload(1, frame.GSO_UDP_L4, 42, 1000, 34, 6).pack() + data)
    assert [len(each.data) - 42 for each in got] == [1000, 1000, 500]
    assert all(sums_are_right(each.data) for each in got)
    assert b"".join(each.data[42:] for each in got) == data[42:]


@pytest.mark.parametrize("size", [2000, 32_000])
def test_what_came_as_one_frame_is_not_made_larger(size: int) -> None:
    driver = started()
    large = segmented(whole(size))
    following = tcp(os.urandom(600), to=MAC, sender=PEER, flags=0x10, sequence=7 + size - 54)
    got = received(driver, large, NO_OFFLOAD + following)
    assert [each.data for each in got] == [large[10:], following]


def test_segments_for_which_there_is_no_room_are_counted() -> None:
    driver = started(merging=False, sections=16)
    data = whole(54 + 20 * 1448)
    driver.wire.incoming.append(segmented(data))
    driver.adapter.readable()
    driver.read(complete=False)
    got = driver.frames
    assert len(got) == 15 and all(sums_are_right(each.data) for each in got)
    assert b"".join(each.data[54:] for each in got) == data[54 : 54 + 15 * 1448]
    assert counters(driver).no_buffer == 5 and counters(driver).receive_errors == 0


def test_frames_to_be_cut_wait_for_room_for_their_segments() -> None:
    driver = started(merging=False, sections=200)
    data = whole(54 + 44 * 1448)
    driver.wire.incoming.extend([segmented(data)] * 6)
    assert not driver.adapter.readable()
    assert len(driver.wire.incoming) == 2 and driver.wire.watching == (False, False)
    assert len(driver.pull()) == 6 * 44
    assert counters(driver).no_buffer == 0 and driver.wire.watching == (True, False)


def test_frames_that_cannot_be_cut_are_errors() -> None:
    driver = started(merging=False)
    other = ethernet(0x1234, bytes(3000), to=MAC, sender=PEER)
    assert received(driver, frame.Offload(1, 1, 54, 1448, 34, 16).pack() + other) == []
    assert counters(driver).receive_errors == 1


@pytest.mark.parametrize("port", [53, 67, 547])
@pytest.mark.parametrize("protocol", [6, 17])
def test_sums_are_made_for_clients_of_dhcp_alone(port: int, protocol: int) -> None:
    driver = started()
    data = bytearray(
        tcp(b"x" * 40, protocol=protocol, ports=(port, 68), to=MAC, sender=PEER, good=False)
    )
    where = frame.parse(bytes(data))
    assert where is not None
    frame.set_pseudo_checksum(data, where, len(data))
    field = 16 if protocol == 6 else 6
    unmade = frame.Offload(1, 0, 0, 0, 34, field).pack() + bytes(data)
    (each,) = received(driver, unmade)
    if protocol == 17 and port in (67, 547):
        assert sums_are_right(each.data) and each.infos == {}
    else:
        assert each.data == bytes(data)
        assert each.infos == {0: 1 << 3 if protocol == 6 else 1 << 4}


def test_a_train_ends_before_what_needs_work() -> None:
    driver = started()
    first = whole(1000)
    offer = tcp(b"x", protocol=17, ports=(67, 68), to=MAC, sender=PEER)
    unmade = frame.Offload(1, 0, 0, 0, 34, 6).pack() + offer
    got = received(driver, NO_OFFLOAD + first, unmade)
    assert [each.data[:14] for each in got] == [first[:14], offer[:14]]
    assert got[0].data == first


@pytest.mark.parametrize("filters", [0x01, 0x20, 0x0D])
def test_a_multicast_address_is_nobody_s_own(filters: int) -> None:
    driver = started()
    driver.set(0x1010E, struct.pack("<I", filters))
    group = ethernet(0x1234, bytes(50), to=b"\1" + MAC[1:], sender=PEER)
    got = received(driver, NO_OFFLOAD + group)
    assert len(got) == (filters != 0x01)
    assert counters(driver).filtered == (filters == 0x01)


def test_a_guest_that_names_its_groups_gets_those_alone() -> None:
    driver = started()
    one, other = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
    frames = [ethernet(0x1234, bytes(50), to=to, sender=PEER) for to in (one, other, b"\xff" * 6)]
    assert driver.set(0x1010103, one) == 0
    for filters, expected in (
        (0x01, []),
        (0x08, frames[2:]),
        (0x02, frames[:1]),
        (0x06, frames[:2]),
        (0x0A, [frames[0], frames[2]]),
    ):
        driver.set(0x1010E, struct.pack("<I", filters))
        got = received(driver, *(NO_OFFLOAD + each for each in frames))
        assert [each.data for each in got] == expected
    assert driver.set(0x1010103, b"") == 0
    assert received(driver, NO_OFFLOAD + frames[0]) == []
