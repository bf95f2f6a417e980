"""What a machine says of its memory: plain data for the API and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.memory.settings import DynamicMemory


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """A machine's memory; sizes in bytes, times in seconds.

    ``assigned`` is what the guest has now: ``startup``, and ``added``, less ``ballooned``. Of its
    driver: ``driver`` is how far the conversation with it is, ``version`` what it speaks,
    ``work`` what it was asked for and has not finished, since ``work_seconds``. ``available`` and
    ``committed`` are of its last report, ``report_seconds`` ago, and ``demand`` what is made of
    them; ``needed`` is the least it can have. ``resident`` is what the host's kernel holds for the
    guest; ``discarded`` what was given back to it since the start, ``reported`` the part of that
    which the guest told to be free without being asked. ``target`` is where things are going.
    """

    assigned: int
    startup: int
    added: int
    ballooned: int
    ceiling: int
    dynamic: DynamicMemory | None
    resident: int
    discarded: int
    reported: int
    driver: str
    version: str | None = None
    work: str = "idle"
    work_seconds: float = 0.0
    available: int | None = None
    committed: int | None = None
    demand: int | None = None
    needed: int | None = None
    report_seconds: float | None = None
    target: int | None = None
    problem: str | None = None

    @property
    def pressure(self) -> int | None:
        """Demand in percent of what is assigned."""
        return None if self.demand is None else round(100 * self.demand / self.assigned)
