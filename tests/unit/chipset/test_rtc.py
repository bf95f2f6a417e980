from __future__ import annotations

from calendar import timegm
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.chipset.rtc import Rtc

TIME = (0, 2, 4, 6, 7, 8, 9, 0x32)
NOON = timegm((2024, 2, 29, 12, 34, 56))


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Guest:
    def __init__(self, now: float = NOON) -> None:
        self.clock = Clock(now)
        self.rtc = Rtc(self.clock)

    def read(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def write(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def registers(self) -> list[int]:
        return [self.read(index) for index in TIME]


def test_bcd_24_hours_by_default() -> None:
    assert Guest().registers() == [0x56, 0x34, 0x12, 5, 0x29, 0x02, 0x24, 0x20]  # a Thursday


def test_a_host_before_its_time_shows_the_first_second() -> None:
    assert Guest(-5.0).registers() == [0, 0, 0, 5, 1, 1, 0x70, 0x19]


def test_binary_mode() -> None:
    guest = Guest()
    guest.write(0x0B, 0x06)
    assert guest.registers() == [56, 34, 12, 5, 29, 2, 24, 20]


@pytest.mark.parametrize(
    ("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)]
)
def test_12_hour_mode(hour: int, shown: int) -> None:
    guest = Guest(timegm((2024, 1, 1, hour, 0, 0)))
    guest.write(0x0B, 0x00)
    assert guest.read(4) == shown
    guest.write(4, shown)  # writing back what was read changes nothing
    assert guest.rtc.state.offset == 0


def test_status_registers() -> None:
    guest = Guest()
    assert (guest.read(0x0A), guest.read(0x0B)) == (0x26, 0x02)
    assert (guest.read(0x0C), guest.read(0x0D)) == (0, 0x80)
    guest.write(0x0C, 0xFF)
    guest.write(0x0D, 0xFF)
    guest.write(0x0A, 0xA6)  # the update bit is read-only
    assert (guest.read(0x0A), guest.read(0x0C), guest.read(0x0D)) == (0x26, 0, 0x80)
    guest.write(0x0A, 0xF0)
    assert guest.read(0x0A) == 0x70


def test_update_in_progress_is_announced_and_ends() -> None:
    guest = Guest(NOON + 1 - 0.0001)
    assert guest.read(0x0A) & 0x80
    guest.clock.now = NOON + 1.0
    assert not guest.read(0x0A) & 0x80
    guest.clock.now = NOON + 0.5
    assert not guest.read(0x0A) & 0x80


def test_nvram_and_alarm_are_stored_and_bit_7_of_the_index_ignored() -> None:
    guest = Guest()
    for index in (1, 3, 5, 0x0F, 0x33, 0x7F):
        guest.write(index, index ^ 0x5A)
    for index in (1, 3, 5, 0x0F, 0x33, 0x7F):
        assert guest.read(index | 0x80) == index ^ 0x5A
    assert guest.rtc.read(0, 1) == 0xFF


def test_set_bit_freezes_the_clock_until_released() -> None:
    guest = Guest()
    guest.write(0x0B, 0x82)
    guest.clock.now += 100
    assert guest.registers()[0] == 0x56
    for index, value in zip(TIME, (0x01, 0x02, 0x03, 1, 0x04, 0x05, 0x30, 0x20), strict=True):
        guest.write(index, value)
    guest.clock.now += 100
    guest.write(0x0B, 0x02)
    guest.clock.now += 5
    assert guest.registers() == [0x06, 0x02, 0x03, 7, 0x04, 0x05, 0x30, 0x20]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 0x60),
        (2, 0x60),
        (4, 0x24),
        (4, 0x92),
        (7, 0x00),
        (7, 0x32),
        (8, 0x00),
        (8, 0x13),
        (0x32, 0x19),
    ],
)
def test_a_date_that_is_none_changes_nothing(index: int, value: int) -> None:
    guest = Guest()
    if index == 0x32:
        guest.write(9, 0x69)  # 2069, then 1969
        before = guest.registers()
        for century in (value, 0xFF):  # the year 16569
            guest.write(index, century)
            assert guest.registers() == before
        return
    guest.write(index, value)
    assert guest.rtc.state.offset == 0


MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1))


@given(MOMENTS, MOMENTS, st.sampled_from([0x00, 0x02, 0x04, 0x06]))
def test_what_a_guest_sets_it_reads(host: datetime, wanted: datetime, mode: int) -> None:
    reference = Guest(wanted.replace(tzinfo=UTC, microsecond=0).timestamp())
    reference.write(0x0B, mode)
    guest = Guest(host.replace(tzinfo=UTC).timestamp())
    guest.write(0x0B, mode | 0x80)
    for index, value in zip(TIME, reference.registers(), strict=True):
        guest.write(index, value)
    guest.write(0x0B, mode)
    assert guest.registers() == reference.registers()


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 0xFFFFFFFF)), max_size=60))
def test_any_writes_leave_a_working_clock(writes: list[tuple[int, int]]) -> None:
    guest = Guest()
    for offset, value in writes:
        guest.rtc.write(offset, 4, value)
        assert 0 <= guest.rtc.read(1, 1) <= 0xFF
