"""Comparing clocks through memory: with a clock in a thread, and with one of which all is known."""

from __future__ import annotations

import mmap
import os
import signal
import time

import pytest

from hvhost.errors import HvHostError
from hvhost.machine import clock_watch
from hvhost.machine.clock_watch import watch_clock
from hvhost.partition.memory import GuestMemory, MemoryRegion


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory([MemoryRegion(0x1000, memoryview(mmap.mmap(-1, 0x1000)))])


@pytest.mark.parametrize("ahead", [0, 3_600 * 10**9, -250_000])
def test_a_guest_that_is_ahead_or_behind(memory: GuestMemory, ahead: int) -> None:
    guest = os.fork()
    if guest == 0:
        while True:
            memory.store64(0x1008, time.time_ns() + ahead)
    try:
        samples = watch_clock(memory, 0x1008, 10, 0.0)
    finally:
        os.kill(guest, signal.SIGKILL)
        os.waitpid(guest, 0)
    assert len(samples) == 10
    assert all(abs(each.guest - each.host - ahead) <= each.error + 1000 for each in samples)
    assert min(each.error for each in samples) < 50_000_000


class Words:
    """Memory that plays a script: what each look sees; time passes 10 ns at every look."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.now = script, 0

    def __getitem__(self, index: int) -> int:
        self.now += 10
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]


def test_the_brackets_hold_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words([700, 700, 700, 800, 800, 840])
    monkeypatch.setattr(time, "time_ns", lambda: words.now)
    sample = clock_watch._change(words)  # type: ignore[arg-type]
    assert sample is not None
    # The old number was seen last in the look that began at 20; the new one was there at 40.
    assert (sample.host, sample.guest, sample.error) == (30, 820, 30)


def test_a_clock_that_stands_still_is_none(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock_watch, "_PATIENCE", 0.1)
    memory.store64(0x1000, 5)
    with pytest.raises(HvHostError, match="does not change"):
        watch_clock(memory, 0x1000, 1, 0.0)


def test_a_clock_must_be_aligned_memory(memory: GuestMemory) -> None:
    with pytest.raises(HvHostError, match="not aligned"):
        watch_clock(memory, 0x1001, 1, 0.0)
    with pytest.raises(HvHostError):
        watch_clock(memory, 0x9000, 1, 0.0)
