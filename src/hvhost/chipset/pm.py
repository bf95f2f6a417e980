"""ACPI power management, reset, and the few legacy ports a kernel pokes at without asking.

No PM timer is announced: guests have the hypervisor's reference time, and a timer that costs an
exit per read would only tempt them. Source: ACPI specification 6.5, 4.8.3 (PM1 event and control
registers) and 4.8.3.6 (reset register).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hvhost.chipset.ports import PortBus

PM_BASE = 0x600
PM1_EVENT_LENGTH = 4
PM1_CONTROL_OFFSET = 4
PM1_CONTROL_LENGTH = 2
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
KEYBOARD_CONTROLLER_PORT = 0x64
KEYBOARD_CONTROLLER_PULSE_RESET = 0xFE
SYSTEM_CONTROL_PORT_B = 0x61
DELAY_PORT = 0x80

PM1_CONTROL_SCI_ENABLE = 1 << 0
PM1_CONTROL_SLEEP_ENABLE = 1 << 13
PM1_CONTROL_SLEEP_TYPE_SHIFT = 10


@dataclass(slots=True)
class PowerManagementState:
    """The PM1a block's registers, 16 bits each."""

    status: int = 0
    enable: int = 0
    control: int = PM1_CONTROL_SCI_ENABLE


class PowerManagement:
    """PM1a status (offset 0), enable (2) and control (4): a port device of six bytes.

    *on_sleep* gets the SLP_TYP the guest wrote together with SLP_EN; our DSDT makes it the number
    of the S state.
    """

    def __init__(self, on_sleep: Callable[[int], None]) -> None:
        self._on_sleep = on_sleep
        self.state = PowerManagementState()

    def read(self, offset: int, size: int) -> int:
        state = self.state
        block = state.status | state.enable << 16 | state.control << 32
        return block >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        state = self.state
        written = value & (1 << 8 * size) - 1
        for index in range(offset, offset + size):
            byte, shift = written >> 8 * (index - offset) & 0xFF, 8 * (index & 1)
            if index < 2:
                state.status &= ~(byte << shift)  # write one to clear
            elif index < 4:
                state.enable = state.enable & ~(0xFF << shift) | byte << shift
            elif index < 6:
                control = state.control & ~(0xFF << shift) | byte << shift
                # SLP_EN is write-only; with no SMI command port the machine is always in ACPI mode.
                state.control = control & ~PM1_CONTROL_SLEEP_ENABLE | PM1_CONTROL_SCI_ENABLE
                if control & PM1_CONTROL_SLEEP_ENABLE:
                    self._on_sleep(control >> PM1_CONTROL_SLEEP_TYPE_SHIFT & 7)


class ResetRegister:
    """Port 0xcf9: setting bit 2 resets, as in Intel's chip sets; reads back what was written."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        self._value = value & 0x0A
        if value & 0x04:
            self._on_reset()


class KeyboardControllerReset:
    """Port 0x64 of an i8042 that is not there but for its reset pulse.

    Reads give 0, because kernels wait for "input buffer full" to clear before they pulse.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if value & 0xFF == KEYBOARD_CONTROLLER_PULSE_RESET:
            self._on_reset()


class SystemControlPortB:
    """Port 0x61: timer 2 gate and speaker. NMI reason bits 6 and 7 stay clear.

    All ones would make a guest take each NMI for a memory parity error. Bit 4 (refresh) toggles
    with each read and bit 5 (timer 2 out) is set, so that loops waiting for either end.
    """

    def __init__(self) -> None:
        self._value = 0x20

    def read(self, offset: int, size: int) -> int:
        self._value ^= 0x10
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        self._value = self._value & 0xF0 | value & 0x0F


class DelayPort:
    """Port 0x80, written only to pass time."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing to do: the exit itself was the delay."""


def attach_power_management(
    bus: PortBus,
    *,
    on_sleep: Callable[[int], None],
    on_reset: Callable[[], None],
    pm_base: int = PM_BASE,
) -> PowerManagement:
    """Register everything of this module on *bus*.

    Where KVM has an in-kernel PIT, port 0x61 never comes here. Absent PCI configuration ports
    (0xcf8, 0xcfc) are left to the bus: all ones says there is no PCI.
    """
    power = PowerManagement(on_sleep)
    bus.register(range(pm_base, pm_base + PM1_EVENT_LENGTH + PM1_CONTROL_LENGTH), power)
    bus.register(range(RESET_PORT, RESET_PORT + 1), ResetRegister(on_reset))
    keyboard = range(KEYBOARD_CONTROLLER_PORT, KEYBOARD_CONTROLLER_PORT + 1)
    bus.register(keyboard, KeyboardControllerReset(on_reset))
    bus.register(range(SYSTEM_CONTROL_PORT_B, SYSTEM_CONTROL_PORT_B + 1), SystemControlPortB())
    bus.register(range(DELAY_PORT, DELAY_PORT + 1), DelayPort())
    return power
