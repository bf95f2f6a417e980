"""One figure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
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


#: ``ioctl(…, KVM_RUN, …)``, as the kernel tells what a thread waits in.
_IOCTL, _KVM_RUN = "16", "0xae80"
_LOOKS, _LOOK_SECONDS = 20, 0.01


def _processors(pid: int) -> set[str]:
    """Threads that run a guest: one that waits for its next timer sleeps and wakes in KVM."""
    found = set()
    for _ in range(_LOOKS):  # one that just runs cannot be told from others
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                call = task.joinpath("syscall").read_text().split()
                if call[0] == _IOCTL and call[2] == _KVM_RUN:
                    found.add(task.name)
        time.sleep(_LOOK_SECONDS)
    return found


def wake_ups(pid: int, but: Collection[str] = ()) -> int:
    """How often the threads of a process, but those, were woken (the kernel's own count)."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if task.name in but:
                continue
            for line in task.joinpath("status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


def wake_ups_a_second(pid: int, seconds: float) -> float:
    """How often its threads, but a guest's processors, are woken in a second, for *seconds*."""
    but = _processors(pid)
    before, start = wake_ups(pid, but), time.monotonic()
    time.sleep(seconds)
    return (wake_ups(pid, but) - before) / (time.monotonic() - start)
