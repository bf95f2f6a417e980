"""Heartbeat and shutdown against a guest's hv_utils, good and bad."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.machine.model import HeartbeatStatus, ShutdownAction
from hvhost.services.heartbeat import UNANSWERED_LIMIT, Heartbeat
from hvhost.services.integration import Conversation, ConversationState, Phase
from hvhost.services.protocol import IcMessageType, IcVersion
from hvhost.services.shutdown import Shutdown
from hvhost.vmbus.channel import ChannelState
from simulated.driver import GuestService, SimulatedGuest

OK, NO_CONTACT, NO_DRIVER, CRASHED = (
    HeartbeatStatus.OK,
    HeartbeatStatus.NO_CONTACT,
    HeartbeatStatus.NO_DRIVER,
    HeartbeatStatus.CRASHED,
)


class Pulse:
    """A heartbeat on a bus, with a clock that the test moves."""

    def __init__(self) -> None:
        self.guest = SimulatedGuest()
        self.now = 100.0
        self.told: list[HeartbeatStatus] = []
        self.device = Heartbeat(clock=lambda: self.now, on_status=self.told.append)
        self.host = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), [(3, 0), (1, 0)])

    def boot(self) -> Pulse:
        self.service.run()  # negotiation
        self.service.run()  # the first heartbeat
        return self

    def wait(self, seconds: float = 2.0) -> HeartbeatStatus:
        self.now += seconds
        self.device.tick(self.now)
        return self.device.status(self.now)


# Heartbeat.


def test_a_guest_is_there_once_its_driver_negotiated() -> None:
    pulse = Pulse()
    assert pulse.device.status(pulse.now) is NO_DRIVER and not pulse.device.ready
    assert pulse.wait() is NO_DRIVER
    pulse.boot()
    assert pulse.device.ready and pulse.told == [OK]
    state = pulse.device.state.conversation
    assert (state.framework, state.version) == (IcVersion(3, 0), IcVersion(3, 0))
    for _ in range(5):
        assert pulse.wait() is OK
        assert pulse.service.run() == 1
    assert pulse.told == [OK]
    sequences = [struct.unpack_from("<Q", body)[0] for _, body in pulse.service.requests]
    assert sequences == [1, 2, 3, 4, 5, 6]


def test_a_hung_guest_is_lost_after_three_intervals_and_found_again() -> None:
    pulse = Pulse().boot()
    assert pulse.wait() is OK  # this one is not answered
    assert [pulse.wait() for _ in range(3)] == [OK, OK, NO_CONTACT]
    assert pulse.told == [OK, NO_CONTACT]
    assert pulse.device.status(pulse.now + 1) is NO_CONTACT
    pulse.service.run()
    assert pulse.told == [OK, NO_CONTACT, OK]
    assert pulse.wait() is OK


def test_status_knows_of_silence_between_ticks() -> None:
    pulse = Pulse().boot()
    for _ in range(3):
        pulse.wait()
    assert pulse.device.status(pulse.now) is OK
    assert pulse.device.status(pulse.now + 1.9) is OK
    assert pulse.device.status(pulse.now + 2.0) is NO_CONTACT


def test_time_nobody_ticked_is_not_held_against_the_guest() -> None:
    pulse = Pulse().boot()
    pulse.wait()
    assert pulse.wait(3600.0) is OK  # the machine was paused
    pulse.service.run()
    assert pulse.wait() is OK
    assert pulse.told == [OK]


def test_a_paused_machine_is_told_apart_and_not_held_against_the_guest() -> None:
    pulse = Pulse().boot()
    assert [pulse.wait() for _ in range(3)] == [OK, OK, OK]  # none of these is answered
    pulse.device.set_paused(True, pulse.now)
    assert pulse.device.status(pulse.now + 3600) is HeartbeatStatus.PAUSED
    pulse.now += 3600
    pulse.device.set_paused(False, pulse.now)
    assert pulse.device.status(pulse.now) is OK
    assert pulse.wait() is NO_CONTACT, "the silence before the pause still counts"
    pulse.service.run()
    assert pulse.told == [OK, HeartbeatStatus.PAUSED, OK, NO_CONTACT, OK]


def test_silence_between_a_tick_and_a_pause_counts() -> None:
    pulse = Pulse().boot()
    for _ in range(3):
        pulse.wait()
    assert pulse.device.status(pulse.now + 1.0) is OK
    pulse.device.set_paused(True, pulse.now + 1.0)
    pulse.now += 3600
    pulse.device.set_paused(False, pulse.now)
    assert pulse.device.status(pulse.now + 0.9) is OK
    assert pulse.device.status(pulse.now + 1.0) is NO_CONTACT


def test_a_clock_that_goes_back_harms_nothing() -> None:
    pulse = Pulse().boot()
    pulse.wait()
    assert pulse.wait(-50.0) is OK
    assert [pulse.wait() for _ in range(3)] == [OK, OK, NO_CONTACT]
    pulse.service.run()
    assert [pulse.wait() for _ in range(4)] == [OK, OK, OK, NO_CONTACT]


def test_a_hung_guest_is_not_flooded() -> None:
    pulse = Pulse().boot()
    for _ in range(100):
        pulse.wait()
    assert len(pulse.device.state.conversation.unanswered) == UNANSWERED_LIMIT
    assert pulse.service.run() == UNANSWERED_LIMIT
    assert pulse.wait() is OK and not pulse.guest.faults


def test_nothing_is_sent_while_the_ring_is_full() -> None:
    pulse = Pulse().boot()
    while not pulse.host.queued:
        pulse.host.send(bytes(1000))
    sent = pulse.device.state.sequence
    pulse.wait()
    assert pulse.device.state.sequence == sent


def test_the_round_trip_of_the_last_heartbeat_is_kept() -> None:
    pulse = Pulse()
    pulse.service.run()
    assert pulse.device.round_trip is None
    pulse.now += 0.25
    pulse.service.run()
    assert pulse.device.round_trip == 0.25


def test_a_crash_stays_until_a_new_driver_or_a_reset() -> None:
    pulse = Pulse().boot()
    pulse.device.set_crashed(True)
    assert pulse.device.status(pulse.now) is CRASHED
    pulse.guest.unload()  # the dying kernel says goodbye
    assert pulse.wait() is CRASHED
    pulse.guest.connect()
    pulse.service = GuestService(pulse.guest.open(1), [(3, 0)])
    pulse.boot()  # the kdump kernel
    assert pulse.wait() is OK
    pulse.device.set_crashed(True)
    pulse.guest.server.reset()
    pulse.device.set_crashed(False)
    assert pulse.told == [OK, CRASHED, OK, CRASHED, NO_DRIVER]


def test_heartbeats_are_measured_back_to_back() -> None:
    pulse = Pulse().boot()
    results: list[list[float]] = []
    pulse.device.measure(4, results.append)
    for step in (1.0, 2.0, 3.0, 4.0):
        assert results == []
        pulse.now += step
        pulse.device.tick(pulse.now)  # does not disturb
        assert pulse.service.run() == 1
    assert results == [[1.0, 2.0, 3.0, 4.0]]
    assert pulse.service.run() == 0
    pulse.device.measure(1, results.append)
    pulse.service.run()
    assert results[1] == [0.0]


def test_a_heartbeat_under_way_does_not_count_as_measured() -> None:
    pulse = Pulse().boot()
    pulse.wait()
    pulse.now += 5.0
    results: list[list[float]] = []
    pulse.device.measure(1, results.append)
    pulse.now += 1.0
    assert pulse.service.run() == 2
    assert results == [[1.0]]


def test_a_measurement_ends_with_its_channel() -> None:
    pulse = Pulse().boot()
    results: list[list[float]] = []
    pulse.device.measure(3, results.append)
    pulse.service.run()
    pulse.guest.close(1)
    assert results == [[0.0]]


def test_what_cannot_be_measured_is_said() -> None:
    pulse = Pulse()
    with pytest.raises(HvHostError, match="no heartbeat driver"):
        pulse.device.measure(1, print)
    pulse.boot()
    with pytest.raises(HvHostError, match="at least one"):
        pulse.device.measure(0, print)
    pulse.device.measure(5, lambda result: None)
    with pytest.raises(HvHostError, match="already"):
        pulse.device.measure(5, print)


def test_a_channel_that_faults_over_a_heartbeat_is_no_driver() -> None:
    pulse = Pulse().boot()
    results: list[list[float]] = []
    pulse.service.channel.incoming.set_word(1, 4)
    pulse.device.measure(3, results.append)
    assert pulse.host.state is ChannelState.FAULTED and results == [[]]
    assert pulse.wait() is NO_DRIVER


# Shutdown.


class Power:
    def __init__(self, versions: list[tuple[int, int]] | None = None) -> None:
        self.guest = SimulatedGuest()
        self.replies: list[int] = []
        self.device = Shutdown(on_reply=self.replies.append)
        self.host = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.service = GuestService(
            self.guest.open(1), versions or [(3, 2), (3, 1), (3, 0), (1, 0)]
        )
        self.service.run()


@pytest.mark.parametrize(
    ("ask", "flags"),
    [
        (lambda device: device.request(ShutdownAction.POWER_OFF), 0),
        (lambda device: device.request(ShutdownAction.POWER_OFF, force=True), 1),
        (lambda device: device.request(ShutdownAction.REBOOT), 2),
        (lambda device: device.request(ShutdownAction.REBOOT, force=True), 3),
        (lambda device: device.request_hibernation(), 4),
        (lambda device: device.request_hibernation(force=True), 5),
    ],
)
def test_the_guest_hears_what_is_asked(ask: Callable[[Shutdown], None], flags: int) -> None:
    power = Power()
    assert power.device.ready
    ask(power.device)
    power.service.run()
    ((kind, body),) = power.service.requests
    assert kind == 3 and len(body.rstrip(b"\0")) <= 2060
    assert struct.unpack_from("<III", body) == (0x80000000, 0, flags)
    assert power.replies == [0]


def test_a_refusal_is_passed_on() -> None:
    power = Power()
    power.device.request(ShutdownAction.POWER_OFF)
    power.service.run(status=0x80004005)
    assert power.replies == [0x80004005]
    power.device.request(ShutdownAction.POWER_OFF)  # and one may ask again


def test_a_long_reason_is_cut() -> None:
    power = Power()
    power.device.request(ShutdownAction.POWER_OFF, reason="ä" * 5000)
    power.service.run()
    text = power.service.requests[0][1][12:2060]
    assert text[:2047] == ("ä" * 5000).encode()[:2047] and text[2047] == 0


@pytest.mark.parametrize("version", [(3, 1), (3, 0), (1, 0)])
def test_old_drivers_are_not_asked_to_hibernate(version: tuple[int, int]) -> None:
    power = Power([version])
    assert power.device.ready and not power.device.can_hibernate
    with pytest.raises(HvHostError, match="does not know hibernation"):
        power.device.request_hibernation()


def test_a_driver_that_is_gone_knows_no_hibernation() -> None:
    power = Power()
    assert power.device.can_hibernate
    power.guest.server.reset()
    assert not power.device.can_hibernate


def test_a_guest_that_cannot_be_asked_is_said_so() -> None:
    guest = SimulatedGuest()
    device = Shutdown()
    guest.server.add_device(device)
    with pytest.raises(HvHostError, match="no shutdown driver"):
        device.request(ShutdownAction.REBOOT)
    with pytest.raises(HvHostError, match="no shutdown driver"):
        device.request_hibernation()
    power = Power()
    power.device.request(ShutdownAction.REBOOT)
    with pytest.raises(HvHostError, match="has not answered the last"):
        power.device.request(ShutdownAction.REBOOT)
    power.guest.close(1)
    assert not power.device.ready and not power.device.state.conversation.unanswered


# The conversation both have.


def test_a_guest_that_likes_no_version_is_no_driver_and_no_fault() -> None:
    for versions, frameworks in (([(9, 9)], [(3, 0)]), ([(3, 0)], [(9, 9)])):
        guest = SimulatedGuest()
        device = Heartbeat()
        guest.server.add_device(device)
        guest.connect()
        service = GuestService(guest.open(1), versions, frameworks)
        service.run()
        assert device.state.conversation.phase is Phase.REFUSED
        assert not device.ready and not guest.faults
        device.tick(0.0)
        assert service.run() == 0


def answer(pulse: Pulse, **changes: Any) -> None:
    """Answer the next message of the host, changed as a bad guest would."""
    (packet,) = pulse.service.channel.read()
    message = bytearray(packet.payload)
    message[25] = 5
    for offset, (code, value) in changes.pop("at", {}).items():
        struct.pack_into(code, message, offset, value)
    pulse.service.channel.write(bytes(message[: changes.pop("size", None)]), **changes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"at": {25: ("B", 3)}}, "answers no request"),
        ({"at": {24: ("B", 99)}}, "answers no request"),
        ({"at": {12: ("<H", 0)}}, "message 0 while ready"),
        ({"at": {12: ("<H", 3)}}, "message 3 while ready"),
        ({"at": {18: ("<H", 4)}}, "heartbeat was answered with 4 bytes"),
        ({"at": {18: ("<H", 1000)}}, "announces 1000 bytes"),
        ({"size": 24}, "message of 24 bytes is shorter"),
        ({"packet_type": 11}, "packet COMP"),
    ],
)
def test_a_wrong_answer_faults_the_service(change: dict[str, Any], why: str) -> None:
    pulse = Pulse()
    pulse.service.run()
    answer(pulse, **change)
    assert pulse.host.state is ChannelState.FAULTED
    assert len(pulse.guest.faults) == 1 and why in pulse.guest.faults[0]
    assert pulse.told[-1] is NO_DRIVER
    pulse.guest.close(1)
    pulse.service = GuestService(pulse.guest.open(1), [(3, 0)])
    pulse.boot()
    assert pulse.wait() is OK


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"at": {12: ("<H", 1)}}, "message 1 while negotiating"),
        (
            {"at": {28: ("<HHIHHHH", (1, 1, 0, 3, 0, 7, 7))}},
            "chose heartbeat 7.7 over framework 3.0, which was not offered",
        ),
        (
            {"at": {28: ("<HHIHHHH", (1, 1, 0, 7, 0, 3, 0))}},
            "chose heartbeat 3.0 over framework 7.0, which was not offered",
        ),
    ],
)
def test_a_wrong_choice_faults_the_service(change: dict[str, Any], why: str) -> None:
    pulse = Pulse()
    (packet,) = pulse.service.channel.read()
    message = bytearray(packet.payload)
    message[25] = 5
    for offset, (code, values) in change["at"].items():
        struct.pack_into(code, message, offset, *(values if type(values) is tuple else (values,)))
    pulse.service.channel.write(bytes(message))
    assert len(pulse.guest.faults) == 1 and why in pulse.guest.faults[0]
    assert not pulse.device.ready


def test_an_answer_counts_once() -> None:
    pulse = Pulse()
    pulse.service.run()
    (packet,) = pulse.service.channel.read()
    message = bytearray(packet.payload)
    message[25] = 5
    pulse.service.channel.write(bytes(message))
    assert not pulse.guest.faults
    pulse.service.channel.write(bytes(message))
    assert "answers no request" in pulse.guest.faults[0]


def test_transaction_numbers_are_bytes_and_not_used_twice() -> None:
    pulse = Pulse().boot()
    conversation = pulse.device._conversation
    conversation.state.last_transaction = 254
    conversation.state.unanswered = {255, 0, 2}
    assert [conversation.request(bytes(40)) for _ in range(2)] == [1, 3]
    conversation.state.unanswered = set(range(256))
    with pytest.raises(LocalProtocolError, match="no transaction number left"):
        conversation.request(bytes(40))


def test_requests_before_their_time_are_our_bug() -> None:
    conversation = Conversation(
        "x",
        IcMessageType.KVPEXCHANGE,
        [IcVersion(1, 0)],
        ConversationState(),
    )
    with pytest.raises(LocalProtocolError, match="not ready"):
        conversation.request(b"")
    conversation.state.phase = Phase.READY
    with pytest.raises(LocalProtocolError, match="no open channel"):
        conversation.request(b"")
    assert not conversation.blocked
