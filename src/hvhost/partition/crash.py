"""The guest crash MSRs ([TLFS] 2.8 "Guest Crash Enlightenment").

KVM implements these MSRs but hides the bit that makes a guest send its panic text, so their
accesses come to us through an MSR filter. Linux writes P0..P4 (error, instruction pointer and so
on) and then the control register; when it also has text, P3 and P4 are its address and length.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hvhost.errors import GuestMemoryError
from hvhost.machine.model import CrashReport
from hvhost.partition.memory import GuestMemory
from hvhost.partition.msrs import CRASH_MSR_COUNT as CRASH_MSR_COUNT
from hvhost.partition.msrs import HV_X64_MSR_CRASH_CTL as HV_X64_MSR_CRASH_CTL
from hvhost.partition.msrs import HV_X64_MSR_CRASH_P0 as HV_X64_MSR_CRASH_P0
from hvhost.partition.msrs import HV_X64_MSR_CRASH_P4 as HV_X64_MSR_CRASH_P4

HV_CRASH_CTL_CRASH_NOTIFY_MSG = 1 << 62
HV_CRASH_CTL_CRASH_NOTIFY = 1 << 63
MAXIMUM_REPORTS = 16
_MAXIMUM_TEXT = 4096


class CrashRegisters:
    """P0..P4 and the control register; *report* is called when the guest says it crashed.

    A report's ``seconds`` count from here. A guest that crashes ever again is not listened to
    after :data:`MAXIMUM_REPORTS` times: each report is kept, with up to 4096 bytes of text.
    """

    def __init__(self, memory: GuestMemory, report: Callable[[CrashReport], None]) -> None:
        self._memory = memory
        self._report = report
        self._parameters = [0] * 5
        self._reports = 0
        self._born = time.monotonic()

    def read(self, msr: int) -> int | None:
        """Value of an MSR, or None if it is not one of these."""
        if msr == HV_X64_MSR_CRASH_CTL:
            return HV_CRASH_CTL_CRASH_NOTIFY | HV_CRASH_CTL_CRASH_NOTIFY_MSG
        if HV_X64_MSR_CRASH_P0 <= msr <= HV_X64_MSR_CRASH_P4:
            return self._parameters[msr - HV_X64_MSR_CRASH_P0]
        return None

    def write(self, msr: int, value: int) -> bool:
        """Whether *msr* is one of these and took *value*."""
        if HV_X64_MSR_CRASH_P0 <= msr <= HV_X64_MSR_CRASH_P4:
            self._parameters[msr - HV_X64_MSR_CRASH_P0] = value
            return True
        if msr != HV_X64_MSR_CRASH_CTL:
            return False
        if value & HV_CRASH_CTL_CRASH_NOTIFY and self._reports < MAXIMUM_REPORTS:
            self._reports += 1
            self._report(
                CrashReport(
                    tuple(self._parameters),
                    self._text() if value & HV_CRASH_CTL_CRASH_NOTIFY_MSG else None,
                    time.monotonic() - self._born,
                )
            )
        return True

    def _text(self) -> str | None:
        address, length = self._parameters[3], self._parameters[4]
        try:
            data = self._memory.read(address, min(length, _MAXIMUM_TEXT))
        except GuestMemoryError:
            return None
        return data.split(b"\0", 1)[0].decode("utf-8", "replace")
