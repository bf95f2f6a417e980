from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.chipset.pm import PM_BASE, attach_power_management
from hvhost.chipset.ports import PortBus


class Board:
    def __init__(self) -> None:
        self.bus = PortBus()
        self.sleeps: list[int] = []
        self.resets = 0
        self.power = attach_power_management(
            self.bus, on_sleep=self.sleeps.append, on_reset=self.on_reset
        )

    def on_reset(self) -> None:
        self.resets += 1


@pytest.fixture
def board() -> Board:
    return Board()


def test_enable_reads_back(board: Board) -> None:
    board.bus.write(PM_BASE + 2, 2, 0x0521)
    assert board.bus.read(PM_BASE + 2, 2) == 0x0521
    assert board.bus.read(PM_BASE, 4) == 0x05210000


def test_status_is_cleared_by_ones(board: Board) -> None:
    board.power.state.status = 0x0521
    board.bus.write(PM_BASE, 2, 0x0120)
    assert board.bus.read(PM_BASE, 2) == 0x0401


def test_machine_is_always_in_acpi_mode(board: Board) -> None:
    board.bus.write(PM_BASE + 4, 2, 0)
    assert board.bus.read(PM_BASE + 4, 2) == 1


@pytest.mark.parametrize("state", [4, 5])
def test_sleep(board: Board, state: int) -> None:
    board.bus.write(PM_BASE + 4, 2, state << 10)
    assert board.sleeps == []
    board.bus.write(PM_BASE + 4, 2, state << 10 | 1 << 13)
    assert board.sleeps == [state]
    assert board.bus.read(PM_BASE + 4, 2) == state << 10 | 1


def test_sleep_by_bytes(board: Board) -> None:
    board.bus.write(PM_BASE + 5, 1, (5 << 10 | 1 << 13) >> 8)
    assert board.sleeps == [5]


def test_what_is_written_behind_the_registers_is_lost(board: Board) -> None:
    board.bus.write(PM_BASE + 4, 4, (5 << 10 | 1 << 13) << 16)
    assert board.sleeps == [] and board.bus.read(PM_BASE + 4, 2) == 1


def test_reset_register(board: Board) -> None:
    board.bus.write(0xCF9, 1, 0x02)
    assert board.resets == 0
    assert board.bus.read(0xCF9, 1) == 0x02
    board.bus.write(0xCF9, 1, 0x06)
    assert board.resets == 1


def test_pci_configuration_is_nobody(board: Board) -> None:
    board.bus.write(0xCF8, 4, 0x80000000)
    assert board.bus.read(0xCF8, 4) == 0xFFFFFFFF
    assert board.bus.read(0xCFC, 4) == 0xFFFFFFFF
    assert board.resets == 0


def test_keyboard_controller_pulses_reset_only(board: Board) -> None:
    assert board.bus.read(0x64, 1) & 0x03 == 0  # Linux waits for these before it pulses
    board.bus.write(0x64, 1, 0xD1)
    assert board.resets == 0
    board.bus.write(0x64, 1, 0xFE)
    assert board.resets == 1


def test_port_61_names_no_nmi_reason_and_ends_waiting_loops(board: Board) -> None:
    board.bus.write(0x61, 1, 0xFF)
    first, second = board.bus.read(0x61, 1), board.bus.read(0x61, 1)
    assert first & 0xC0 == second & 0xC0 == 0
    assert first & second & 0x20
    assert (first ^ second) == 0x10
    assert first & 0x0F == 0x0F


def test_port_80_takes_anything(board: Board) -> None:
    board.bus.write(0x80, 1, 0x55)
    assert board.bus.read(0x80, 1) == 0


PORTS = st.sampled_from([*range(PM_BASE, PM_BASE + 7), 0x61, 0x64, 0x80, 0xCF9])


@given(st.lists(st.tuples(PORTS, st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))))
def test_any_write_keeps_registers_in_their_bits(writes: list[tuple[int, int, int]]) -> None:
    board = Board()
    for port, size, value in writes:
        board.bus.write(port, size, value & (1 << 8 * size) - 1)
        assert board.bus.read(port, size) < 1 << 8 * size
    state = board.power.state
    assert max(state.status, state.enable, state.control) <= 0xFFFF
    assert state.control & 1
    assert all(0 <= sleep <= 7 for sleep in board.sleeps)
