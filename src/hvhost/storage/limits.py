"""Limits on what a disk may do in a second: token buckets, without a clock of their own."""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds' worth of what is allowed that may be used at once after a time without requests.
BURST_SECONDS = 0.1


@dataclass(slots=True)
class Bucket:
    """*rate* units a second, 0 for no limit. What is taken too early is waited for."""

    rate: float = 0.0
    level: float = 0.0
    filled: float = 0.0

    def delay(self, now: float, amount: float) -> float:
        """Seconds to wait from *now* before using *amount*; it counts as used."""
        if not self.rate:
            return 0.0
        gained = (now - self.filled) * self.rate
        self.level = min(self.level + gained, self.rate * BURST_SECONDS) - amount
        self.filled = now
        return max(0.0, -self.level / self.rate)


@dataclass(slots=True)
class Limiter:
    """Requests a second and bytes a second of one disk."""

    requests: Bucket
    data: Bucket

    @classmethod
    def of(cls, iops: int, bandwidth: int) -> Limiter | None:
        """A limiter, or ``None`` where neither is limited (0)."""
        return cls(Bucket(iops), Bucket(bandwidth)) if iops or bandwidth else None

    def delay(self, now: float, size: int) -> float:
        """Seconds to wait before a request of *size* bytes; it counts as made."""
        return max(self.requests.delay(now, 1), self.data.delay(now, size))
