"""The whole way once: connect, open, heartbeats, shutdown, unload."""

from __future__ import annotations

import struct

from hvhost.machine.model import HeartbeatStatus, ShutdownAction
from hvhost.services.heartbeat import Heartbeat
from hvhost.services.shutdown import Shutdown
from simulated.driver import GuestService, SimulatedGuest


def test_a_guest_boots_answers_heartbeats_and_is_shut_down() -> None:
    guest = SimulatedGuest()
    statuses: list[HeartbeatStatus] = []
    replies: list[int] = []
    heartbeat = Heartbeat(on_status=statuses.append)
    shutdown = Shutdown(on_reply=replies.append)
    for device in (heartbeat, shutdown):
        guest.server.add_device(device)

    offers = guest.connect()
    assert guest.server.version == "5.3"
    assert guest.events == [("bus", "5.3")]
    assert [offer.if_type for offer in offers.values()] == [
        heartbeat.offer.interface_type,
        shutdown.offer.interface_type,
    ]
    pulse = GuestService(guest.open(1), [(3, 0), (1, 0)])
    power = GuestService(guest.open(2), [(3, 2), (3, 1), (3, 0), (1, 0)])
    assert pulse.run() == power.run() == 1  # negotiation
    assert heartbeat.ready and shutdown.ready and shutdown.can_hibernate
    assert statuses == [HeartbeatStatus.OK]
    assert pulse.run() == 1
    assert heartbeat.round_trip is not None and heartbeat.round_trip > 0

    done: list[list[float]] = []
    heartbeat.measure(100, done.append)
    while not done:
        assert pulse.run() == 1
    assert len(done[0]) == 100

    shutdown.request(ShutdownAction.REBOOT, reason="update")
    assert power.run() == 1
    kind, body = power.requests[-1]
    assert kind == 3
    assert struct.unpack_from("<III", body)[2] == 2 and body[12:].startswith(b"update\0")
    assert replies == [0]

    guest.unload()
    assert statuses == [HeartbeatStatus.OK, HeartbeatStatus.NO_DRIVER]
    assert guest.server.version is None and not guest.port.connected
    assert not guest.faults
