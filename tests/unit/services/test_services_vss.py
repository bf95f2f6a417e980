"""Snapshots against Linux's driver and daemon, simulated, and against bad ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.services.vss import (
    ANSWER_SECONDS,
    FREEZE_SECONDS,
    FROZEN_SECONDS,
    RETRY_SECONDS,
    Vss,
    VssAnswer,
)
from hvhost.services.vss_protocol import VssOperation, request_body
from simulated.driver import GuestService, SimulatedGuest

E_FAIL = 0x80004005
CHECK, FREEZE, THAW = VssOperation
Result = VssAnswer | HvHostError


class Daemon:
    """A guest with hv_utils and, while ``alive``, hv_vss_daemon."""

    def __init__(self) -> None:
        self.guest = SimulatedGuest()
        self.device = Vss()
        self.host = self.guest.server.add_device(self.device)
        self.alive = True
        self.frozen = False
        self.asked: list[int] = []
        self.load()

    def load(self) -> None:
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), [(5, 0)])
        self.service.run()

    def run(self) -> None:
        """Answer all there is."""
        while packets := self.service.channel.read():
            for packet in packets:
                message = bytearray(packet.payload)
                assert len(message) == 28 + 12
                operation = message[28]
                self.asked.append(operation)
                if operation != CHECK and self.alive:
                    self.frozen = operation == FREEZE
                struct.pack_into("<I", message, 20, 0 if self.alive else E_FAIL)
                message[25] = 5
                assert self.service.channel.write(
                    bytes(message), transaction_id=packet.transaction_id
                )

    def ask(self, operation: VssOperation) -> list[Result]:
        results: list[Result] = []
        self.device.request(operation, results.append)
        return results


def sentence(results: list[Result]) -> str:
    (result,) = results
    assert isinstance(result, HvHostError)
    return str(result)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


def test_check_freeze_and_thaw(daemon: Daemon) -> None:
    results = daemon.ask(CHECK)
    daemon.run()
    assert results == [VssAnswer(0)]
    results = daemon.ask(FREEZE)
    daemon.run()
    assert results == [VssAnswer(0)] and daemon.frozen and daemon.device.state.frozen
    results = daemon.ask(THAW)
    daemon.run()
    assert results == [VssAnswer(0)] and not daemon.frozen and not daemon.device.state.frozen


def test_without_a_driver_nothing_can_be_asked() -> None:
    with pytest.raises(HvHostError, match="hv_utils"):
        Vss().request(CHECK, lambda result: None)


def test_without_a_daemon_the_check_fails(daemon: Daemon) -> None:
    daemon.alive = False
    results = daemon.ask(CHECK)
    daemon.run()
    assert results == [VssAnswer(E_FAIL)]


def test_one_request_at_a_time(daemon: Daemon) -> None:
    daemon.ask(CHECK)
    with pytest.raises(HvHostError, match="HOT_BACKUP"):
        daemon.ask(FREEZE)


def test_a_guest_nobody_thaws_is_thawed(daemon: Daemon) -> None:
    daemon.ask(FREEZE)
    daemon.run()
    daemon.device.tick(100.0)
    daemon.device.tick(100.0 + FROZEN_SECONDS - 1)
    daemon.run()
    assert daemon.frozen
    daemon.device.tick(100.0 + FROZEN_SECONDS)
    daemon.run()
    assert not daemon.frozen and not daemon.device.state.frozen


def test_file_systems_that_freeze_for_nobody_are_thawed_at_once(daemon: Daemon) -> None:
    results: list[Result] = []
    done = results.append
    daemon.device.request(FREEZE, done)
    daemon.device.abandon(done)
    daemon.run()
    assert daemon.asked == [FREEZE, THAW] and not results
    assert not daemon.frozen and not daemon.device.state.frozen


def test_nobody_gives_up_for_others(daemon: Daemon) -> None:
    results = daemon.ask(FREEZE)
    daemon.device.abandon(lambda result: None)
    daemon.run()
    assert results == [VssAnswer(0)] and daemon.frozen


def test_a_channel_that_closes_over_a_thaw_that_nobody_waits_for(daemon: Daemon) -> None:
    daemon.ask(FREEZE)
    daemon.run()
    for seconds in (100.0, 100.0 + FROZEN_SECONDS):
        daemon.device.tick(seconds)
    daemon.guest.server.reset()
    assert not daemon.device.ready and daemon.device.state.frozen


def test_a_daemon_that_died_frozen_is_asked_again_until_another_thaws(daemon: Daemon) -> None:
    daemon.ask(FREEZE)
    daemon.run()
    daemon.alive = False
    results = daemon.ask(THAW)
    daemon.run()
    assert results == [VssAnswer(E_FAIL)]
    with pytest.raises(HvHostError, match="thawed first"):
        daemon.ask(FREEZE)
    for seconds in (0.0, RETRY_SECONDS):
        daemon.device.tick(seconds)
        daemon.run()
    assert daemon.asked == [FREEZE, THAW, THAW, THAW] and daemon.frozen
    daemon.alive = True
    daemon.device.tick(2 * RETRY_SECONDS)
    daemon.run()
    assert not daemon.frozen and not daemon.device.state.frozen
    daemon.device.tick(1000.0)
    daemon.run()
    assert len(daemon.asked) == 5


def test_a_daemon_that_died_while_it_froze_is_owed_a_thaw(daemon: Daemon) -> None:
    daemon.alive = False
    results = daemon.ask(FREEZE)
    daemon.run()
    assert results == [VssAnswer(E_FAIL)] and daemon.device.state.frozen


def test_a_thaw_that_failed_is_tried_again_in_its_time(daemon: Daemon) -> None:
    """Nobody waits for it: so not at once, as the one is that somebody asked for."""
    daemon.ask(FREEZE)
    daemon.run()
    daemon.alive = False
    for seconds in (0.0, FROZEN_SECONDS):
        daemon.device.tick(seconds)
    daemon.run()
    daemon.device.tick(FROZEN_SECONDS + RETRY_SECONDS - 1)
    daemon.run()
    assert daemon.asked == [FREEZE, THAW]
    daemon.device.tick(FROZEN_SECONDS + RETRY_SECONDS)
    daemon.run()
    assert daemon.asked == [FREEZE, THAW, THAW]


def test_whether_file_systems_are_frozen_is_known(daemon: Daemon) -> None:
    device = daemon.device
    assert not device.still_frozen
    daemon.ask(FREEZE)
    assert not device.still_frozen, "not yet"
    daemon.run()
    assert device.still_frozen
    daemon.ask(THAW)
    assert not device.still_frozen, "perhaps thawed by now"
    daemon.run()
    assert not device.still_frozen
    daemon.ask(FREEZE)
    daemon.run()
    daemon.guest.server.reset()
    assert not device.still_frozen, "another guest may run"


def test_a_freeze_that_comes_too_late_is_undone(daemon: Daemon) -> None:
    results = daemon.ask(FREEZE)
    daemon.device.tick(0.0)
    daemon.device.tick(FREEZE_SECONDS)
    assert "FREEZE within 60 seconds" in sentence(results)
    daemon.run()
    assert daemon.asked == [FREEZE, THAW] and not daemon.frozen
    assert not daemon.device.state.frozen and len(results) == 1


@pytest.mark.parametrize(
    ("operation", "seconds"), [(FREEZE, FREEZE_SECONDS), (CHECK, ANSWER_SECONDS)]
)
def test_each_request_has_its_time(daemon: Daemon, operation: VssOperation, seconds: float) -> None:
    results = daemon.ask(operation)
    for now in (7.0, 8.0, 7.0 + seconds - 0.1):
        daemon.device.tick(now)
    assert results == []
    daemon.device.tick(7.0 + seconds)
    assert f"did not answer {operation.name} within {seconds:g} seconds" in sentence(results)


def test_a_thaw_waits_for_a_driver(daemon: Daemon) -> None:
    daemon.ask(FREEZE)
    daemon.run()
    daemon.guest.close(1)
    for now in (0.0, FROZEN_SECONDS, 10 * FROZEN_SECONDS):
        daemon.device.tick(now)
    assert daemon.device.state.frozen and daemon.asked == [FREEZE]


def test_a_check_without_an_answer_is_given_up(daemon: Daemon) -> None:
    results = daemon.ask(CHECK)
    daemon.device.tick(5.0)
    daemon.device.tick(4.0 + ANSWER_SECONDS)
    assert not results
    daemon.device.tick(5.0 + ANSWER_SECONDS)
    assert "HOT_BACKUP within 40 seconds" in sentence(results)
    daemon.run()
    assert len(results) == 1 and not daemon.device.state.frozen


def test_a_channel_that_closes_ends_the_request_but_not_the_thaw(daemon: Daemon) -> None:
    results = daemon.ask(FREEZE)
    daemon.guest.server.reset()
    assert "went away" in sentence(results)
    daemon.guest = SimulatedGuest()
    daemon.guest.server.add_device(daemon.device)
    daemon.load()
    daemon.device.tick(0.0)
    daemon.run()
    assert daemon.asked == [THAW] and not daemon.device.state.frozen


@given(st.lists(st.sampled_from(["check", "freeze", "thaw", "run", "die", "live", "tick"])))
def test_whatever_happens_a_living_daemon_is_thawed_in_the_end(steps: list[str]) -> None:
    daemon, now, results, asked = Daemon(), 0.0, 0, 0
    for step in steps:
        if step in ("check", "freeze", "thaw"):
            operation = {"check": CHECK, "freeze": FREEZE, "thaw": THAW}[step]
            try:
                daemon.device.request(operation, lambda result: None)
                asked += 1
            except HvHostError:
                results += 1
        elif step == "run":
            daemon.run()
        elif step == "tick":
            now += 30.0
            daemon.device.tick(now)
        else:
            daemon.alive = step == "live"
    daemon.alive = True
    for _ in range(4):
        daemon.run()
        now += FROZEN_SECONDS
        daemon.device.tick(now)
    assert not daemon.frozen and not daemon.device.state.frozen
    assert asked + results == sum(step in ("check", "freeze", "thaw") for step in steps)


def test_requests_on_the_wire() -> None:
    assert request_body(FREEZE) == b"\5" + bytes(11)
