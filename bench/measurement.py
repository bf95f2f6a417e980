"""One figure."""

from __future__ import annotations

from dataclasses import dataclass


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
