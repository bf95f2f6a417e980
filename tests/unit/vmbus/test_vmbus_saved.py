"""A bus saved in the middle of its traffic goes on elsewhere, and a damaged one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.machine.model import HeartbeatStatus
from hvhost.partition.memory import GuestMemory
from hvhost.services.heartbeat import Heartbeat
from hvhost.vmbus.channel import ChannelDevice, ChannelState
from hvhost.vmbus.protocol import (
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    InitiateContact,
    OpenChannel,
    encode,
)
from hvhost.vmbus.saved import SavedBus
from hvhost.vmbus.server import VmbusServer
from simulated.devices import Echo, Recorder, an_offer
from simulated.driver import GuestChannel, GuestService, RecordingPort, SimulatedGuest

BIG = bytes(1000)


def a_guest(echoes: int = 2) -> SimulatedGuest:
    guest = SimulatedGuest()
    for number in range(1, echoes + 1):
        guest.server.add_device(Echo(guest.memory, an_offer(number)))
    guest.connect()
    return guest


def new_echoes(guest: SimulatedGuest) -> Callable[[GuestMemory], list[ChannelDevice]]:
    """The same devices on another host, each in the state it was in."""
    old = [channel.device for channel in guest.server.channels]
    return lambda memory: [
        Echo(memory, each.offer, replace(each.state)) for each in old if isinstance(each, Echo)
    ]


def answers(channel: GuestChannel) -> list[int]:
    return [packet.transaction_id for packet in channel.read()]


def test_traffic_goes_on_where_it_was_saved() -> None:
    """Nothing is lost, doubled or reordered: not in either ring, nor in the queue between."""
    guest = a_guest()
    channel = guest.open(1, out_pages=16, in_pages=3, scattered=True)
    sent = 0
    seen: list[int] = []
    for _ in range(40):
        while channel.write(BIG, transaction_id=sent):
            sent += 1
        seen += [packet.transaction_id for packet in channel.read(3)]
        assert guest.server.channels[0].queued, "the guest reads too slowly for this to be a test"
        guest.move_to_another_host(new_echoes(guest))
        assert guest.server.channels[0].is_open
    while more := answers(channel):
        seen += more
    assert seen == list(range(sent))
    assert sent > 100
    assert guest.faults == []
    echo = guest.server.channels[0].device
    assert isinstance(echo, Echo)
    assert echo.state.packets == sent, "its state went with it"


def test_what_was_sent_without_being_seen_is_taken() -> None:
    """A signal on its way when the machine was saved is not needed, nor is one for new room."""
    guest = a_guest()
    channel = guest.open(1)
    channel.write(b"unsignalled", transaction_id=7, signal=False)
    guest.move_to_another_host(new_echoes(guest))
    assert answers(channel) == [7]
    assert guest.port.interrupts[-1] == (0, 1)


def test_the_guest_closes_opens_and_moves_what_it_opened_elsewhere() -> None:
    guest = a_guest()
    guest.open(1)
    guest.open(2, vp=1)
    guest.move_to_another_host(new_echoes(guest))
    first, second = guest.server.channels
    assert (first.target_vp, second.target_vp) == (0, 1)
    assert guest.move(1, 1) == 0
    guest.close(1)
    assert first.state is ChannelState.CLOSED
    channel = guest.open(1)
    channel.write(b"again", transaction_id=1)
    assert answers(channel) == [1]
    guest.unload()
    assert {each.state for each in guest.server.channels} == {ChannelState.OFFERED}
    guest.connect()
    assert guest.faults == []


def test_a_page_list_is_finished_elsewhere() -> None:
    guest = a_guest(1)
    pfns = guest.allocate(40)
    data = (40 * 4096).to_bytes(4, "little") + bytes(4)
    data += b"".join(pfn.to_bytes(8, "little") for pfn in pfns)
    guest.post(GpadlHeader(1, 0x77, len(data), 1, data[:200]))
    guest.move_to_another_host(new_echoes(guest))
    guest.post(GpadlBody(0, 0x77, data[200:]))
    assert guest.reply(GpadlCreated) == GpadlCreated(1, 0x77, 0)
    guest.post(OpenChannel(1, 1, 0x77, 0, 20))
    assert guest.server.channels[0].is_open


@pytest.mark.parametrize("version", [0x20004, 0x40000, 0x50000, 0x50003])
def test_the_connection_is_the_one_that_was_made(version: int) -> None:
    guest = SimulatedGuest()
    guest.server.add_device(Echo(guest.memory))
    guest.negotiate(version, vp=1)
    guest.move_to_another_host(new_echoes(guest))
    assert guest.server.version == f"{version >> 16}.{version & 0xFFFF}"
    guest.request_offers()
    assert guest.port.messages[-1][0] == 1, "messages go to the VP it asked for"
    guest.open(1)
    guest.move_to_another_host(new_echoes(guest))
    assert guest.move(1, 1) == (0 if version == 0x50003 else None)
    guest.server.reset()
    guest.move_to_another_host(new_echoes(guest))
    assert guest.server.version is None
    guest.connect(version)


def test_faulted_and_rescinded_channels_stay_that() -> None:
    guest = a_guest(3)
    for number in (1, 2, 3):
        guest.open(number)
    guest.open_channels[1].write(b"refuse")
    guest.server.remove_device(guest.server.channels[1])
    before = len(guest.faults)
    guest.move_to_another_host(new_echoes(guest))
    states = {each.channel_id: each.state for each in guest.server.channels}
    assert states == {
        1: ChannelState.FAULTED,
        2: ChannelState.RESCINDED,
        3: ChannelState.OPEN,
        4: ChannelState.OFFERED,  # the new host has such a device, the guest still holds the old
    }
    assert len(guest.faults) == before
    assert guest.take_rescinds() == [2]
    assert sorted(guest.offers) == [1, 3, 4]
    guest.close(1)
    guest.open(1).write(b"good", transaction_id=4)
    assert answers(guest.open_channels[1]) == [4]


def test_devices_that_the_new_host_lacks_or_has_more() -> None:
    guest = a_guest(2)
    guest.open(1)
    guest.open(2)
    guest.move_to_another_host(
        lambda memory: [Echo(memory, an_offer(2)), Echo(memory, an_offer(3))]
    )
    assert guest.take_rescinds() == [1]
    assert sorted(guest.offers) == [2, 3]
    guest.open_channels[2].write(b"there", transaction_id=9)
    assert answers(guest.open_channels[2]) == [9]
    assert guest.faults == []


def test_a_service_beats_on() -> None:
    guest = SimulatedGuest()
    now = [0.0]
    heartbeat = Heartbeat(clock=lambda: now[0])
    guest.server.add_device(heartbeat)
    guest.connect()
    service = GuestService(guest.open(1), [(3, 0)])
    service.run()
    service.run()
    now[0] = 2.0
    heartbeat.tick(now[0])  # one is on its way
    moved = Heartbeat(state=heartbeat.state, clock=lambda: now[0])
    guest.move_to_another_host(lambda memory: [moved])
    assert service.run() == 1
    now[0] = 4.0
    moved.tick(now[0])
    assert service.run() == 1
    assert moved.status(now[0]) is HeartbeatStatus.OK
    assert guest.faults == []


# What is refused.


def saved_bus() -> tuple[SimulatedGuest, SavedBus]:
    guest = a_guest()
    guest.open(1)
    return guest, guest.server.save()


def restore(guest: SimulatedGuest, saved: SavedBus, *devices: ChannelDevice) -> VmbusServer:
    server = VmbusServer(guest.memory, RecordingPort(), on_event=lambda kind, detail: None)
    server.restore(saved, devices or [Echo(guest.memory, an_offer(n)) for n in (1, 2)])
    return server


def with_first(saved: SavedBus, **changes: Any) -> SavedBus:
    first, *others = saved.channels
    return replace(saved, channels=(replace(first, **changes), *others))


def with_rings(saved: SavedBus, **changes: Any) -> SavedBus:
    rings = saved.channels[0].rings
    assert rings is not None
    return with_first(saved, rings=replace(rings, **changes))


DAMAGE: dict[str, tuple[Callable[[SavedBus], SavedBus], str]] = {
    "a version nobody speaks": (lambda bus: replace(bus, version=0x50004), "327684 is not a valid"),
    "messages for no VP": (lambda bus: replace(bus, message_vp=1), "VP 1 does not exist"),
    "a channel for no VP": (lambda bus: with_first(bus, target_vp=1), "VP 1 does not exist"),
    "channel 0": (lambda bus: with_first(bus, channel_id=0), "channel 0 cannot be"),
    "channel 2048": (lambda bus: with_first(bus, channel_id=2048), "channel 2048 cannot be"),
    "a channel twice": (
        lambda bus: replace(bus, channels=bus.channels[:1] * 2),
        "channel 1 cannot be, or is there twice",
    ),
    "open without rings": (lambda bus: with_first(bus, rings=None), "contradict each other"),
    "open without pages": (lambda bus: with_first(bus, ring_gpadl=None), "contradict each other"),
    "rings of a closed channel": (
        lambda bus: with_first(bus, state=ChannelState.CLOSED),
        "contradict each other",
    ),
    "pages of nobody": (lambda bus: with_first(bus, ring_gpadl=1), "GPADL 0x1 is none of"),
    "a page list twice": (lambda bus: replace(bus, gpadls=bus.gpadls * 2), "exists already"),
    "a page list outside memory": (
        lambda bus: replace(
            bus, gpadls=(replace(bus.gpadls[0], data=bus.gpadls[0].data[:-8] + b"\xff" * 8),)
        ),
        "is not RAM",
    ),
    "half a page list": (
        lambda bus: replace(bus, gpadls=(replace(bus.gpadls[0], data=bus.gpadls[0].data[:-8]),)),
        "is none of channel 1",
    ),
    "no ring of the guest": (lambda bus: with_rings(bus, downstream=0), "starts at page 0"),
    "no ring of ours": (lambda bus: with_rings(bus, downstream=8), "starts at page 8"),
    "a read index behind the ring": (lambda bus: with_rings(bus, read_index=3 << 12), "read index"),
    "a negative read index": (lambda bus: with_rings(bus, read_index=-8), "read index"),
    "an odd write index": (lambda bus: with_rings(bus, write_index=4), "write index"),
    "a write index behind the ring": (
        lambda bus: with_rings(bus, write_index=3 << 12),
        "write index",
    ),
    "another offer": (
        lambda bus: with_first(bus, offer=replace(an_offer(1), mmio_megabytes=8)),
        "the guest knows another echo-1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(damage: str) -> None:
    guest, saved = saved_bus()
    assert restore(guest, saved).channels[0].is_open, "undamaged it is good"
    spoil, complaint = DAMAGE[damage]
    with pytest.raises(HvHostError, match=complaint) as caught:
        restore(guest, spoil(saved))
    sentence = str(caught.value)
    assert sentence.startswith("the saved state of the bus is damaged or of another machine: ")
    assert sentence.endswith("Start the machine anew.")


def test_a_device_that_cannot_go_on() -> None:
    guest, saved = saved_bus()
    with pytest.raises(HvHostError, match="has a device that cannot go on"):
        restore(guest, saved, Recorder(an_offer(1)), Echo(guest.memory, an_offer(2)))
    closed = with_first(saved, state=ChannelState.CLOSED, rings=None)
    assert len(restore(guest, closed, Recorder(an_offer(1))).channels) == 2


def test_only_a_new_bus_is_restored() -> None:
    guest, saved = saved_bus()
    with pytest.raises(LocalProtocolError, match="only a new bus"):
        guest.server.restore(saved, [])
    furnished = VmbusServer(guest.memory, RecordingPort(), on_event=lambda kind, detail: None)
    furnished.add_device(Echo(guest.memory, an_offer(3)))
    with pytest.raises(LocalProtocolError, match="only a new bus"):
        furnished.restore(saved, [])
    connected = VmbusServer(guest.memory, RecordingPort(), on_event=lambda kind, detail: None)
    connected.post_message(4, encode(InitiateContact(0x50003, 0, 2, 0, 0)))
    with pytest.raises(LocalProtocolError, match="only a new bus"):
        connected.restore(saved, [])


def test_saving_changes_nothing_and_two_savings_are_equal() -> None:
    guest, saved = saved_bus()
    assert guest.server.save() == saved
    assert restore(guest, saved).save() == saved, "nor does restoring"
