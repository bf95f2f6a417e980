"""The bus: connections, offers, opening, moving, rescinding, unloading, and what is refused."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

import pytest

from hvhost.errors import LocalProtocolError
from hvhost.partition.memory import PAGE_SIZE
from hvhost.vmbus import server as server_module
from hvhost.vmbus.channel import Channel, ChannelState, Offer
from hvhost.vmbus.protocol import (
    AllOffersDelivered,
    CloseChannel,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTeardown,
    GpadlTorndown,
    GuestMessage,
    HostMessage,
    InitiateContact,
    ModifyChannel,
    OfferChannel,
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    RequestOffers,
    RescindChannelOffer,
    TlConnectRequest,
    TlConnectResult,
    Unload,
    UnloadResponse,
    VersionResponse,
    encode,
)
from simulated.devices import Echo, Recorder, an_offer
from simulated.driver import SimulatedGuest

ACCEPTED = [0x20004, 0x30000, 0x40000, 0x40001, 0x50000, 0x50001, 0x50002, 0x50003]
REFUSED = [0, 0xD, 0x10001, 0x20003, 0x30001, 0x50004, 0x60000, 0xFFFFFFFF]


def with_echo(count: int = 1, *, connected: bool = True) -> tuple[SimulatedGuest, list[Channel]]:
    guest = SimulatedGuest()
    channels = [
        guest.server.add_device(Echo(guest.memory, an_offer(number + 1))) for number in range(count)
    ]
    if connected:
        guest.connect()
    return guest, channels


def echoes(guest: SimulatedGuest, relid: int) -> bool:
    """The channel works: a packet comes back."""
    channel = guest.open_channels[relid]
    channel.read()
    channel.write(b"works?", transaction_id=4711)
    return [packet.transaction_id for packet in channel.read()] == [4711]


# Connecting.


@pytest.mark.parametrize("version", ACCEPTED)
def test_versions_this_host_speaks_are_accepted(version: int) -> None:
    guest, _ = with_echo(connected=False)
    assert guest.negotiate(version, vp=1)
    (vp, response) = guest.port.messages[-1]
    assert isinstance(response, VersionResponse)
    assert (vp, response.connection_state) == (1, 0)
    assert response.msg_conn_id == (4 if version >= 0x50000 else 1)
    assert guest.server.version == f"{version >> 16}.{version & 0xFFFF}"
    assert guest.events == [("bus", guest.server.version)]
    guest.request_offers()
    guest.open(1)
    assert echoes(guest, 1)


@pytest.mark.parametrize("version", REFUSED)
def test_other_versions_are_refused_and_the_guest_may_try_again(version: int) -> None:
    guest, _ = with_echo(connected=False)
    assert not guest.negotiate(version)
    assert guest.server.version is None and guest.events == []
    assert guest.negotiate(0x40000)


def test_linux_and_freebsd_agree_on_their_way_down() -> None:
    for versions, agreed in (
        ([0x60000, 0x50003, 0x50002], "5.3"),
        ([0x40000, 0x30000, 0x20004, 0x10001], "4.0"),
    ):
        guest, _ = with_echo(connected=False)
        assert next(v for v in versions if guest.negotiate(v))
        assert guest.server.version == agreed


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (InitiateContact(0x50003, 2, 2, 0, 0), "VP 2, which does not exist"),
        (InitiateContact(0x40000, 0xFFFFFFFF, 2, 0, 0), "VP 4294967295, which does not exist"),
        (InitiateContact(0x50003, 0, 3, 0, 0), "SINT 3 of VTL 0"),
        (InitiateContact(0x50000, 0, 0x0202, 0, 0), "SINT 2 of VTL 2"),
    ],
)
def test_a_connection_we_cannot_serve_is_refused(message: InitiateContact, why: str) -> None:
    guest, _ = with_echo(connected=False)
    guest.post(message)
    assert guest.port.messages == [(0, VersionResponse(0))]
    assert guest.server.version is None
    assert len(guest.faults) == 1 and why in guest.faults[0]


def test_an_old_guests_interrupt_page_is_no_sint() -> None:
    guest, _ = with_echo(connected=False)
    guest.post(InitiateContact(0x40000, 0, 0x7000, 0x8000, 0x9000), connection_id=1)
    assert guest.server.version == "4.0"


def test_a_new_contact_ends_the_last_connection() -> None:
    guest, (channel,) = with_echo()
    guest.open(1)
    guest.connect(0x40000)
    assert channel.state is ChannelState.OFFERED and not guest.port.connected
    guest.open(1)
    assert echoes(guest, 1) and not guest.faults


# Posting.


@pytest.mark.parametrize("connection_id", [1, 4, 0x01000004])
def test_messages_come_by_either_connection(connection_id: int) -> None:
    guest, _ = with_echo(connected=False)
    contact = encode(InitiateContact(0x50003, 0, 2, 0, 0))
    assert guest.server.post_message(connection_id, contact) == 0
    assert guest.server.version == "5.3"


@pytest.mark.parametrize("connection_id", [0, 2, 3, 5, 0x2001, 0x100, 0xFFFFFFFF])
def test_other_connections_do_not_exist(connection_id: int) -> None:
    guest, _ = with_echo(connected=False)
    contact = encode(InitiateContact(0x50003, 0, 2, 0, 0))
    assert guest.server.post_message(connection_id, contact) == 0x12
    assert guest.server.signal(connection_id) == 0x12
    assert guest.server.version is None


def test_a_message_is_not_longer_than_a_synic_message() -> None:
    guest, _ = with_echo(connected=False)
    contact = encode(InitiateContact(0x50003, 0, 2, 0, 0))
    assert guest.server.post_message(4, contact.ljust(241, b"\0")) == 5
    assert guest.server.version is None
    assert guest.server.post_message(4, contact.ljust(240, b"\0")) == 0
    assert guest.server.version == "5.3"


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "shorter than its own header"),
        (bytes(8), "type 0 is unknown"),
        (b"\x12" + bytes(239), "type 18 is unknown"),
        (encode(OpenChannel(1, 1, 1, 0, 1))[:60], "OpenChannel needs 140 bytes"),
        (encode(UnloadResponse()), "UNLOAD_RESPONSE is for hosts to send"),
        (encode(RequestOffers()), "asked for offers twice"),
        (encode(CloseChannel(9)), "offered no channel 9"),
        (encode(GpadlHeader(9, 1, 16, 1, bytes(16))), "offered no channel 9"),
        (encode(GpadlBody(0, 77, bytes(8))), "GPADL 0x4d came without a header"),
        (encode(GpadlTeardown(1, 77)), "GPADL 0x4d, which channel 1 does not have"),
        (encode(OpenChannel(9, 1, 1, 0, 1)), "offered no channel 9"),
        (encode(RelidReleased(9)), "offered no channel 9"),
        (encode(ModifyChannel(9, 0)), "offered no channel 9"),
    ],
)
def test_a_wrong_message_is_one_log_line_and_harms_nobody(
    payload: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    guest, channels = with_echo(2)
    guest.open(2)
    with caplog.at_level(logging.INFO):
        assert guest.server.post_message(4, payload) == 0
    assert [record.getMessage() for record in caplog.records] == guest.faults
    assert len(guest.faults) == 1 and why in guest.faults[0]
    assert echoes(guest, 2)
    assert channels[0].state is ChannelState.OFFERED


@pytest.mark.parametrize(
    "message",
    [
        RequestOffers(),
        Unload(),
        CloseChannel(1),
        GpadlHeader(1, 1, 16, 1, bytes(16)),
        GpadlBody(0, 1),
        GpadlTeardown(1, 1),
        OpenChannel(1, 1, 1, 0, 1),
        ModifyChannel(1, 0),
        RelidReleased(1),
        TlConnectRequest(uuid.UUID(int=1), uuid.UUID(int=2)),
    ],
)
def test_nothing_happens_without_a_connection(message: GuestMessage) -> None:
    guest, (channel,) = with_echo(connected=False)
    guest.post(message)
    assert guest.port.messages == []
    assert len(guest.faults) == 1 and "without a connection" in guest.faults[0]
    assert channel.state is ChannelState.OFFERED


def test_a_guest_cannot_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_module, "MAX_VIOLATIONS", 5)
    guest, _ = with_echo()
    for _ in range(20):
        guest.server.post_message(4, bytes(8))
    assert len(guest.faults) == 5 == len(caplog.records)
    assert guest.faults[-1].endswith("This was the last one to be reported.")


# Offers.


def test_an_offer_says_what_the_device_is() -> None:
    guest = SimulatedGuest()
    offer = Offer(
        interface_type=uuid.UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"),
        interface_instance=uuid.UUID(int=7),
        name="scsi",
        flags=1,
        user_defined=bytes(range(120)),
        mmio_megabytes=64,
        sub_channel_index=2,
        is_dedicated_interrupt=False,
    )
    guest.server.add_device(Recorder(offer))
    guest.server.add_device(Recorder())
    assert guest.connect()[1] == OfferChannel(
        if_type=offer.interface_type,
        if_instance=offer.interface_instance,
        reserved1=0,
        reserved2=0,
        chn_flags=1,
        mmio_megabytes=64,
        user_def=bytes(range(120)),
        sub_channel_index=2,
        reserved3=0,
        child_relid=1,
        monitorid=0,
        monitor_allocated=0,
        is_dedicated_interrupt=0,
        connection_id=0x2001,
    )
    assert guest.offers[2].is_dedicated_interrupt == 1
    kinds = [type(message) for _, message in guest.port.messages]
    assert kinds == [VersionResponse, OfferChannel, OfferChannel, AllOffersDelivered]


def test_a_device_added_later_is_offered_at_once() -> None:
    guest, _ = with_echo()
    before = len(guest.port.messages)
    guest.server.add_device(Echo(guest.memory, an_offer(2)))
    assert len(guest.port.messages) == before + 1, "the first is known already"
    guest.collect_offers()
    guest.open(2)
    assert echoes(guest, 2)


def test_a_device_added_before_offers_were_asked_for_is_offered_once() -> None:
    guest, _ = with_echo(connected=False)
    guest.negotiate()
    guest.server.add_device(Echo(guest.memory, an_offer(2)))
    assert sorted(guest.request_offers()) == [1, 2]
    assert len(guest.port.messages) == 4


def test_what_cannot_be_offered_is_our_bug() -> None:
    guest, (channel,) = with_echo()
    with pytest.raises(LocalProtocolError, match="on the bus already"):
        guest.server.add_device(Recorder())
    bad = an_offer(2)
    with pytest.raises(LocalProtocolError, match="7 user-defined bytes"):
        guest.server.add_device(
            Recorder(Offer(bad.interface_type, bad.interface_instance, "x", 0, bytes(7)))
        )
    guest.server.remove_device(channel)
    with pytest.raises(LocalProtocolError, match="not on the bus"):
        guest.server.remove_device(channel)


def test_the_bus_has_room_for_2047_devices() -> None:
    guest = SimulatedGuest()
    for number in range(1, 2048):
        assert guest.server.add_device(Recorder(an_offer(number))).channel_id == number
    with pytest.raises(LocalProtocolError, match="the bus is full"):
        guest.server.add_device(Recorder(an_offer(2048)))
    guest.connect()
    assert len(guest.offers) == 2047
    assert len({offer.connection_id for offer in guest.offers.values()}) == 2047
    assert [channel.channel_id for channel in guest.server.channels] == list(range(1, 2048))


def test_a_device_of_another_bus_is_not_removed() -> None:
    _, (channel,) = with_echo()
    with pytest.raises(LocalProtocolError, match="not on the bus"):
        with_echo()[0].server.remove_device(channel)
    assert channel.state is ChannelState.OFFERED


def test_a_channel_is_unknown_to_the_guest_until_it_is_offered() -> None:
    guest, (channel,) = with_echo(connected=False)
    guest.negotiate()
    assert guest.make_gpadl(1, [(PAGE_SIZE, 0, guest.allocate(1))])[1]
    guest.post(CloseChannel(1))
    assert guest.faults == ["the guest was offered no channel 1."] * 2
    assert channel.state is ChannelState.OFFERED


# Opening and closing.


@pytest.mark.parametrize("scattered", [False, True])
def test_a_channel_can_be_opened_closed_and_opened_again(scattered: bool) -> None:
    guest, (channel,) = with_echo()
    for _ in range(3):
        guest.open(1, out_pages=3, in_pages=5, scattered=scattered)
        assert channel.is_open and echoes(guest, 1)
        guest.close(1)
        assert channel.state is ChannelState.CLOSED and not guest.port.connected
    device = channel.device
    assert isinstance(device, Echo) and (device.opens, device.closes) == (3, 3)
    assert not guest.faults


def test_rings_may_be_large_enough_for_many_messages() -> None:
    guest, _ = with_echo()
    guest.open(1, out_pages=100, in_pages=80)
    assert echoes(guest, 1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m, h: OpenChannel(1, 5, h + 1, 0, 4), "is none of channel 1"),
        (lambda m, h: OpenChannel(1, 5, h, 0, 0), "starts at page 0 of 8"),
        (lambda m, h: OpenChannel(1, 5, h, 0, 8), "starts at page 8 of 8"),
        (lambda m, h: OpenChannel(1, 5, h, 0, 0xFFFFFFFF), "starts at page 4294967295"),
        (lambda m, h: OpenChannel(1, 5, h, 0, 1), "1 pages has no room"),
        (lambda m, h: OpenChannel(1, 5, h, 0, 7), "1 pages has no room"),
        (lambda m, h: OpenChannel(1, 5, h, 2, 4), "VP 2 does not exist, there are 2"),
    ],
)
def test_a_channel_that_cannot_be_opened_is_refused(
    change: Callable[[SimulatedGuest, int], OpenChannel], why: str
) -> None:
    guest, channels = with_echo(2)
    guest.open(2)
    pfns = guest.allocate(8)
    handle, _ = guest.make_gpadl(1, [(8 * PAGE_SIZE, 0, pfns)])
    guest.post(change(guest, handle))
    assert guest.reply(OpenChannelResult) == OpenChannelResult(1, 5, 0xC0000001)
    assert len(guest.faults) == 1 and why in guest.faults[0]
    assert channels[0].state is ChannelState.FAULTED
    assert echoes(guest, 2)
    guest.open(1)  # after a mistake, once more
    assert echoes(guest, 1)


def test_the_page_list_of_another_channel_is_no_ring() -> None:
    guest, _ = with_echo(2)
    handle, _ = guest.make_gpadl(2, [(8 * PAGE_SIZE, 0, guest.allocate(8))])
    guest.post(OpenChannel(1, 1, handle, 0, 4))
    assert guest.reply(OpenChannelResult).status
    assert "is none of channel 1" in guest.faults[0]


def test_opening_twice_faults_the_channel_until_it_is_closed() -> None:
    guest, (channel,) = with_echo()
    first = guest.open(1)
    guest.post(OpenChannel(1, 1, first.gpadl, 0, 4))
    assert guest.reply(OpenChannelResult).status
    assert channel.state is ChannelState.FAULTED and "opened it twice" in guest.faults[0]
    guest.post(OpenChannel(1, 1, first.gpadl, 0, 4))
    assert guest.reply(OpenChannelResult).status and len(guest.faults) == 2
    guest.close(1)
    guest.open(1)
    assert echoes(guest, 1)


def test_closing_what_is_not_open_faults_the_channel() -> None:
    guest, (channel,) = with_echo()
    for _ in range(2):
        guest.post(CloseChannel(1))
    assert channel.state is ChannelState.FAULTED and len(guest.faults) == 2


def test_indices_left_in_the_ring_by_the_guest_are_checked_when_it_opens() -> None:
    guest, (channel,) = with_echo()
    pfns = guest.allocate(8)
    guest.memory.write(pfns[0] * PAGE_SIZE + 4, (0x4000).to_bytes(4, "little"))
    handle, _ = guest.make_gpadl(1, [(8 * PAGE_SIZE, 0, pfns)])
    guest.post(OpenChannel(1, 1, handle, 0, 4))
    assert guest.reply(OpenChannelResult).status
    assert channel.state is ChannelState.FAULTED and not guest.port.connected


# GPADLs.


@pytest.mark.parametrize(
    ("ranges", "why"),
    [
        ([(PAGE_SIZE, 0, [1 << 40])], "is not RAM"),
        ([(PAGE_SIZE, 0, [])], "needs 1 page numbers"),
        ([], "announces 0 ranges"),
        ([(PAGE_SIZE, 0, [1]), (64 * PAGE_SIZE, 0, [2] * 63 + [255 + 1])], "is not RAM"),
    ],
)
def test_a_wrong_page_list_faults_its_channel(
    ranges: list[tuple[int, int, list[int]]], why: str
) -> None:
    guest, channels = with_echo(2)
    guest.open(2)
    assert guest.make_gpadl(1, ranges)[1] == 0xC0000001
    assert channels[0].state is ChannelState.FAULTED
    assert len(guest.faults) == 1 and why in guest.faults[0]
    assert echoes(guest, 2)


def test_a_page_list_continues_after_mistakes_of_others() -> None:
    guest, _ = with_echo()
    data = b"".join(
        [(30 * PAGE_SIZE).to_bytes(8, "little"), *(n.to_bytes(8, "little") for n in range(1, 31))]
    )
    guest.post(GpadlHeader(1, 5, len(data), 1, data[:200]))
    guest.post(GpadlBody(0, 6, bytes(8)))
    assert guest.replies(GpadlCreated) == []
    guest.post(GpadlBody(0, 5, data[200:]))
    assert guest.reply(GpadlCreated) == GpadlCreated(1, 5, 0)
    guest.post(GpadlBody(0, 5, bytes(8)))
    assert guest.reply(GpadlCreated) == GpadlCreated(1, 5, 0xC0000001)
    assert [("0x6" in fault, "not waiting" in fault) for fault in guest.faults] == [
        (True, False),
        (False, True),
    ]


def test_taking_the_ring_away_from_an_open_channel_stops_it() -> None:
    guest, (channel,) = with_echo()
    opened = guest.open(1)
    guest.post(GpadlTeardown(1, opened.gpadl))
    assert guest.reply(GpadlTorndown).gpadl == opened.gpadl
    assert channel.state is ChannelState.FAULTED and not guest.port.connected
    assert "took the ring buffer away" in guest.faults[0]


def test_other_page_lists_of_an_open_channel_may_go() -> None:
    guest, _ = with_echo()
    guest.open(1)
    handle, status = guest.make_gpadl(1, [(PAGE_SIZE, 0, guest.allocate(1))])
    assert status == 0
    guest.post(GpadlTeardown(1, handle))
    assert guest.reply(GpadlTorndown).gpadl == handle
    assert echoes(guest, 1) and not guest.faults


def test_a_page_list_is_torn_down_by_its_own_channel_only() -> None:
    guest, channels = with_echo(2)
    opened = guest.open(1)
    guest.post(GpadlTeardown(2, opened.gpadl))
    assert guest.replies(GpadlTorndown) == []
    assert channels[0].is_open and echoes(guest, 1)


# Moving.


@pytest.mark.parametrize(("version", "answer"), [(0x40001, None), (0x50002, None), (0x50003, 0)])
def test_a_channel_moves_to_another_processor(version: int, answer: int | None) -> None:
    guest, (channel,) = with_echo(connected=False)
    guest.connect(version)
    opened = guest.open(1)
    for vp in (1, 0):
        assert guest.move(1, vp) == answer
        guest.port.interrupts.clear()
        opened.write(b"where?")
        assert guest.port.interrupts == [(vp, 1)] and channel.target_vp == vp


def test_a_channel_opens_on_the_processor_it_names() -> None:
    guest, _ = with_echo()
    guest.open(1, vp=1).write(b"")
    assert guest.port.interrupts == [(1, 1)]


def test_moving_where_it_cannot_is_refused() -> None:
    guest, channels = with_echo(2)
    assert guest.move(1, 0) == 0xC0000001 and "not open" in guest.faults[-1]
    guest.open(2)
    assert guest.move(2, 2) == 0xC0000001 and "VP 2 does not exist" in guest.faults[-1]
    assert guest.move(7, 0) == 0xC0000001 and "offered no channel" in guest.faults[-1]
    assert [channel.state for channel in channels] == [ChannelState.FAULTED] * 2


def test_old_versions_know_no_moving() -> None:
    guest, (channel,) = with_echo(connected=False)
    guest.connect(0x40000)
    guest.open(1)
    assert guest.move(1, 1) is None
    assert channel.target_vp == 0 and "from VMBus 4.1" in guest.faults[0]


# Rescinding.


def test_a_device_can_be_removed_while_in_use_and_come_back() -> None:
    guest, (channel,) = with_echo()
    guest.open(1)
    guest.server.remove_device(channel)
    assert channel.state is ChannelState.RESCINDED and not guest.port.connected
    again = guest.server.add_device(Echo(guest.memory))
    assert again.channel_id == 2
    assert guest.replies(OfferChannel) == []  # Linux drops an offer it believes to have
    assert guest.take_rescinds() == [1]
    assert channel.state.value == "released"
    assert list(guest.offers) == [2]
    guest.open(2)
    assert echoes(guest, 2) and not guest.faults
    assert guest.server.channels == (again,)


def test_page_lists_of_a_removed_device_are_forgotten() -> None:
    guest, (channel,) = with_echo()
    guest.open(1)
    guest.server.remove_device(channel)
    guest.take_rescinds()
    assert len(guest.server._gpadls) == 0


def test_a_device_the_guest_never_saw_leaves_without_a_word() -> None:
    guest, (channel,) = with_echo(connected=False)
    guest.server.remove_device(channel)
    assert guest.server.channels == () and channel.state is ChannelState.RELEASED
    assert guest.port.messages == []


def test_messages_that_crossed_a_rescind_are_no_mistakes() -> None:
    guest, (channel,) = with_echo()
    guest.open(1)
    guest.server.remove_device(channel)
    handle, status = guest.make_gpadl(1, [(8 * PAGE_SIZE, 0, guest.allocate(8))])
    assert status == 0
    guest.post(OpenChannel(1, 9, handle, 0, 4))
    assert guest.reply(OpenChannelResult) == OpenChannelResult(1, 9, 0xC0000001)
    assert guest.move(1, 1) == 0
    guest.post(CloseChannel(1))
    assert guest.move(1, 0) == 0
    guest.post(GpadlTeardown(1, handle))
    guest.post(RelidReleased(1))
    assert not guest.faults and guest.server.channels == ()


def test_releasing_an_open_channel_faults_it() -> None:
    guest, (channel,) = with_echo()
    guest.open(1)
    guest.post(RelidReleased(1))
    assert channel.state is ChannelState.FAULTED and "released it" in guest.faults[0]


def test_a_guest_may_decline_an_offer() -> None:
    guest, (channel,) = with_echo()
    guest.make_gpadl(1, [(PAGE_SIZE, 0, guest.allocate(1))])
    guest.post(RelidReleased(1))
    assert channel.state is ChannelState.OFFERED and not guest.faults
    assert len(guest.server._gpadls) == 0
    guest.connect()
    guest.open(1)
    assert echoes(guest, 1)


def test_violations_on_a_rescinded_channel_are_reported_and_change_nothing() -> None:
    guest, (channel,) = with_echo()
    guest.server.remove_device(channel)
    guest.post(CloseChannel(1))
    assert channel.state is ChannelState.RESCINDED
    assert guest.faults == ["channel 1 (echo-1): the guest closed it without having opened it."]


# The end.


def ends(guest: SimulatedGuest, how: str) -> None:
    if how == "unload":
        guest.unload()
    elif how == "contact":
        assert not guest.negotiate(0x60000)
    else:
        guest.server.reset()


@pytest.mark.parametrize("how", ["unload", "contact", "reset"])
def test_the_end_of_a_connection_leaves_everything_as_at_the_start(how: str) -> None:
    guest, channels = with_echo(4)
    guest.open(1)
    guest.open(2).write(b"refuse")
    guest.open(3)
    guest.close(3)
    guest.open(4)
    guest.server.remove_device(channels[3])
    waiting = guest.server.add_device(Echo(guest.memory, an_offer(4)))
    ends(guest, how)
    assert guest.server.version is None and not guest.port.connected
    assert guest.server.channels == (*channels[:3], waiting)
    assert {channel.state for channel in guest.server.channels} == {ChannelState.OFFERED}
    assert channels[3].state is ChannelState.RELEASED
    for channel in channels:
        assert isinstance(channel.device, Echo)
        assert channel.device.opens == channel.device.closes
    guest.connect()
    assert sorted(guest.offers) == [1, 2, 3, 5]
    for relid in guest.offers:
        guest.open(relid)
        assert echoes(guest, relid)


@pytest.mark.parametrize("how", ["unload", "contact", "reset"])
def test_a_device_that_takes_others_along_may_do_so_at_the_end(how: str) -> None:
    """As an adapter does with its sub-channels."""
    guest = SimulatedGuest()
    others: list[Channel] = []

    class Adapter(Echo):
        def closed(self) -> None:
            super().closed()
            guest.server.remove_device(others.pop())

    adapter = guest.server.add_device(Adapter(guest.memory, an_offer(1)))
    others.append(guest.server.add_device(Echo(guest.memory, an_offer(2))))
    guest.connect()
    guest.open(1)
    guest.open(2)
    ends(guest, how)
    assert guest.server.channels == (adapter,) and not guest.faults
    guest.connect()
    assert list(guest.offers) == [1]


def test_an_unload_is_answered_where_the_guest_asked() -> None:
    guest, _ = with_echo(connected=False)
    guest.negotiate(vp=1)
    guest.post(Unload())
    assert guest.port.messages[-1] == (1, UnloadResponse())


def test_a_reset_says_nothing_to_the_guest() -> None:
    guest, _ = with_echo()
    guest.open(1)
    before = list(guest.port.messages)
    guest.server.reset()
    assert guest.port.messages == before


@pytest.mark.parametrize(("version", "answers"), [(0x40000, 0), (0x40001, 1), (0x50003, 1)])
def test_sockets_are_refused_while_nobody_listens(version: int, answers: int) -> None:
    guest, _ = with_echo(connected=False)
    guest.connect(version)
    guest.post(TlConnectRequest(uuid.UUID(int=1), uuid.UUID(int=2)))
    results: list[HostMessage] = list(guest.replies(TlConnectResult))
    assert results == [TlConnectResult(uuid.UUID(int=1), uuid.UUID(int=2), 0xC0000236)] * answers


def test_sockets_that_are_listened_for_are_not_refused() -> None:
    guest, _ = with_echo()
    asked: list[tuple[uuid.UUID, uuid.UUID]] = []

    def accept(endpoint: uuid.UUID, service: uuid.UUID) -> bool:
        asked.append((endpoint, service))
        return True

    guest.server.on_connect = accept
    guest.post(TlConnectRequest(uuid.UUID(int=1), uuid.UUID(int=2)))
    assert asked == [(uuid.UUID(int=1), uuid.UUID(int=2))]
    assert guest.replies(TlConnectResult) == []


def test_rescinds_are_posted_to_guests_who_know_the_offer() -> None:
    guest, (channel,) = with_echo()
    guest.server.remove_device(channel)
    assert guest.port.messages[-1] == (0, RescindChannelOffer(1))
