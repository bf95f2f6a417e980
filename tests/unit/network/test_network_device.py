"""The adapter against a simulated driver: what a good guest does, and each thing a bad one can."""

from __future__ import annotations

import os
import struct

import pytest

from hvhost.network import frame
from hvhost.network.device import LARGE_PACKET
from hvhost.network.toeplitz import toeplitz
from hvhost.vmbus.channel import Channel, ChannelState
from hvhost.vmbus.protocol import RelidReleased, RescindChannelOffer
from simulated.frames import ethernet, sums_are_right, tcp
from simulated.netvsc import MAC, NO_OFFLOAD, PEER, NetvscDriver, nvsp, rndis_packet

BROADCAST = b"\xff" * 6
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)


def started(**how: bool | int) -> NetvscDriver:
    driver = NetvscDriver(
        queues=int(how.pop("queues", 1)), may_spoof=bool(how.pop("may_spoof", False))
    )
    driver.start(**how)  # type: ignore[arg-type] # mtu, merging
    return driver


def incoming(data: bytes, offload: frame.Offload = frame.NOTHING) -> bytes:
    return offload.pack() + data


def test_a_frame_each_way() -> None:
    driver = started()
    out = ethernet(0x1234, os.urandom(60))
    transaction = driver.send(rndis_packet(out))
    assert driver.wire.sent == [NO_OFFLOAD + out]
    driver.read()
    assert driver.completed[-1] == transaction
    back = ethernet(0x1234, os.urandom(1000), to=MAC, sender=PEER)
    driver.wire.incoming.append(incoming(back))
    (received,) = driver.pull()
    assert (received.data, received.infos) == (back, {})
    assert driver.adapter.state.counters.received == 1


@pytest.mark.parametrize("version", [0x2, 0x30002, 0x40000, 0x50000, 0x60000, 0x60001])
def test_every_version(version: int) -> None:
    driver = NetvscDriver()
    driver.open()
    assert driver.negotiate(0x70000) == 0
    assert driver.negotiate(version) == version


def test_what_linux_asks_for() -> None:
    driver = started(queues=4)
    assert driver.query(0x01010101) == (0, MAC)
    assert driver.query(0x00010114) == (0, bytes(4))
    assert driver.query(0x00010106) == (0, struct.pack("<I", 1500))
    assert driver.query(0x00020216)[1].decode("utf-16-le") == "net0"
    _, rss = driver.query(0x00010203, struct.pack("<BBH", 0x88, 2, 18).ljust(18, b"\0"))
    assert struct.unpack("<BBHIIIH", rss)[5:] == (4, 128)
    for revision, size in ((1, 112), (2, 144), (3, 156)):
        question = struct.pack("<BBH", 0xA7, revision, size).ljust(size, b"\0")
        status, caps = driver.query(0xFC01020D, question)
        assert (status, len(caps)) == (0, size)
        assert struct.unpack_from("<BBH", caps) == (0xA7, revision, size)
    assert caps[144:146] == b"\1\1"  # RSC for both
    assert driver.query(0x12345678) == (0xC00000BB, b"")


def test_aggregated_messages_are_frames_of_their_own() -> None:
    driver = started()
    frames = [ethernet(0x1234, bytes([number]) * 52) for number in range(8)]
    driver.send(*(rndis_packet(each) for each in frames), section=3)
    assert driver.wire.sent == [NO_OFFLOAD + each for each in frames]
    driver.read()
    assert len(driver.completed) == len(set(driver.completed))


def test_checksum_requests_are_left_to_the_wire() -> None:
    driver = started()
    for ipv6, protocol, bits, field in ((0, 6, 0x5, 16), (1, 6, 0x6, 16), (1, 17, 0xA, 6)):
        data = tcp(b"hello", ipv6=bool(ipv6), protocol=protocol, good=False)
        start = 54 if ipv6 else 34
        driver.send(rndis_packet(data, (0, bits | start << 16)))
        offload = frame.unpack_offload(driver.wire.sent[-1])
        assert (offload.flags, offload.csum_start, offload.csum_offset) == (1, start, field)


def test_a_checksum_outside_the_frame_is_not_sent() -> None:
    driver = started()
    driver.send(rndis_packet(tcp(b""), (0, 0x5 | 1000 << 16)))
    assert driver.wire.sent == [] and driver.adapter.state.counters.transmit_errors == 1


@pytest.mark.parametrize("offset", [0, 13])
def test_a_checksum_inside_the_addresses_is_not_made(offset: int) -> None:
    driver = started()
    driver.send(rndis_packet(tcp(b""), (0, 0x5 | offset << 16)))
    assert driver.wire.sent == [] and driver.adapter.state.counters.transmit_errors == 1


@pytest.mark.parametrize("size", [0, 13, frame.FRAME_LIMIT + 1])
def test_frames_of_no_size_there_is(size: int) -> None:
    driver = started()
    driver.send_pages_of(rndis_packet(ethernet(0x1234, bytes(size))[:size]))
    assert driver.wire.sent == [] and driver.adapter.state.counters.transmit_errors == 1
    assert not driver.guest.faults


LARGE = 1460 | 34 << 20 | 1 << 30


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (tcp(bytes(3000), protocol=17), LARGE),
        (ethernet(0x0806, bytes(3000)), LARGE),
        (tcp(bytes(3000)), LARGE & ~(1 << 30)),  # version 1
        (tcp(bytes(3000)), LARGE | 1 << 31),  # of IPv6
        (tcp(bytes(3000), ipv6=True), 1460 | 54 << 20 | 1 << 30),
        (tcp(bytes(3000)), 1460 | 38 << 20 | 1 << 30),
        (tcp(bytes(3000)), 34 << 20 | 1 << 30),
        (tcp(bytes(3000)), 65536 | 34 << 20 | 1 << 30),
        (tcp(bytes(65536 - 40)), LARGE),  # no IPv4 header can name its length
    ],
)
def test_a_large_send_of_something_else_is_not_sent(data: bytes, value: int) -> None:
    driver = started()
    driver.send_pages_of(rndis_packet(data, (2, value)))
    assert driver.wire.sent == [] and driver.adapter.state.counters.transmit_errors == 1
    assert not driver.guest.faults
    driver.send_pages_of(rndis_packet(tcp(bytes(3000)), (2, LARGE)))
    assert len(driver.wire.sent) == 1


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("vlan", [None, 0x7B0])  # VLAN 123
def test_a_large_send_is_made_whole_and_stays_whole(ipv6: bool, vlan: int | None) -> None:
    driver = started()
    payload = os.urandom(60_000)
    whole = tcp(payload, ipv6=ipv6, good=False)
    data = bytearray(whole)
    if ipv6:
        data[18:20] = bytes(2)
    else:
        data[16:18] = data[24:26] = bytes(2)
    start = 54 if ipv6 else 34
    infos = [(2, 1460 | start << 20 | 1 << 30 | ipv6 << 31)]
    if vlan is not None:
        infos.append((6, vlan))
    driver.send_pages_of(rndis_packet(bytes(data), *infos))
    (sent,) = driver.wire.sent
    offload = frame.unpack_offload(sent)
    moved = 0 if vlan is None else 4
    assert offload.gso_type == (4 if ipv6 else 1) and offload.gso_size == 1460
    assert offload.csum_start == start + moved and offload.hdr_len == start + 20 + moved
    if vlan is not None:
        assert sent[22:26] == bytes.fromhex("8100007b")
    pieces = list(
        frame.segments(sent[10:22] + sent[22 + moved :], offload._replace(csum_start=start))
    )
    assert all(sums_are_right(bytes(piece)) for piece in pieces)
    assert b"".join(bytes(piece[start + 20 :]) for piece in pieces) == payload


def test_a_frame_from_another_address_is_dropped() -> None:
    driver = started()
    driver.send(rndis_packet(ethernet(0x1234, bytes(50), sender=PEER)))
    assert driver.wire.sent == [] and driver.adapter.state.counters.spoofed == 1
    allowed = started(may_spoof=True)
    allowed.send(rndis_packet(ethernet(0x1234, bytes(50), sender=PEER)))
    assert len(allowed.wire.sent) == 1


@pytest.mark.parametrize(("may_spoof", "status"), [(False, 0xC0000001), (True, 0)])
def test_the_guest_changes_its_address_if_it_may(may_spoof: bool, status: int) -> None:
    driver = started(may_spoof=may_spoof)
    name, value = "NetworkAddress".encode("utf-16-le"), "00155dffffff".encode("utf-16-le")
    head = struct.pack("<IIIII", 20, len(name), 2, 20 + len(name), len(value))
    assert driver.set(0x1021B, head + name + value) == status
    assert (driver.adapter.state.mac == bytes.fromhex("00155dffffff")) is may_spoof


def test_filters() -> None:
    driver = started()
    frames = {
        0x01: ethernet(0x1234, bytes(50), to=MAC, sender=PEER),
        0x08: ethernet(0x1234, bytes(50), to=BROADCAST, sender=PEER),
        0x04: ethernet(0x1234, bytes(50), to=bytes.fromhex("333300000001"), sender=PEER),
        0x20: ethernet(0x1234, bytes(50), to=PEER, sender=PEER),
    }
    for chosen in (*frames, 0x0D):
        driver.set(0x1010E, struct.pack("<I", chosen))
        driver.wire.incoming.extend(incoming(each) for each in frames.values())
        expected = [each for bit, each in frames.items() if chosen & (bit | 0x20)]
        assert [each.data for each in driver.pull()] == expected


def test_a_tag_comes_as_information() -> None:
    driver = started()
    data = ethernet(0x1234, os.urandom(300), to=MAC, sender=PEER)
    tagged = data[:12] + bytes.fromhex("8100a07b") + data[12:]  # priority 5, VLAN 123
    driver.wire.incoming.append(incoming(tagged))
    (received,) = driver.pull()
    assert received.data == data and received.infos == {6: 5 | 123 << 4}


def test_unmade_sums_are_vouched_for_and_bad_ones_are_not() -> None:
    driver = started()
    data = tcp(b"x" * 100, good=False, to=MAC, sender=PEER)
    unmade = frame.Offload(flags=1, csum_start=34, csum_offset=16)
    driver.wire.incoming += [incoming(data, unmade), incoming(data)]
    first, second = driver.pull()
    assert first.infos == {0: 1 << 3} and second.infos == {}


def test_a_dhcp_server_s_sum_is_made() -> None:
    driver = started()
    data = tcp(b"offer", good=False, protocol=17, ports=(67, 68), to=MAC, sender=PEER)
    where = frame.parse(data)
    assert where is not None
    unmade = bytearray(data)
    frame.set_pseudo_checksum(unmade, where, len(data))
    offload = frame.Offload(flags=1, csum_start=34, csum_offset=6)
    driver.wire.incoming.append(incoming(bytes(unmade), offload))
    (received,) = driver.pull()
    assert sums_are_right(received.data) and received.infos == {}


@pytest.mark.parametrize("ipv6", [False, True])
def test_merged_segments_come_whole(ipv6: bool) -> None:
    driver = started()
    data = tcp(os.urandom(64_000), ipv6=ipv6, to=MAC, sender=PEER)
    start = 54 if ipv6 else 34
    offload = frame.Offload(1, 4 if ipv6 else 1, start + 20, 1460, start, 16)
    driver.wire.incoming.append(incoming(data, offload))
    (received,) = driver.pull()
    assert received.data == data and received.fragments == 1
    assert received.infos == {0: 1 << 3}
    assert driver.adapter.state.counters.merged == 1


@pytest.mark.parametrize("ipv6", [False, True])
def test_a_guest_that_does_not_merge_gets_segments(ipv6: bool) -> None:
    driver = started(merging=False)
    payload = os.urandom(20_000)
    data = bytearray(tcp(payload, ipv6=ipv6, to=MAC, sender=PEER, good=False))
    start = 54 if ipv6 else 34
    where = frame.parse(bytes(data))
    assert where is not None
    frame.set_pseudo_checksum(data, where, len(data))
    offload = frame.Offload(1, 4 if ipv6 else 1, start + 20, 1400, start, 16)
    driver.wire.incoming.append(incoming(bytes(data), offload))
    received = driver.pull()
    assert len(received) == 15 and all(sums_are_right(each.data) for each in received)
    assert b"".join(each.data[start + 20 :] for each in received) == payload


def test_a_frame_larger_than_the_mtu_is_dropped() -> None:
    driver = started()
    driver.wire.incoming.append(incoming(ethernet(0x1234, bytes(1501), to=MAC)))
    assert driver.pull() == []
    jumbo = started(mtu=9000)
    data = ethernet(0x1234, os.urandom(9000), to=MAC)
    jumbo.wire.incoming.append(incoming(data))
    assert [each.data for each in jumbo.pull()] == [data]


def test_flows_land_on_the_channel_that_the_hash_says() -> None:
    driver = started(queues=4)
    assert driver.open_subchannels(3) == 3 and len(driver.channels) == 4
    assert driver.send_table == [number % 4 for number in range(16)]
    table = [number * 7 % 4 for number in range(128)]
    assert driver.set_rss(table, KEY) == 0
    for port in range(40):
        data = tcp(b"flow", ports=(5000 + port, 80), to=MAC, sender=PEER)
        driver.wire.incoming.append(incoming(data))
    received = driver.pull()
    assert {each.channel for each in received} == {0, 1, 2, 3}
    for each in received:
        value = toeplitz(KEY, each.data[26:38])
        assert each.channel == table[value & 127] and each.infos == {8: value, 9: 0x201}


def test_a_table_of_channels_that_do_not_exist_is_refused() -> None:
    driver = started(queues=2)
    driver.open_subchannels(1)
    assert driver.set_rss([2] * 128, KEY) == 0xC0010015
    assert driver.set_rss([1] * 128, KEY) == 0


def test_closing_the_first_channel_takes_the_others_along() -> None:
    driver = started(queues=4)
    driver.open_subchannels(3)
    for relid in (2, 3, 4):
        driver.guest.close(relid)
    driver.guest.close(1)
    messages = [message for _, message in driver.guest.port.messages]
    rescinded = [each.child_relid for each in messages if isinstance(each, RescindChannelOffer)]
    assert rescinded == [2, 3, 4]
    for relid in rescinded:
        driver.guest.post(RelidReleased(relid))
    driver.open()
    driver.negotiate()
    assert driver.guest.faults == [] and not driver.adapter.state.initialized


def test_link_down_and_up() -> None:
    driver = started()
    driver.adapter.set_link(False)
    driver.send(rndis_packet(ethernet(0x1234, bytes(50))))
    assert driver.wire.sent == []
    driver.adapter.set_link(True)
    driver.read()
    statuses = [struct.unpack_from("<I", each, 8)[0] for each in driver.indications]
    assert statuses == [0x4001000C, 0x4001000B] and driver.wire.watching == (True, False)


@pytest.mark.parametrize("link", [True, False])
def test_what_comes_while_nobody_listens_is_lost(link: bool) -> None:
    driver = started()
    adapter = driver.adapter

    def listen(on: bool) -> None:
        if link:
            adapter.set_link(on)
        else:
            driver.set(0x1010E, struct.pack("<I", 0x0D if on else 0))

    listen(False)
    early = incoming(ethernet(0x1234, bytes(60), to=MAC))
    large = incoming(ethernet(0x1234, bytes(9000), to=MAC))
    driver.wire.incoming.extend([early, large] * 100)
    assert driver.wire.watching == (True, False)
    assert adapter.readable(), "others get their turn before it is all gone"
    assert driver.pull() == [] and not driver.wire.incoming
    assert adapter.state.counters.filtered == 200 and not adapter.state.counters.received
    listen(True)
    late = ethernet(0x1234, bytes(70), to=MAC)
    driver.wire.incoming.append(incoming(late))
    assert [each.data for each in driver.pull()] == [late]


@pytest.mark.parametrize("size", [60, LARGE_PACKET - 100, LARGE_PACKET])
def test_the_first_and_each_large_one_is_answered_before_others_are_handled(size: int) -> None:
    driver, guest = started(), []
    take = driver.wire.send

    def send(buffers: list[bytes | bytearray | memoryview]) -> bool:
        driver.read()
        guest.append((list(driver.completed), channel.interrupts - before))
        return take(buffers)

    driver.wire.send = send  # type: ignore[method-assign]
    channel = driver.guest.server.channels[0]
    driver.read()
    driver.completed.clear()
    before = channel.interrupts
    message = rndis_packet(ethernet(0x1234, bytes(size)))
    first, second, third = (driver.send_pages_of(message, signal=False) for _ in range(3))
    channel.process()
    at_once = size >= LARGE_PACKET
    assert guest[:2] == [([], 0), ([first], 1)]
    assert guest[2] == (([first, second], 2) if at_once else ([first], 1))
    driver.read()
    assert driver.completed == [first, second, third]
    assert channel.interrupts == before + (3 if at_once else 2)


def test_a_wire_that_is_full_holds_the_guest_back() -> None:
    driver = started()
    driver.wire.takes = 2
    data = [ethernet(0x1234, bytes([number]) * 50) for number in range(5)]
    sent = [driver.send(rndis_packet(each), section=number) for number, each in enumerate(data)]
    driver.read()
    assert len(driver.wire.sent) == 2 and driver.completed[-2:] == sent[:2]
    assert driver.wire.watching == (True, True)
    driver.wire.takes = 100
    later: list[object] = []
    driver.adapter.process_later = later.append
    driver.adapter.writable()
    driver.guest.server.channels[0].process()
    driver.read()
    assert [each[10:] for each in driver.wire.sent] == data and later
    assert sorted(driver.completed[-5:]) == sent and driver.wire.watching == (True, False)


def test_before_an_adapter_goes_all_that_was_sent_is_answered() -> None:
    """Linux would wait for it for ever."""
    driver = started(queues=2)
    driver.open_subchannels(1)
    driver.wire.takes = 1
    message = rndis_packet(ethernet(0x1234, bytes(50)))
    sent = [driver.send(message, section=number) for number in range(3)]  # two of them wait
    unheard = [
        driver.send(message, section=3 + each, channel=each, signal=False) for each in (0, 1)
    ]
    count = driver.adapter.quiesce()
    driver.read()
    assert sorted(driver.completed[-5:]) == sorted([*sent, *unheard])
    assert struct.unpack_from("<I", driver.indications[-1], 8) == (0x4001000C,)
    assert len(driver.wire.sent) == 1 and not driver.adapter.state.link
    assert driver.adapter.quiesce() == count + 1, "the driver gave the indication's section back"
    assert driver.adapter.quiesce() == count + 1 and driver.guest.faults == []


def test_a_guest_that_never_stops_sending_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = started()
    calls: list[Channel] = []

    def process(channel: Channel) -> bool:
        calls.append(channel)
        return True

    monkeypatch.setattr(Channel, "process", process)
    driver.adapter.quiesce()
    assert 0 < len(calls) < 100


def test_a_guest_that_gives_nothing_back_gets_nothing_more() -> None:
    driver = started()
    for _ in range(200):
        driver.wire.incoming.append(incoming(ethernet(0x1234, bytes(60), to=MAC)))
    while driver.adapter.readable():
        driver.read(complete=False)
    driver.read(complete=False)
    assert driver.wire.watching == (False, False) and len(driver.wire.incoming) > 100
    assert len(driver.frames) == driver.sections - 1


def test_a_frame_that_comes_alone_does_not_wait_for_others() -> None:
    """The guest is interrupted for it before the wire is asked again; of many, once for all."""
    driver = started()
    channel = driver.guest.server.channels[0]
    seen: list[int] = []
    receive_into = driver.wire.receive_into

    def watching(buffers: list[memoryview]) -> int:
        seen.append(channel.interrupts)
        return receive_into(buffers)

    driver.wire.receive_into = watching  # type: ignore[method-assign]
    frames = [incoming(ethernet(0x1234, bytes(60), to=MAC, sender=PEER))] * 20
    for count in (1, 1, 20, 20):
        driver.wire.incoming.extend(frames[:count])
        driver.pull()
    first, alone, beginning, many = seen[:2], seen[2:4], seen[4:25], seen[25:46]
    assert first[1] == first[0] and alone[1] > alone[0]
    assert beginning[1] > beginning[0] and len({*beginning[1:]}) == 1
    assert len({*many}) == 1


# What a guest must not do; each faults its channel, in one sentence.


def fault_of(driver: NetvscDriver) -> str:
    (fault,) = driver.guest.faults
    assert driver.guest.server.channels[0].state is ChannelState.FAULTED
    return fault


def test_completing_twice() -> None:
    driver = started()
    driver.wire.incoming.append(incoming(ethernet(0x1234, bytes(60), to=MAC)))
    driver.adapter.readable()
    driver.read()
    driver.channel.write(struct.pack("<II", 108, 1), packet_type=11, transaction_id=3)
    assert "not under way" in fault_of(driver)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (nvsp(107, 0, 5000, 100), "section 5000 of 21"),
        (nvsp(107, 0, 0, 6145), "6145 bytes of section 0"),
        (nvsp(104, 0x999, 0), "second send buffer"),
        (nvsp(101, 0x999, 0xCAFE), "second receive buffer"),
        (nvsp(1, 0x60001, 0x60001), "anew with its buffers lent"),
        (nvsp(133, 2, 1), "sub-channels"),
        (nvsp(999), "message 999 is unknown"),
        (nvsp(102), "message 102 is unknown or for hosts to send"),
        (nvsp(125, 67 + 14, 0, 0, 0), "an MTU of 67 bytes"),
        (nvsp(125, 65522 + 14, 0, 0, 0), "an MTU of 65522 bytes"),
        (nvsp(125, 0, 0, 0, 0), "an MTU of -14 bytes"),
        (struct.pack("<IIII", 125, 1514, 0, 0), "cut it short"),
        (nvsp(133, 0, 1), "sub-channels"),
        (b"\x6b\0\0\0\0\0\0\0", "has 8 bytes only"),
        (struct.pack("<II", 100, 6), "has 8 bytes only"),
    ],
)
def test_messages_that_cannot_be(message: bytes, sentence: str) -> None:
    driver = started()
    driver.tell(message)
    assert sentence in fault_of(driver)


@pytest.mark.parametrize("kind", [100, 101, 104, 125, 133])
def test_messages_before_a_version(kind: int) -> None:
    driver = NetvscDriver()
    driver.open()
    driver.tell(nvsp(kind, 0, 0))
    assert f"message {kind} came before a version" in fault_of(driver)


def test_a_completion_without_a_receive_buffer() -> None:
    driver = NetvscDriver()
    driver.open()
    driver.channel.write(struct.pack("<II", 108, 1), packet_type=11, transaction_id=3)
    assert "without a receive buffer" in fault_of(driver)


def test_a_packet_of_another_kind() -> None:
    driver = started()
    driver.channel.write(nvsp(107, 0, 0, 0), packet_type=7, header=struct.pack("<HBBI", 1, 0, 0, 0))
    assert "got a packet DATA_USING_XFER_PAGES" in fault_of(driver)


@pytest.mark.parametrize("negotiated", [False, True])
def test_a_frame_before_its_time(negotiated: bool) -> None:
    driver = NetvscDriver()
    driver.open()
    if negotiated:
        assert driver.negotiate() == 0x60001
    driver.send_pages_of(rndis_packet(ethernet(0x1234, bytes(60))))
    assert "a frame came before RNDIS was initialised" in fault_of(driver)
    assert driver.wire.sent == []


def test_the_data_path_is_ours_whatever_is_switched() -> None:
    driver = started()
    for path in (0, 1):
        assert driver.call(nvsp(129, path)) == b""
    assert not driver.guest.faults


def test_a_receive_buffer_of_another_number() -> None:
    driver = NetvscDriver()
    driver.open()
    driver.negotiate()
    handle, _ = driver.guest.make_gpadl(1, [(4096, 0, driver.guest.allocate(1))])
    driver.tell(nvsp(101, handle, 0xCAFF))
    assert "came as number 0xcaff" in fault_of(driver)


def test_a_section_without_a_send_buffer() -> None:
    driver = started()
    driver.tell(nvsp(106, 0))
    assert driver.adapter.state.send_buffer is None and not driver.guest.faults
    driver.tell(nvsp(107, 0, 0, 100))
    assert "has no send buffer" in fault_of(driver)


def test_a_receive_buffer_is_taken_back() -> None:
    driver = started()
    driver.tell(nvsp(103, 0xCAFE))
    assert driver.adapter.state.receive_buffer is None and not driver.guest.faults
    driver.wire.incoming.append(incoming(ethernet(0x1234, bytes(60), to=MAC)))
    assert not driver.adapter.readable() and driver.wire.incoming
    driver.channel.write(struct.pack("<II", 108, 1), packet_type=11, transaction_id=3)
    assert "without a receive buffer" in fault_of(driver)


def test_no_more_channels_than_queues_and_once_only() -> None:
    driver = started(queues=3)
    assert started(queues=4).open_subchannels(1) == 1, "no more than it asks for"
    assert driver.open_subchannels(7) == 2
    assert driver.adapter.state.subchannels == 2 and set(driver.send_table) == {0, 1, 2}
    driver.tell(nvsp(133, 1, 1))
    assert "sub-channels" in driver.guest.faults[0]


def test_a_sub_channel_is_for_frames() -> None:
    driver = started(queues=2)
    assert driver.open_subchannels(1) == 1
    driver.channels[1].write(nvsp(125, 1514, 0, 0, 0))
    assert driver.guest.faults == [
        "channel 2 (network adapter net0, channel 1) faulted: NVSP message 125 came on a "
        "sub-channel."
    ]


@pytest.mark.parametrize(
    ("position", "value", "sentence"),
    [
        (0, 9, "type 0x9"),
        (4, 20, "packet of 20 bytes"),
        (4, 5000, "packet of 5000 bytes"),
        (8, 4, "data at 4"),
        (8, 0xFFFFFFF0, "data at"),
        (12, 0xFFFFFFFF, "4294967295 bytes of data"),
        (20, 8, "out-of-band"),
        (28, 1000, "leaves the message"),
        (32, 0xFFFFFFFF, "per-packet information"),
        (44, 0, "of 0 bytes"),
        (44, 100, "of 100 bytes"),
        (52, 99, "value at 99"),
        (52, 16, "cut short"),
    ],
)
def test_messages_whose_inside_is_outside(position: int, value: int, sentence: str) -> None:
    driver = started()
    message = bytearray(rndis_packet(ethernet(0x1234, bytes(60)), (6, 0x10)))
    struct.pack_into("<I", message, position, value)
    driver.send(bytes(message))
    assert sentence in fault_of(driver)
    assert driver.wire.sent == []


def test_a_flood_of_questions_without_taking_answers() -> None:
    driver = started()
    for number in range(200):
        driver.send_control(struct.pack("<7I", 4, 28, number, 0x10114, 0, 20, 0))
        for packet in driver.channel.read():
            assert packet.type in (7, 11)
    assert "takes no answers" in fault_of(driver)
    assert driver.adapter.state.version is None
