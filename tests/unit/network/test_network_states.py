"""What an adapter does when something changes: links, buffers, channels, a full wire or ring."""

from __future__ import annotations

import os
import struct

import pytest

from hvhost.network import frame
from hvhost.network.device import CONTROL_LIMIT
from hvhost.network.protocol import VRSS_CHANNEL_MAX
from hvhost.network.state import AdapterState
from hvhost.partition.memory import PAGE_SIZE
from hvhost.vmbus.channel import Channel, ChannelState
from simulated.driver import GuestPacket
from simulated.frames import ethernet
from simulated.netvsc import MAC, NO_OFFLOAD, PEER, SEND_SECTION, NetvscDriver, nvsp, rndis_packet

KEY = bytes(range(40))


def started(
    *,
    queues: int = 1,
    channels: int = 0,
    mtu: int = 1500,
    sections: int = 32,
    ring_pages: tuple[int, int] = (17, 5),
) -> NetvscDriver:
    """A driver that is ready, with so many sub-channels."""
    driver = NetvscDriver(queues=queues, sections=sections, ring_pages=ring_pages)
    driver.start(mtu=mtu)
    if channels:
        assert driver.open_subchannels(channels) == channels
    return driver


def number(value: int) -> bytes:
    """A frame of the guest's that can be told from others."""
    return ethernet(0x1234, bytes([value]) * 50)


def incoming(value: int = 0) -> bytes:
    return NO_OFFLOAD + ethernet(0x1234, bytes([value]) * 60, to=MAC, sender=PEER)


def sent(driver: NetvscDriver) -> list[bytes]:
    return [each[10:] for each in driver.wire.sent]


def interrupts(driver: NetvscDriver) -> list[int]:
    """The channels whose interrupts came, in order."""
    return [flag for _, flag in driver.guest.port.interrupts]


def complete(driver: NetvscDriver, packets: list[GuestPacket]) -> None:
    """The guest is done with frames and answers that it read."""
    for packet in packets:
        if packet.type == 7:
            driver.channel.write(
                struct.pack("<II", 108, 1), packet_type=11, transaction_id=packet.transaction_id
            )


# The link.


def test_a_link_that_stays_as_it_is_is_no_news() -> None:
    driver = started()
    before = interrupts(driver)
    driver.adapter.set_link(True)
    driver.read()
    assert driver.indications == [] and interrupts(driver) == before


def test_the_guest_is_interrupted_for_a_link_that_changes() -> None:
    driver = started()
    before = interrupts(driver)
    driver.adapter.set_link(False)
    assert interrupts(driver) == [*before, 1]
    driver.read()
    assert len(driver.indications) == 1


def test_a_guest_without_rndis_learns_of_the_link_when_it_asks() -> None:
    driver = NetvscDriver()
    driver.adapter.set_link(False)
    driver.start()
    assert driver.indications == []
    assert driver.query(0x00010114) == (0, struct.pack("<I", 1))


# From the wire.


def test_nothing_is_asked_of_the_wire_without_a_receive_buffer() -> None:
    driver = started()
    for chosen in (1, 0, 1):  # without a filter too: what comes is lost
        driver.set(0x1010E, struct.pack("<I", chosen))
        assert driver.wire.watching == (True, False)
    driver.tell(nvsp(103, 0xCAFE))  # REVOKE_RECV_BUF
    assert driver.wire.watching == (False, False)


def test_a_round_ends_and_the_next_goes_on() -> None:
    driver = started(sections=256)
    driver.wire.incoming.extend(incoming() for _ in range(130))
    before = len(interrupts(driver))
    assert driver.adapter.readable() and len(driver.wire.incoming) == 2
    assert len(interrupts(driver)) > before
    driver.read()
    before = len(interrupts(driver))
    assert not driver.adapter.readable() and not driver.wire.incoming
    assert len(interrupts(driver)) > before
    driver.read()
    assert len(driver.frames) == 130


def test_what_is_given_back_is_used_again() -> None:
    driver = started()
    driver.wire.incoming.extend(incoming() for _ in range(100))
    assert not driver.adapter.readable()
    assert driver.wire.watching == (False, False) and len(driver.wire.incoming) > 50
    complete(driver, driver.channel.read())
    assert driver.wire.watching == (True, False)
    driver.pull()
    assert not driver.wire.incoming


@pytest.mark.parametrize("channel", [0, 1])
def test_a_guest_that_does_not_empty_a_ring_gets_no_frames(channel: int) -> None:
    driver = started(queues=2, channels=1, ring_pages=(2, 2))
    transactions = [driver.send(rndis_packet(number(1)), channel=channel) for _ in range(100)]
    assert len(driver.wire.sent) == 100, "it may still send"
    assert driver.wire.watching == (False, False)
    driver.wire.incoming.append(incoming())
    assert not driver.adapter.readable() and driver.wire.incoming
    driver.read()
    driver.read()
    assert sorted(driver.completed[-100:]) == transactions
    assert driver.wire.watching == (True, False)
    assert len(driver.pull()) == 1


def test_a_ring_that_fills_while_frames_come_ends_the_round() -> None:
    driver = started(sections=256, ring_pages=(2, 2))
    for _ in range(55):  # of the 63 completions that there is room for
        driver.send(rndis_packet(number(1)))
    driver.wire.incoming.extend(incoming() for _ in range(200))
    assert not driver.adapter.readable(), "there is more, but no room in the ring"
    assert driver.wire.watching == (False, False) and driver.wire.incoming
    assert len(driver.pull()) == 200


def test_a_ring_that_breaks_while_frames_come_is_one_fault() -> None:
    driver = started(sections=256)
    driver.channel.incoming.set_word(1, 0xFFFFFFF0)
    driver.wire.incoming.extend(incoming() for _ in range(128))
    driver.adapter.readable()
    assert len(driver.guest.faults) == 1 and not driver.adapter.is_open
    assert not driver.adapter.readable()
    assert driver.wire.watching == (False, False)


# Control messages.


def test_an_answer_waits_for_a_receive_buffer() -> None:
    driver = NetvscDriver()
    driver.open()
    driver.negotiate()
    driver.send_control(struct.pack("<IIIIII", 2, 24, 1, 1, 0, 0x4000))
    assert [packet.type for packet in driver.channel.read()] == [11]
    pages = driver.guest.allocate(128)
    handle, _ = driver.guest.make_gpadl(1, [(128 * PAGE_SIZE, 0, pages)])
    driver.tell(nvsp(101, handle, 0xCAFE))
    assert [packet.type for packet in driver.channel.read()] == [11, 7]


def test_answers_wait_for_sections_up_to_a_limit() -> None:
    driver = started()
    question = struct.pack("<7I", 4, 28, 1, 0x10114, 0, 20, 0)
    packets: list[GuestPacket] = []
    for _ in range(driver.sections + CONTROL_LIMIT):
        driver.send_control(question)
        packets += driver.channel.read()
    answers = [packet for packet in packets if packet.type == 7]
    assert len(answers) == driver.sections and not driver.guest.faults
    complete(driver, answers[:3])
    more = driver.channel.read()
    assert [packet.type for packet in more] == [7] * 3
    for _ in range(3):
        driver.send_control(question)
    assert not driver.guest.faults
    driver.send_control(question)
    assert "takes no answers" in driver.guest.faults[0]


def test_a_receive_buffer_taken_back_takes_its_answers_along() -> None:
    driver = started()
    for _ in range(driver.sections + 5):
        driver.send_control(struct.pack("<7I", 4, 28, 1, 0x10114, 0, 20, 0))
        driver.channel.read()
    driver.tell(nvsp(103, 0xCAFE))
    driver.receive_pages = driver.guest.allocate(128)
    handle, _ = driver.guest.make_gpadl(1, [(128 * PAGE_SIZE, 0, driver.receive_pages)])
    driver.call(nvsp(101, handle, 0xCAFE))
    assert driver.answers == []
    assert driver.query(0x00010106) == (0, struct.pack("<I", 1500))


def test_a_control_message_has_a_largest_size() -> None:
    driver = started()
    keepalive = struct.pack("<III", 8, 8192, 7)
    driver.send_pages_of(keepalive.ljust(8192, b"\0"), kind=1)
    driver.read()
    assert struct.unpack_from("<III", driver.answers[-1]) == (0x80000008, 16, 7)
    driver.send_pages_of(struct.pack("<III", 8, 8200, 7).ljust(8200, b"\0"), kind=1)
    (fault,) = driver.guest.faults
    assert "8200 bytes came in 8192 bytes" in fault


def test_a_control_message_ends_where_its_packet_says() -> None:
    driver = started()
    driver.put(driver.send_pages, 0, struct.pack("<III", 8, 12, 7))
    driver.channel.write(nvsp(107, 1, 0, 12), flags=1, transaction_id=5)
    driver.read()
    assert struct.unpack_from("<III", driver.answers[-1]) == (0x80000008, 16, 7)
    driver.channel.write(nvsp(107, 1, 0, 8), flags=1, transaction_id=6)
    (fault,) = driver.guest.faults
    assert "12 bytes came in 8 bytes" in fault


def test_rndis_without_a_version_moves_no_frames() -> None:
    driver = NetvscDriver()
    driver.open()
    driver.send_control(struct.pack("<IIIIII", 2, 24, 1, 1, 0, 0x4000))
    assert driver.adapter.state.initialized
    driver.send_pages_of(rndis_packet(number(1)))
    (fault,) = driver.guest.faults
    assert "before RNDIS was initialised" in fault and driver.wire.sent == []


def test_rndis_may_be_reset_before_a_buffer_is_lent() -> None:
    driver = NetvscDriver()
    driver.open()
    driver.negotiate()
    driver.send_control(struct.pack("<IIIIII", 2, 24, 1, 1, 0, 0x4000))
    driver.send_control(struct.pack("<III", 6, 12, 0))
    assert not driver.guest.faults and driver.guest.server.channels[0].is_open


def test_a_request_without_an_answer_gets_none() -> None:
    driver = started()
    driver.send_control(struct.pack("<III", 3, 12, 7))  # HALT
    assert [packet.type for packet in driver.channel.read()] == [11]
    assert not driver.adapter.state.initialized and not driver.guest.faults


# To the wire.


def test_a_packet_of_nothing_is_completed() -> None:
    driver = started()
    driver.channel.write(nvsp(107, 0, 0xFFFFFFFF, 0), flags=1, transaction_id=77)
    driver.read()
    assert driver.completed[-1] == 77 and driver.wire.sent == [] and not driver.guest.faults
    driver.channel.write(nvsp(107, 1, 0xFFFFFFFF, 0), flags=1, transaction_id=78)
    (fault,) = driver.guest.faults
    assert "cut it short" in fault


def test_a_message_may_begin_in_a_section_and_end_in_pages() -> None:
    """As Linux sends what is too large for a section: headers copied, the rest where it is."""
    driver = started()
    data = ethernet(0x1234, os.urandom(1400))
    message = rndis_packet(data)
    driver.put(driver.send_pages, 2 * SEND_SECTION, message[:100] + b"not of it")
    (page,) = driver.guest.allocate(1)
    driver.guest.memory.write(page * PAGE_SIZE + 300, message[100:])
    driver.channel.write(
        nvsp(107, 0, 2, 100),
        packet_type=9,
        flags=1,
        transaction_id=5,
        header=struct.pack("<IIIIQ", 0, 1, len(message) - 100, 300, page),
    )
    assert sent(driver) == [data]


def test_a_frame_the_wire_refuses_is_not_overtaken() -> None:
    driver = started()
    send, refused = driver.wire.send, list[int]()

    def moody(buffers: list[bytes | bytearray | memoryview]) -> bool:
        if not refused:
            refused.append(1)
            return False
        return send(buffers)

    driver.wire.send = moody  # type: ignore[method-assign] # for this test
    frames = [number(value) for value in range(4)]
    driver.send(*map(rndis_packet, frames))
    assert sent(driver) == []
    driver.adapter.writable()
    assert sent(driver) == frames


def test_a_full_wire_holds_all_channels_back_until_it_took_all() -> None:
    driver = started(queues=2, channels=1)
    later: list[Channel] = []
    driver.adapter.process_later = later.append
    driver.wire.takes = 0
    frames = [number(value) for value in range(4)]
    first = driver.send(*map(rndis_packet, frames[:2]))
    others = [
        driver.send(rndis_packet(frames[2]), section=1, channel=1),
        driver.send(rndis_packet(frames[3]), section=2),
    ]
    assert driver.wire.watching == (True, True)
    driver.wire.takes = 1
    driver.adapter.writable()
    driver.read()
    assert sent(driver) == frames[:1] and first not in driver.completed and not later
    assert driver.wire.watching == (True, True)
    driver.wire.takes = 100
    before = len(interrupts(driver))
    driver.adapter.writable()
    assert sent(driver) == frames[:2] and len(later) == 2
    assert driver.wire.watching == (True, False) and len(interrupts(driver)) > before
    driver.read()
    assert driver.completed[-1] == first
    for channel in later:
        channel.process()
    driver.read()
    assert sorted(sent(driver)) == frames and sorted(driver.completed[-2:]) == others


def test_a_send_buffer_taken_back_takes_its_frames_along() -> None:
    """They are completed; the guest may go on with pages of its own."""
    driver = started()
    driver.wire.takes = 0
    driver.put(driver.send_pages, 0, rndis_packet(number(1)))
    size = len(rndis_packet(number(1)))
    driver.channel.write(nvsp(107, 0, 0, size), flags=1, transaction_id=5, signal=False)
    driver.channel.write(nvsp(106, 0), signal=False)
    driver.channel.signal()
    driver.read()
    assert driver.completed[-1] == 5 and 0 not in driver.completed
    assert driver.adapter.state.send_buffer is None
    assert driver.wire.watching == (True, False), "the wire will not say that it takes more"
    driver.wire.takes = 100
    driver.send_pages_of(rndis_packet(number(2)))
    driver.adapter.writable()
    assert sent(driver) == [number(2)]


# Sub-channels.


def test_a_sub_channel_s_frames_are_completed_there() -> None:
    driver = started(queues=2, channels=1)
    transaction = driver.send(rndis_packet(number(1)), channel=1)
    assert interrupts(driver)[-1] == 2
    assert [packet.transaction_id for packet in driver.channels[1].read()] == [transaction]
    assert not driver.channel.read()


def test_the_first_channel_goes_on_when_a_full_wire_s_other_one_closes() -> None:
    driver = started(queues=2, channels=1)
    driver.wire.takes = 0
    driver.send(rndis_packet(number(1)), channel=1)
    second = driver.send(rndis_packet(number(2)), section=1)
    later: list[Channel] = []
    driver.adapter.process_later = later.append
    del driver.channels[1]
    driver.guest.close(2)
    assert driver.wire.watching == (True, False) and len(later) == 1
    driver.wire.takes = 100
    driver.adapter.writable()
    for channel in later:
        channel.process()
    assert sent(driver) == [number(2)], "what the closed one had waiting is not sent"
    driver.read()
    assert driver.completed[-1] == second


def test_a_full_wire_still_holds_back_when_an_idle_sub_channel_closes() -> None:
    driver = started(queues=2, channels=1)
    driver.wire.takes = 0
    driver.send(rndis_packet(number(1)))
    driver.send(rndis_packet(number(2)), section=1)
    later: list[Channel] = []
    driver.adapter.process_later = later.append
    del driver.channels[1]
    driver.guest.close(2)
    assert driver.wire.watching == (True, True) and not later
    driver.wire.takes = 100
    driver.adapter.writable()
    assert sent(driver) == [number(1)] and len(later) == 1
    later[0].process()
    assert sent(driver) == [number(1), number(2)]


def test_a_sub_channel_opened_again_hears_nothing_of_earlier_packets() -> None:
    driver = started(queues=2, channels=1)
    channel = driver.channels.pop()
    driver.put(driver.send_pages, 0, rndis_packet(number(1)))
    size = len(rndis_packet(number(1)))
    channel.write(nvsp(107, 0, 0, size), flags=1, transaction_id=5, signal=False)
    channel.write(nvsp(125, 1514, 0, 0, 0), signal=False)
    channel.signal()
    assert driver.guest.server.channels[1].state is ChannelState.FAULTED
    driver.guest.close(2)
    driver.channels.append(driver.guest.open(2, out_pages=5, in_pages=5, vp=1))
    driver.send(rndis_packet(number(2)))
    assert driver.channels[1].read() == []


def test_a_flow_of_a_closed_sub_channel_comes_on_the_first() -> None:
    driver = started(queues=2, channels=1)
    assert driver.set_rss([1] * 128, KEY) == 0
    data = ethernet(0x0800, bytes.fromhex("4500002800010000400600000a0000010a000002"), to=MAC)
    driver.wire.incoming.append(NO_OFFLOAD + data.ljust(60, b"\0"))
    before = interrupts(driver)
    driver.adapter.readable()
    assert interrupts(driver) == [*before, 2]
    assert [each.channel for each in driver.pull()] == [1]
    del driver.channels[1]
    driver.guest.close(2)
    driver.wire.incoming.append(NO_OFFLOAD + data.ljust(60, b"\0"))
    assert [each.channel for each in driver.pull()] == [0]


@pytest.mark.parametrize(
    ("version", "table"), [(0x40000, []), (0x50000, [0, 1] * 8), (0x60001, [0, 1] * 8)]
)
def test_a_table_of_channels_is_for_versions_that_know_it(version: int, table: list[int]) -> None:
    driver = NetvscDriver(queues=2)
    driver.open()
    assert driver.negotiate(version) == version
    driver.configure()
    driver.lend_buffers()
    assert driver.open_subchannels(1) == 1
    assert driver.send_table == table


def test_one_channel_alone_needs_no_table() -> None:
    driver = started()
    assert driver.open_subchannels(3) == 0
    assert driver.send_table == [] and len(driver.guest.offers) == 1


@pytest.mark.parametrize(("queues", "most"), [(0, 1), (1, 1), (1000, VRSS_CHANNEL_MAX)])
def test_an_adapter_has_one_channel_to_as_many_as_there_can_be(queues: int, most: int) -> None:
    driver = NetvscDriver(queues=queues)
    assert driver.adapter.queues == most
    driver.start()
    answer = struct.unpack_from("<3I", driver.call(nvsp(133, 1, 1000)))
    assert answer == (133, 1, most - 1)


# Beginning, and beginning anew.


@pytest.mark.parametrize("mtu", [68, 1500, 9000, 65521])
def test_a_guest_s_mtu_is_its_adapters(mtu: int) -> None:
    driver = started(mtu=mtu)
    assert driver.query(0x00010106) == (0, struct.pack("<I", mtu))


def test_the_largest_mtu() -> None:
    driver = started(mtu=65521, sections=64)
    data = ethernet(0x1234, os.urandom(65521), to=MAC, sender=PEER)
    driver.wire.incoming.append(NO_OFFLOAD + data)
    (received,) = driver.pull()
    assert received.data == data and received.fragments == 1


@pytest.mark.parametrize(
    ("lowest", "highest", "version", "status"),
    [
        (0x2, 0x60001, 0x60001, 1),
        (0x30002, 0x50000, 0x50000, 1),
        (0x50001, 0x5FFFF, 0, 7),
        (0x60001, 0x2, 0, 7),
    ],
)
def test_the_newest_version_that_both_speak(
    lowest: int, highest: int, version: int, status: int
) -> None:
    """Linux looks at the status alone."""
    driver = NetvscDriver()
    driver.open()
    answer = struct.unpack_from("<4I", driver.call(nvsp(1, lowest, highest)))
    assert (answer[0], answer[1], answer[3]) == (2, version, status)


def test_the_mtu_stays_while_the_receive_buffer_is_lent() -> None:
    """Its sections are made for it; Linux and FreeBSD tell it first, and begin anew for another."""
    driver = NetvscDriver()
    driver.open()
    driver.negotiate()
    driver.configure(1500)
    driver.configure(1400)
    driver.lend_buffers()
    assert driver.adapter.state.mtu == 1400
    driver.tell(nvsp(103, 0xCAFE))
    driver.configure(9000)
    assert driver.adapter.state.mtu == 9000 and not driver.guest.faults
    pages = driver.guest.allocate(1) * 128
    driver.call(nvsp(101, driver.guest.make_gpadl(1, [(1 << 19, 0, pages)])[0], 0xCAFE))
    driver.tell(nvsp(125, 1514, 0, 0, 0))
    (fault,) = driver.guest.faults
    assert "changes its MTU with its receive buffer lent" in fault


def test_closing_forgets_what_the_guest_set() -> None:
    """It may be another kernel that opens the channel next."""
    driver = started(queues=2, channels=1, mtu=9000)
    assert driver.set_rss([1] * 128, KEY) == 0
    assert driver.set(0x1010103, bytes.fromhex("01005e000001")) == 0
    driver.wire.takes = 0
    driver.send(rndis_packet(number(1)))
    driver.guest.close(1)
    state = driver.adapter.state
    assert state == AdapterState(MAC, counters=state.counters)
    assert driver.wire.watching == (False, False) and not driver.adapter.is_open
    driver.wire.takes = 100
    driver.adapter.writable()
    assert driver.wire.sent == []


def test_a_channel_opened_again_hears_nothing_of_earlier_packets() -> None:
    driver = started()
    for _ in range(driver.sections + 5):  # five answers find no room
        driver.send_control(struct.pack("<7I", 4, 28, 1, 0x10114, 0, 20, 0))
        driver.channel.read()
    driver.put(driver.send_pages, 0, rndis_packet(number(1)))
    size = len(rndis_packet(number(1)))
    driver.channel.write(nvsp(107, 0, 0, size), flags=1, transaction_id=5, signal=False)
    driver.channel.write(nvsp(999), signal=False)
    driver.channel.signal()
    assert driver.guest.server.channels[0].state is ChannelState.FAULTED
    driver.guest.close(1)
    driver.completed.clear()
    driver.start()
    driver.send(rndis_packet(number(2)))
    driver.read()
    assert 5 not in driver.completed and driver.answers == []
    assert sent(driver)[-1] == number(2)


def test_sizes_of_frames_that_are_sent() -> None:
    driver = started()
    for size in (14, frame.FRAME_LIMIT):
        data = ethernet(0x1234, os.urandom(size - 14))
        driver.send_pages_of(rndis_packet(data))
        assert sent(driver)[-1] == data
