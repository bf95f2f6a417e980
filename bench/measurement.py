"""One figure."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Measurement:
    """*value* in *unit*; *beside* is the peer's or the limit's figure of the same run."""

    case: str
    figure: str
    value: float
    unit: str
    beside_name: str = ""
    beside: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the other's."""
        return self.value / self.beside if self.beside else None


def wake_ups(pid: int) -> int:
    """How often the threads of a process were woken (the kernel's own count)."""
    total = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError):
            for line in status.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


def wake_ups_a_second(pid: int, seconds: float) -> float:
    """How often its threads are woken in a second, looked at for so many *seconds*."""
    before, start = wake_ups(pid), time.monotonic()
    time.sleep(seconds)
    return (wake_ups(pid) - before) / (time.monotonic() - start)
