"""Time synchronization against a guest's hv_utils, good and bad; and the messages by themselves."""

from __future__ import annotations

import datetime
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.services.protocol import IcVersion
from hvhost.services.timesync import READINGS, TimeSync, read_clocks
from hvhost.services.timesync_protocol import (
    TIMESYNC_OFFER,
    TIMESYNC_VERSIONS,
    TimeSample,
    TimesyncFlags,
    host_time,
    timesync_body,
)
from hvhost.vmbus.channel import ChannelState
from simulated.driver import GuestService, SimulatedGuest

LINUX = [(4, 0), (3, 0), (1, 0)]
SYNC, SAMPLE = 1, 2


class Clock:
    """Time synchronization on a bus; the host's clock is the test's."""

    def __init__(self, versions: list[tuple[int, int]] = LINUX) -> None:
        self.guest = SimulatedGuest()
        self.host_clock = 1000
        self.device = TimeSync(lambda: TimeSample(self.host_clock, 77))
        self.host = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), versions)

    def boot(self) -> Clock:
        self.service.run()
        self.service.run()
        return self

    @property
    def flags(self) -> list[int]:
        return [body[16] for _, body in self.service.requests]


def test_the_clock_is_set_when_the_driver_opens_its_channel() -> None:
    clock = Clock()
    clock.device.tick(0.0)
    assert clock.service.run() == 1 and clock.service.run() == 1
    ((kind, body),) = clock.service.requests
    assert kind == 4
    assert struct.unpack("<QQBBB3x", body[:22]) == (1000, 77, SYNC, 0, 0)
    assert clock.device.ready and clock.service.run() == 0


@pytest.mark.parametrize("version", [(3, 0), (1, 0)])
def test_old_drivers_get_the_old_message(version: tuple[int, int]) -> None:
    clock = Clock([version]).boot()
    assert struct.unpack("<QQQB", clock.service.requests[0][1][:25]) == (1000, 0, 0, SYNC)
    assert clock.device.state.conversation.version == version


def test_a_guest_of_other_versions_is_told_no_time() -> None:
    clock = Clock([(9, 9)]).boot()
    clock.device.tick(100.0)
    assert clock.service.requests == [] and not clock.device.ready
    assert clock.host.state is ChannelState.OPEN and not clock.guest.faults


def test_ticks_bring_samples_and_never_set_the_clock() -> None:
    clock = Clock().boot()
    clock.service.requests.clear()
    for second in range(0, 3600, 2):
        clock.device.tick(float(second))
        clock.service.run()
    assert set(clock.flags) == {SAMPLE}
    assert len(clock.flags) == 600  # every third tick of two seconds


def test_a_clock_of_ticks_that_goes_back_stops_nothing() -> None:
    clock = Clock().boot()
    clock.device.tick(1000.0)
    clock.service.run()
    clock.device.tick(0.0)
    assert clock.service.run() == 1
    clock.device.tick(4.9)
    assert clock.service.run() == 0


def test_a_guest_that_does_not_answer_gets_one_sample() -> None:
    clock = Clock().boot()
    for second in range(0, 600, 2):
        clock.device.tick(float(second))
    assert clock.service.run() == 1
    clock.device.tick(600.0)
    assert clock.service.run() == 1


def test_a_sync_is_sent_at_once_and_its_answer_told() -> None:
    clock = Clock().boot()
    heard: list[bool] = []
    clock.host_clock = 5555
    clock.device.sync(heard.append)
    assert heard == []
    clock.service.run()
    assert heard == [True] and clock.flags[-1] == SYNC
    assert struct.unpack_from("<Q", clock.service.requests[-1][1])[0] == 5555
    clock.device.sync(heard.append)
    clock.service.run(status=0x80004005)
    assert heard == [True, False]


def test_a_sync_ends_with_its_channel() -> None:
    clock = Clock().boot()
    heard: list[bool] = []
    clock.device.sync(heard.append)
    clock.guest.close(1)
    assert heard == [False]
    with pytest.raises(HvHostError, match="no time synchronization driver"):
        clock.device.sync(heard.append)
    clock.service = GuestService(clock.guest.open(1), LINUX)
    clock.boot()
    assert clock.flags == [SYNC]  # a new driver is told the time at once


def test_a_sync_over_a_broken_ring_is_told() -> None:
    clock = Clock().boot()
    heard: list[bool] = []
    clock.service.channel.incoming.set_word(1, 4)
    clock.device.sync(heard.append)
    assert heard == [False] and clock.host.state is ChannelState.FAULTED


def test_a_hung_guest_is_not_flooded_with_syncs() -> None:
    clock = Clock().boot()
    with pytest.raises(HvHostError, match="has not answered"):
        for _ in range(100):
            clock.device.sync()
    assert clock.service.run() == 8
    clock.device.sync()


def test_samples_wait_while_the_guest_has_no_room() -> None:
    clock = Clock().boot()
    while not clock.host.queued:
        clock.host.send(bytes(200))
    clock.device.tick(0.0)
    assert clock.device.state.last_sample is None


def test_an_answer_to_nothing_faults_the_service() -> None:
    clock = Clock().boot()
    header = struct.pack("<IIHHHHHHIBBH", 1, 42, 3, 0, 4, 4, 0, 22, 0, 200, 5, 0)
    clock.service.channel.write(header + bytes(22))
    assert clock.host.state is ChannelState.FAULTED
    assert "answers no request" in clock.guest.faults[0]


# The messages, and reading the clocks.


def test_time_is_counted_from_1601() -> None:
    days = (datetime.date(1970, 1, 1) - datetime.date(1601, 1, 1)).days
    assert host_time(0) == days * 86400 * 10**7
    assert host_time(1_700_000_000_123_456_789) == host_time(0) + 17_000_000_001_234_567


@given(
    st.sampled_from(TIMESYNC_VERSIONS),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(TimesyncFlags),
)
def test_messages_lie_as_linux_reads_them(
    version: IcVersion, host: int, reference: int, flags: TimesyncFlags
) -> None:
    body = timesync_body(version, TimeSample(host, reference), flags)
    if version == (4, 0):
        assert struct.unpack("<QQBBB3s", body) == (host, reference, flags, 0, 0, bytes(3))
    else:
        assert struct.unpack("<QQQB", body) == (host, 0, 0, flags)


def test_the_offer_is_the_service() -> None:
    assert str(TIMESYNC_OFFER.interface_type) == "9527e630-d0ae-497b-adce-e80ab0175caf"


class FarClocks:
    """A counter that takes as long to reach as the test says, there and back."""

    def __init__(self, ways: list[tuple[float, float]]) -> None:
        self.ways = iter(ways)
        self.now = 50.0
        self.reads = 0

    def reference(self) -> int:
        there, back = next(self.ways)
        self.now += there
        value = round((self.now - 50.0) * 1e9)
        self.now += back
        self.reads += 1
        return value

    def read(self) -> TimeSample:
        return read_clocks(self.reference, lambda: round(self.now * 1e9), lambda: self.now)


@given(
    st.lists(
        st.tuples(st.floats(1e-5, 1e-2), st.floats(1e-5, 1e-2)),
        min_size=READINGS,
        max_size=READINGS,
    )
)
def test_both_clocks_are_read_as_close_together_as_can_be(ways: list[tuple[float, float]]) -> None:
    clocks = FarClocks(ways)
    sample = clocks.read()
    apart = (sample.host - host_time(50 * 10**9) - sample.reference) / 1e7
    assert abs(apart) <= sample.error + 1e-6
    assert sample.error == pytest.approx(min(sum(way) for way in ways) / 2, abs=1e-9)


def test_a_counter_close_by_is_read_once() -> None:
    clocks = FarClocks([(1e-6, 1e-6)] * READINGS)
    clocks.read()
    assert clocks.reads == 1
