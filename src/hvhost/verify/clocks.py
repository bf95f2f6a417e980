"""A clock of the guest held against the host's, and what the readings say."""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hvhost.machine.model import ClockSample
from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session

_PROGRAM = "/usr/bin/hvhost-clock"

Watch = Callable[[int, float], list[ClockSample]]
"""Take so many samples, so many seconds apart."""


@contextlib.contextmanager
def guest_clock(session: Session, clock: str, seconds: int = 300) -> Iterator[Watch]:
    """Have the guest show *clock* (``realtime`` or a PTP device) to the host for a while.

    :class:`RowFailed` if it cannot.
    """
    probe = session.running()
    result = probe.run([_PROGRAM, clock, str(seconds)], 20.0)
    match = re.fullmatch(r"(\d+) (\d+)", result.output.strip())
    if result.status != 0 or match is None:
        raise RowFailed(f"the guest cannot show its clock {clock}: {result.output.strip()}")
    address, process = int(match[1]), match[2]

    def watch(count: int, interval: float) -> list[ClockSample]:
        return session.machine.services.watch_clock(address, count, interval)

    try:
        yield watch
    finally:
        probe.run(["kill", process], 10.0)


def offset(sample: ClockSample) -> float:
    """Seconds by which the guest's clock is ahead."""
    return (sample.guest - sample.host) / 1e9


@dataclass(frozen=True, slots=True)
class Offsets:
    """Absolute differences in seconds, of the samples that were exact enough to say.

    ``blurred`` is how many were not, because a VP or the host lost the CPU while they were taken,
    and ``blur`` the median and the worst error of all samples.
    """

    median: float
    p99: float
    worst: float
    centre: float
    count: int
    blurred: int
    blur: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"p50 {_show(self.median)}, p99 {_show(self.p99)}, max {_show(self.worst)} "
            f"({self.count} samples)"
        )


def _show(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 10e-3 else f"{seconds:.3f} s"


def judge(samples: Sequence[ClockSample], exact: float, least: int) -> Offsets:
    """The differences of the samples whose error is at most *exact* seconds.

    How exact a reading is has nothing to do with what it reads, so leaving others out favours
    nobody. :class:`RowFailed` if that leaves fewer than *least*.
    """
    good = [sample for sample in samples if sample.error <= exact * 1e9]
    if len(good) < least:
        raise RowFailed(
            f"only {len(good)} of {len(samples)} readings of the clock were good to "
            f"{_show(exact)}; the computer is too busy to tell"
        )
    differences = sorted(abs(offset(sample)) for sample in good)
    errors = [sample.error / 1e9 for sample in samples]
    return Offsets(
        median=statistics.median(differences),
        p99=differences[min(len(differences) - 1, int(len(differences) * 0.99))],
        worst=differences[-1],
        centre=statistics.median(offset(sample) for sample in good),
        count=len(good),
        blurred=len(samples) - len(good),
        blur=(statistics.median(errors), max(errors)),
    )
