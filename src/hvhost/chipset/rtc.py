"""The MC146818 real-time clock and its NVRAM, on I/O ports 0x70 (index) and 0x71 (data).

The date is in UTC. Alarm registers are stored but never fire: no time passes in here. A guest that
sets the clock moves its offset from the host's, nothing else. Source: Motorola MC146818A data
sheet; the century byte at 0x32 is what the FADT announces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from time import gmtime

INDEX_PORT, DATA_PORT = 0x70, 0x71
NVRAM_SIZE = 128
CENTURY = 0x32
# The chip announces an update 244 µs before it happens.
UPDATE_WARNING_SECONDS = 244e-6


class RtcRegister(IntEnum):
    """Indices of the clock's registers; the alarm's are the odd ones below 6."""

    SECONDS = 0
    MINUTES = 2
    HOURS = 4
    DAY_OF_WEEK = 6
    DAY_OF_MONTH = 7
    MONTH = 8
    YEAR = 9
    A = 10
    B = 11
    C = 12
    D = 13


class RegisterB(IntFlag):
    """Mode bits of register B."""

    HOURS_24 = 1 << 1
    BINARY = 1 << 2
    SET = 1 << 7


A_UPDATE_IN_PROGRESS = 1 << 7
A_DIVIDER_32768_HZ = 0x26
D_VALID = 1 << 7
_TIME_REGISTERS = (0, 2, 4, 6, 7, 8, 9, CENTURY)


@dataclass(slots=True)
class RtcState:
    """Everything the clock carries over a save; *offset* in seconds from the host's clock.

    *frozen* holds the time registers while the guest has set :attr:`RegisterB.SET`.
    """

    index: int = 0
    offset: float = 0.0
    nvram: bytearray = field(default_factory=lambda: bytearray(NVRAM_SIZE))
    register_a: int = A_DIVIDER_32768_HZ
    register_b: int = RegisterB.HOURS_24
    frozen: dict[int, int] | None = None


class Rtc:
    """The clock as a :class:`hvhost.chipset.ports.PortDevice` of two ports.

    *clock* gives the host's time in seconds since 1970, UTC (``time.time``).
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.state = RtcState()

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            return 0xFF if offset == 0 else self._read(self.state.index)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == 0:
                self.state.index = value & (NVRAM_SIZE - 1)  # bit 7 masks NMIs; not ours
            else:
                self._write(self.state.index, value & 0xFF)

    def _read(self, index: int) -> int:
        state = self.state
        if index in _TIME_REGISTERS:
            registers = state.frozen
            if registers is None:
                registers = self._encode(self._clock() + state.offset)
            return registers[index]
        if index == RtcRegister.A:
            left = 1.0 - (self._clock() + state.offset) % 1.0
            busy = state.frozen is None and left <= UPDATE_WARNING_SECONDS
            return state.register_a | (A_UPDATE_IN_PROGRESS if busy else 0)
        if index == RtcRegister.B:
            return state.register_b
        if index == RtcRegister.D:
            return D_VALID
        return state.nvram[index]

    def _write(self, index: int, value: int) -> None:
        state = self.state
        if index in _TIME_REGISTERS:
            if state.frozen is not None:
                state.frozen[index] = value
            else:
                registers = self._encode(self._clock() + state.offset)
                registers[index] = value
                self._set(registers)
        elif index == RtcRegister.A:
            state.register_a = value & ~A_UPDATE_IN_PROGRESS
        elif index == RtcRegister.B:
            frozen, state.frozen = state.frozen, None
            if value & RegisterB.SET:
                state.frozen = frozen or self._encode(self._clock() + state.offset)
            elif frozen is not None:
                # The registers were written in the mode in force until now.
                self._set(frozen)
            state.register_b = value
        elif index not in (RtcRegister.C, RtcRegister.D):
            state.nvram[index] = value

    def _encode(self, seconds: float) -> dict[int, int]:
        time = gmtime(max(0, int(seconds // 1)))
        mode = self.state.register_b
        hour, afternoon = time.tm_hour, 0
        if not mode & RegisterB.HOURS_24:
            afternoon = 0x80 if hour >= 12 else 0
            hour = hour % 12 or 12
        values = {
            RtcRegister.SECONDS: time.tm_sec,
            RtcRegister.MINUTES: time.tm_min,
            RtcRegister.HOURS: hour,
            RtcRegister.DAY_OF_WEEK: (time.tm_wday + 1) % 7 + 1,  # 1 is Sunday
            RtcRegister.DAY_OF_MONTH: time.tm_mday,
            RtcRegister.MONTH: time.tm_mon,
            RtcRegister.YEAR: time.tm_year % 100,
            CENTURY: time.tm_year // 100,
        }
        if not mode & RegisterB.BINARY:
            values = {index: value // 10 << 4 | value % 10 for index, value in values.items()}
        values[RtcRegister.HOURS] |= afternoon
        return {int(index): value for index, value in values.items()}

    def _set(self, registers: dict[int, int]) -> None:
        """Move the offset so that the clock shows *registers*; a date that is none changes nothing.

        The guest writes one register after the other, so a date may be none for a while.
        """
        state = self.state
        values = dict(registers)
        afternoon = False
        if not state.register_b & RegisterB.HOURS_24:
            afternoon = bool(values[RtcRegister.HOURS] & 0x80)
            values[RtcRegister.HOURS] &= 0x7F
        if not state.register_b & RegisterB.BINARY:
            values = {index: (value >> 4) * 10 + (value & 0xF) for index, value in values.items()}
        hour = values[RtcRegister.HOURS]
        if not state.register_b & RegisterB.HOURS_24:
            hour = hour % 12 + (12 if afternoon else 0)
        year = values[CENTURY] * 100 + values[RtcRegister.YEAR]
        month, day = values[RtcRegister.MONTH], values[RtcRegister.DAY_OF_MONTH]
        minute, second = values[RtcRegister.MINUTES], values[RtcRegister.SECONDS]
        if not (1970 <= year <= 9999 and 1 <= month <= 12 and 1 <= day <= 31):
            return
        if hour > 23 or minute > 59 or second > 59:
            return
        from calendar import timegm  # rare, and its import is not

        state.offset = timegm((year, month, day, hour, minute, second)) - self._clock()
