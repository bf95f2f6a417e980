"""How much memory a machine should have: pure arithmetic, no I/O, no clock of its own. In bytes.

What a machine *needs* is its demand and the floor below which its guest gives nothing; what it
*wants* is its demand and the buffer on top, within its limits. If the host cannot give all that
they want, machines get, each round shared by weight: their minimum (always), then what they need,
then what they want. What a machine has and needs is never taken from it.

Growing happens at once. Shrinking happens only after a while, in steps, and both only by more than
a band: so a demand that moves within the band moves no memory. Where the host cannot give all that
they want, what is taken has a narrower band, or machines that keep theirs would eat up its reserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from hvhost.memory.settings import STEP
from hvhost.units import GIB, MIB

#: How long a machine must have had too much before some is taken.
SHRINK_SECONDS: Final = 10.0
_BAND_MIN, _BAND_PART = 32 * MIB, 16
_SHRINK_MIN, _SHRINK_PART = 64 * MIB, 8
_RESERVE_MIN, _RESERVE_PART, _RESERVE_MAX = 256 * MIB, 20, 4 * GIB
# A driver that was loaded anew counts below zero, and Linux counts in 32 bits.
_PLAUSIBLE: Final = 1 << 43
# compute_balloon_floor() of hv_balloon.c: from this size on, so much and that part of the size.
_FLOOR = (
    (8192 * MIB, 488 * MIB, 32),
    (2048 * MIB, 232 * MIB, 16),
    (512 * MIB, 104 * MIB, 8),
    (128 * MIB, 40 * MIB, 4),
    (0, 8 * MIB, 2),
)


def guest_floor(assigned: int) -> int:
    """What Linux keeps available at least, of so much memory: it gives nothing below that."""
    for start, base, part in _FLOOR:
        if assigned >= start:
            return base + assigned // part
    return 0


def least(demand: int) -> int:
    """The least memory with which a guest meets this demand and keeps its floor, in whole steps.

    Its floor falls as memory is taken from it, so this is less than demand and floor of now.
    """
    for start, base, part in _FLOOR:
        # Where the size is what is demanded and the floor of just that size.
        size = -(-(demand + base) * part // (part - 1))
        if size >= start:
            break
    return -(-size // STEP) * STEP


@dataclass(frozen=True, slots=True)
class Sample:
    """A guest's report and what it had then.

    *committed* is as Linux counts it: with what is ballooned, and with its floor.
    """

    assigned: int
    available: int
    committed: int
    ballooned: int


def demand(sample: Sample) -> int:
    """What the guest uses or has promised its programs, whichever is more."""
    used = max(0, sample.assigned - sample.available)
    if sample.committed >= _PLAUSIBLE:
        return used
    promised = sample.committed - sample.ballooned - guest_floor(sample.assigned)
    return max(used, promised)


@dataclass(frozen=True, slots=True)
class Claim:
    """One machine's part in the host's memory; *demand* is ``None`` before its first report."""

    assigned: int
    demand: int | None
    minimum: int
    maximum: int
    buffer: int
    weight: int

    @property
    def needed(self) -> int:
        """The least that the guest can do with, within the limits."""
        if self.demand is None:
            return self.assigned
        return self._within(least(self.demand))

    @property
    def wanted(self) -> int:
        """Demand and the buffer, but no less than what is needed."""
        return self.wanted_beyond(self.needed)

    def wanted_beyond(self, needed: int) -> int:
        """:attr:`wanted` of a machine whose :attr:`needed` is known."""
        if self.demand is None:
            return needed
        return max(needed, self._within(self.demand * (100 + self.buffer) // 100))

    @property
    def part(self) -> Part:
        """What of this counts for the others."""
        needed = self.needed
        return Part(
            max(self.minimum, min(self.assigned, needed)),
            needed,
            self.wanted_beyond(needed),
            self.weight,
        )

    def _within(self, size: int) -> int:
        return min(max(size, self.minimum), self.maximum)


@dataclass(frozen=True, slots=True)
class Part:
    """A claim as :func:`share` needs it: *kept* is what the machine has in any case."""

    kept: int
    needed: int
    wanted: int
    weight: int


def reserve(total: int) -> int:
    """What the host, with *total* memory, keeps for itself."""
    return min(max(_RESERVE_MIN, total // _RESERVE_PART), _RESERVE_MAX)


def share(parts: Sequence[Part], capacity: int) -> list[int]:
    """What each machine should have of *capacity*; never less than what it keeps."""
    return share_columns(
        [part.kept for part in parts],
        [part.needed for part in parts],
        [part.wanted for part in parts],
        [part.weight for part in parts],
        capacity,
    )


def share_columns(
    kept: Sequence[int],
    needed: Sequence[int],
    wanted: Sequence[int],
    weights: Sequence[int],
    capacity: int,
) -> list[int]:
    """:func:`share` of parts that come as columns, which is quicker with a thousand machines."""
    if capacity >= sum(wanted):
        return list(wanted)
    # Lists, because an array makes a number anew each time it is asked.
    shares, needed, wanted, weights = list(kept), list(needed), list(wanted), list(weights)
    left = capacity - sum(shares)
    left -= _pour(shares, needed, weights, left)
    _pour(shares, wanted, weights, left)
    return shares


def _pour(shares: list[int], goals: Sequence[int], weights: Sequence[int], amount: int) -> int:
    """Raise *shares* towards *goals* by *amount* in all, by weight; how much that took."""
    gaps = [goal - share for goal, share in zip(goals, shares, strict=True)]
    thirsty = [index for index, gap in enumerate(gaps) if gap > 0]
    if amount <= 0:
        return 0
    thirsty.sort(key=lambda index: gaps[index] / weights[index])  # as they become full
    left, weight = amount, sum(weights[index] for index in thirsty)
    full = 0
    for index in thirsty:
        gap = gaps[index]
        if gap * weight > left * weights[index]:
            break
        shares[index] += gap
        left -= gap
        weight -= weights[index]
        full += 1
    poured = amount - left
    for index in thirsty[full:]:
        gain = min(gaps[index], left * weights[index] // weight)
        shares[index] += gain
        poured += gain
    return poured


def band(assigned: int) -> int:
    """Changes of less than this are not made."""
    return max(_BAND_MIN, assigned // _BAND_PART)


@dataclass(slots=True)
class Pace:
    """Since when a machine has had too much."""

    excess_since: float | None = None


def step(claim: Claim, target: int, pace: Pace, now: float) -> int:
    """By how much to change the machine's memory now; *now* in seconds of any clock.

    The result is whole steps of :data:`~hvhost.memory.settings.STEP`, and 0 most of the time.
    """
    if claim.demand is None:
        pace.excess_since = None
        return 0
    missing = min(target, claim.maximum) - claim.assigned
    in_trouble = claim.assigned < claim.needed
    if missing > 0:
        pace.excess_since = None
        worth_it = in_trouble or missing >= band(claim.assigned) or claim.assigned < claim.minimum
        return missing // STEP * STEP if worth_it else 0
    lowest = max(claim.minimum, claim.needed, target)
    excess = claim.assigned - lowest
    is_scarce = target < claim.wanted
    if excess < (_BAND_MIN if is_scarce else band(claim.assigned)):
        pace.excess_since = None
        return 0
    if pace.excess_since is None:
        pace.excess_since = now
    if now - pace.excess_since < SHRINK_SECONDS:
        return 0
    most = max(_SHRINK_MIN, claim.assigned // _SHRINK_PART)
    return -(min(excess, most) // STEP * STEP)
