"""What a guest can tell its hypervisor.

The input is a list of steps: a byte that chooses one, then its numbers. Hypercalls, SynIC pages and
crash registers may name any address; nothing may be raised, and nothing outside the pages that the
guest gave may change.
"""

from __future__ import annotations

import struct

from hvhost.machine.model import CrashReport
from hvhost.partition.crash import HV_X64_MSR_CRASH_P0, CrashRegisters
from hvhost.partition.hypercall import Hypercalls
from hvhost.partition.memory import GuestMemory, MemoryRegion
from hvhost.partition.synic import Synic

LOW, HIGH, HIGH_ADDRESS = 0x8000, 0x4000, 1 << 32
_STEP = struct.Struct("<BBHQQ")


class _Line:
    def trigger(self) -> None:
        """An interrupt; the guest's."""


def fuzz_partition(data: bytes) -> None:
    """Take *data* as a guest's steps; ``AssertionError`` if one of them had an effect too many."""
    memory = GuestMemory(
        [
            MemoryRegion(0, memoryview(bytearray(LOW))),
            MemoryRegion(HIGH_ADDRESS, memoryview(bytearray(HIGH)), LOW),
        ]
    )
    line = _Line()
    synic = Synic(memory, 0, line, line)
    reports: list[CrashReport] = []
    crash = CrashRegisters(memory, reports.append)

    def post_message(connection: int, payload: bytes) -> int:
        assert len(payload) <= 240
        assert connection < 1 << 24
        synic.post(1, payload)
        return 0

    def signal_event(connection: int) -> int:
        synic.signal(2, connection % 2048)
        return 0

    def discard(address: int, size: int) -> None:
        assert size > 0
        memory.view(address, size)

    calls = Hypercalls(memory, post_message, signal_event, discard)
    for place in range(0, len(data) - _STEP.size + 1, _STEP.size):
        kind, small, number, first, second = _STEP.unpack_from(data, place)
        if kind % 6 == 0:
            hint = 0x8003 | (second & 0xFFF) << 32
            code = (0x5C, 0x5D, 0x1005C, 0x1005D, number, 0x8001, hint)[small % 7]
            result = calls.call(code, first, second)
            assert 0 <= result & 0xFFFFFFFF <= 0xFFFF and result >> 32 <= 0xFFF
        elif kind % 6 == 1:
            synic.registers_changed(1, first, second)
        elif kind % 6 == 2:
            known = small % 8 < 6
            assert crash.write(HV_X64_MSR_CRASH_P0 + small % 8, first) == known
            assert (crash.read(HV_X64_MSR_CRASH_P0 + small % 8) is not None) == known
        elif kind % 6 == 3:
            synic.deliver()
        else:  # the guest writes its own memory: a message to post, a slot to free
            region = memory.regions[small % 2]
            target = number % (region.size - 16)
            region.view[target : target + 16] = struct.pack("<QQ", first, second)
    assert all(report.text is None or len(report.text) <= 4096 for report in reports)
