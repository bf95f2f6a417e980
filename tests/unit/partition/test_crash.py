from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.machine.model import CrashReport
from hvhost.partition.crash import (
    CRASH_MSR_COUNT,
    HV_CRASH_CTL_CRASH_NOTIFY,
    HV_CRASH_CTL_CRASH_NOTIFY_MSG,
    HV_X64_MSR_CRASH_CTL,
    HV_X64_MSR_CRASH_P0,
    MAXIMUM_REPORTS,
    CrashRegisters,
)
from hvhost.partition.memory import GuestMemory, MemoryRegion

SIZE = 0x3000
BOTH = HV_CRASH_CTL_CRASH_NOTIFY | HV_CRASH_CTL_CRASH_NOTIFY_MSG


class Guest:
    def __init__(self) -> None:
        self.backing = bytearray(SIZE)
        self.reports: list[CrashReport] = []
        memory = GuestMemory([MemoryRegion(0, memoryview(self.backing))])
        self.msrs = CrashRegisters(memory, self.reports.append)

    def crash(self, parameters: tuple[int, ...], control: int = BOTH) -> CrashReport:
        for index, value in enumerate(parameters):
            assert self.msrs.write(HV_X64_MSR_CRASH_P0 + index, value)
        assert self.msrs.write(HV_X64_MSR_CRASH_CTL, control)
        return self.reports[-1]


def test_the_text_is_read_where_the_guest_says() -> None:
    guest = Guest()
    guest.backing[0x1000:0x1010] = b"Kernel panic: x\0"
    report = guest.crash((1, 2, 3, 0x1000, 15))
    assert report.text == "Kernel panic: x"
    assert report.parameters == (1, 2, 3, 0x1000, 15)
    assert 0 <= report.seconds < 60


def test_text_ends_at_a_zero() -> None:
    guest = Guest()
    guest.backing[0x1000:0x1008] = b"abc\0def\xff"
    assert guest.crash((0, 0, 0, 0x1000, 8)).text == "abc"


def test_text_need_not_be_text() -> None:
    guest = Guest()
    guest.backing[0:4] = b"\xff\xfeab"
    assert guest.crash((0, 0, 0, 0, 4)).text == "\ufffd\ufffdab"


def test_a_crash_without_text() -> None:
    guest = Guest()
    guest.backing[0:4] = b"text"
    assert guest.crash((9, 8, 7, 0, 4), HV_CRASH_CTL_CRASH_NOTIFY).text is None


def test_control_bits_that_are_no_crash() -> None:
    guest = Guest()
    assert guest.msrs.write(HV_X64_MSR_CRASH_CTL, HV_CRASH_CTL_CRASH_NOTIFY_MSG)
    assert not guest.reports


@pytest.mark.parametrize("length", [4097, 1 << 32, (1 << 64) - 1])
def test_text_is_at_most_a_page(length: int) -> None:
    guest = Guest()
    guest.backing[:] = b"a" * SIZE
    text = guest.crash((0, 0, 0, 0, length)).text
    assert text == "a" * 4096


@pytest.mark.parametrize("address", [SIZE - 3, SIZE, 1 << 40, (1 << 64) - 1])
def test_text_outside_memory_is_none(address: int) -> None:
    assert Guest().crash((0, 0, 0, address, 4)).text is None


def test_registers_read_back() -> None:
    guest = Guest()
    for index in range(5):
        assert guest.msrs.read(HV_X64_MSR_CRASH_P0 + index) == 0
        guest.msrs.write(HV_X64_MSR_CRASH_P0 + index, 100 + index)
    assert [guest.msrs.read(HV_X64_MSR_CRASH_P0 + i) for i in range(5)] == [*range(100, 105)]
    assert guest.msrs.read(HV_X64_MSR_CRASH_CTL) == BOTH, "what a guest asks before it sends text"


@pytest.mark.parametrize("msr", [HV_X64_MSR_CRASH_P0 - 1, HV_X64_MSR_CRASH_P0 + CRASH_MSR_COUNT])
def test_other_registers_are_not_ours(msr: int) -> None:
    guest = Guest()
    assert guest.msrs.read(msr) is None
    assert not guest.msrs.write(msr, 1)


def test_a_guest_that_crashes_for_ever() -> None:
    guest = Guest()
    for number in range(10 * MAXIMUM_REPORTS):
        guest.crash((number, 0, 0, 0, 0))
    assert len(guest.reports) == MAXIMUM_REPORTS


U64 = st.integers(0, 2**64 - 1)


@given(
    st.lists(st.tuples(st.integers(HV_X64_MSR_CRASH_P0 - 1, HV_X64_MSR_CRASH_CTL + 1), U64)),
    st.one_of(st.integers(0, SIZE + 9), U64),
    st.one_of(st.integers(0, 5000), U64),
)
def test_any_writes(writes: list[tuple[int, int]], address: int, length: int) -> None:
    guest = Guest()
    guest.backing[:] = b"b" * SIZE
    for msr, value in writes:
        known = 0 <= msr - HV_X64_MSR_CRASH_P0 < CRASH_MSR_COUNT
        assert guest.msrs.write(msr, value) == known
    report = guest.crash((0, 0, 0, address, length))
    length = min(length, 4096)
    assert report.text == ("b" * length if address + length <= SIZE else None)
