"""How far a clock of the guest is from the host's, without a round trip.

A program in the guest writes its time into memory over and over; the host, which sees that memory
too, notes when the number changes. Each sample is bracketed on both sides: on the host by the two
looks between which the change happened, in the guest by the next number, since the first was
written before the second was read. A guest or host that lost the CPU in between shows as a wide
bracket, not as a wrong clock.
"""

from __future__ import annotations

import time

from hvhost.errors import HvHostError
from hvhost.machine.model import ClockSample
from hvhost.partition.memory import GuestMemory

#: Seconds in which a better sample is looked for, and in which the number must change at all.
_EFFORT = 0.1
_PATIENCE = 5.0
#: Nanoseconds of error that need no better sample.
_GOOD_ERROR = 10_000
#: Looks at the number, a millisecond's worth, before others get their turn.
_LOOKS = 3_000
_PAUSE = 0.001


def watch_clock(
    memory: GuestMemory, address: int, count: int, interval: float
) -> list[ClockSample]:
    """*count* samples, *interval* seconds apart, of the clock at guest physical *address*.

    Blocks that long. :class:`HvHostError` if *address* is no memory or its number does not change.
    """
    if address % 8:
        raise HvHostError(f"A clock at {address:#x} is not aligned to 8 bytes; give its start.")
    words = memory.view(address, 8).cast("Q")
    samples = []
    for _ in range(count):
        samples.append(_sample(words))
        time.sleep(interval)
    return samples


def _sample(words: memoryview) -> ClockSample:
    started = time.monotonic()
    best: ClockSample | None = None
    while True:
        passed = time.monotonic() - started
        if best is not None and passed > _EFFORT:
            return best
        if passed > _PATIENCE:
            raise HvHostError(
                "The guest's clock does not change; see whether its program still runs."
            )
        sample = _change(words)
        if sample is not None and (best is None or sample.error < best.error):
            best = sample
            if best.error <= _GOOD_ERROR:
                return best


def _change(words: memoryview) -> ClockSample | None:
    """The next change of the number, and the one after it; ``None`` if they take too long."""
    clock = time.time_ns
    before, first = clock(), words[0]
    changed: tuple[int, int, int] | None = None
    for look in range(2 * _LOOKS):
        start, value = clock(), words[0]
        if changed is None:
            if value != first:
                changed = before, clock(), value
            before = start
        elif value != changed[2]:
            before, after, first = changed
            return ClockSample(
                host=(before + after) // 2,
                guest=(first + value) // 2,
                error=(after - before + abs(value - first)) // 2,
            )
        if look == _LOOKS:  # perhaps the guest gets no turn for our looking
            time.sleep(_PAUSE)
    return None
