"""The policy of dynamic memory, over hours of virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.memory.policy import (
    Claim,
    Pace,
    Sample,
    band,
    demand,
    guest_floor,
    least,
    reserve,
    share,
    step,
)
from hvhost.units import GIB, MIB

TICK = 2.0
HOUR = int(3600 / TICK)

CLAIMS = st.builds(
    lambda low, size, more, need, buffer, weight: Claim(
        (low + size) * MIB,
        None if need is None else need * MIB,
        low * MIB,
        (low + size + more) * MIB,
        buffer,
        weight,
    ),
    st.integers(32, 4096),
    st.integers(0, 4096),
    st.integers(0, 8192),
    st.none() | st.integers(0, 16384),
    st.integers(5, 200),
    st.integers(1, 10_000),
)


@dataclass
class Guest:
    """A guest that gives down to its floor and takes all; *used* is its programs' and its own."""

    claim: Claim
    used: int
    pace: Pace = field(default_factory=Pace)
    changes: list[int] = field(default_factory=list)
    floor_reached: bool = False

    def look(self) -> Claim:
        self.claim = replace(self.claim, demand=self.used)
        return self.claim

    def move(self, target: int, now: float) -> None:
        change = step(self.look(), target, self.pace, now)
        if change < 0:  # Linux gives what it has available above its floor
            available = self.claim.assigned - self.used
            change = -min(-change, max(0, available - guest_floor(self.claim.assigned)))
        if change:
            self.changes.append(change)
            self.claim = replace(self.claim, assigned=self.claim.assigned + change)


def a_guest(used: int, *, startup: int = 2048, low: int = 256, high: int = 8192) -> Guest:
    return Guest(Claim(startup * MIB, None, low * MIB, high * MIB, 20, 5000), used * MIB)


def run(guests: list[Guest], memory: int, ticks: int, start: int = 0) -> None:
    """Each machine decides for itself, by what all of them say."""
    for tick in range(start, start + ticks):
        for index, guest in enumerate(guests):
            guest.look()
            others = [other.claim for other in guests]
            guest.move(share([other.part for other in others], memory)[index], tick * TICK)


@given(st.lists(CLAIMS, min_size=1, max_size=8), st.integers(0, 64 * 1024))
def test_shares(claims: list[Claim], capacity: int) -> None:
    """None below what is guaranteed, none above what it wants, no more than there is."""
    capacity *= MIB
    shares = share([claim.part for claim in claims], capacity)
    kept = [max(claim.minimum, min(claim.assigned, claim.needed)) for claim in claims]
    for claim, size, least_size in zip(claims, shares, kept, strict=True):
        assert least_size <= size <= max(claim.wanted, least_size)
    assert sum(shares) <= max(capacity, sum(kept))
    if sum(claim.wanted for claim in claims) <= capacity:
        assert shares == [claim.wanted for claim in claims]
    if any(size < claim.needed for claim, size in zip(claims, shares, strict=True)):
        # Somebody is in need: nobody has more than that.
        assert all(size <= claim.needed for claim, size in zip(claims, shares, strict=True))


def test_scarce_memory_goes_by_weight() -> None:
    low = Claim(GIB, 4 * GIB, 512 * MIB, 8 * GIB, 20, 1000)
    high = replace(low, weight=3000)
    small, big = share([low.part, high.part], 3 * GIB)
    assert small + big == pytest.approx(3 * GIB, abs=8)
    assert (big - GIB) == pytest.approx(3 * (small - GIB), abs=8)


def test_a_machine_in_need_comes_before_the_buffers_of_others() -> None:
    rich = Claim(4 * GIB, 2 * GIB, 512 * MIB, 8 * GIB, 100, 10_000)
    poor = Claim(GIB, 2 * GIB, 512 * MIB, 8 * GIB, 100, 1)
    shares = share([rich.part, poor.part], 2 * least(2 * GIB))
    assert shares == [least(2 * GIB)] * 2


def test_the_floor_of_linux() -> None:
    """The table in compute_balloon_floor()."""
    for size, floor in ((16, 16), (32, 24), (128, 72), (512, 168), (2048, 360), (8192, 744)):
        assert guest_floor(size * MIB) == floor * MIB
    assert guest_floor(32768 * MIB) == 1512 * MIB


@given(st.integers(0, 64 * GIB))
def test_the_least_is_just_enough(size: int) -> None:
    enough = least(size)
    assert size + guest_floor(enough - 2 * MIB) > enough - 4 * MIB
    assert enough >= size + guest_floor(size)
    assert enough + 2 * MIB >= size + guest_floor(enough)


def test_demand() -> None:
    sample = Sample(GIB, 700 * MIB, guest_floor(GIB) + 100 * MIB, 0)
    assert demand(sample) == 324 * MIB, "what is used"
    promised = replace(
        sample, committed=guest_floor(GIB) + 500 * MIB + 50 * MIB, ballooned=50 * MIB
    )
    assert demand(promised) == 500 * MIB, "what programs were promised"
    wrapped = replace(sample, committed=(1 << 44) - 4096)
    assert demand(wrapped) == 324 * MIB, "a driver that counts below zero is not believed"


def test_a_machine_is_trimmed_to_what_it_needs() -> None:
    guest = a_guest(300)
    run([guest], 64 * GIB, HOUR)
    assert guest.claim.assigned < 600 * MIB
    assert guest.claim.assigned >= guest.used + guest_floor(guest.claim.assigned) - MIB
    assert all(change < 0 for change in guest.changes), "it never went back and forth"


def test_pressure_is_answered_at_once() -> None:
    guest = a_guest(300)
    run([guest], 64 * GIB, HOUR)
    before = guest.claim.assigned
    guest.used = 3 * GIB
    run([guest], 64 * GIB, 1, HOUR)
    assert guest.claim.assigned > 3 * GIB * 120 // 100 - MIB > before


@settings(max_examples=8, deadline=None)
@given(st.integers(64, 6000), st.randoms(use_true_random=False))
def test_a_demand_that_trembles_moves_no_memory(used: int, random: Random) -> None:
    """Hysteresis: once settled, noise within the band changes nothing, for an hour."""
    guest = a_guest(used)
    run([guest], 64 * GIB, 200)
    settled = len(guest.changes)
    steps = []
    for tick in range(HOUR):
        guest.used = (used + random.randint(-10, 10)) * MIB
        before = guest.claim.assigned
        run([guest], 64 * GIB, 1, 200 + tick)
        steps.append(guest.claim.assigned - before)
    moves = [each for each in steps if each]
    reversals = sum((a > 0) != (b > 0) for a, b in pairwise(moves))
    assert reversals <= 1 and len(guest.changes) - settled <= 12


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(40, 9000), min_size=1, max_size=12), st.integers(5, 60))
def test_limits_hold_whatever_the_demand_does(demands: list[int], every: int) -> None:
    guest = a_guest(demands[0], startup=1024, low=512, high=4096)
    for number, used in enumerate(demands):
        guest.used = used * MIB
        for tick in range(every):
            before = guest.claim.assigned
            run([guest], 64 * GIB, 1, number * every + tick)
            assert 512 * MIB <= guest.claim.assigned <= 4096 * MIB
            if guest.claim.assigned < before:
                assert guest.claim.assigned >= guest.used + guest_floor(guest.claim.assigned)


@given(CLAIMS, st.integers(0, 64 * 1024), st.booleans())
def test_no_step_leaves_the_limits_or_takes_what_is_needed(
    claim: Claim, target: int, long_ago: bool
) -> None:
    """Whatever others leave it, and whatever its guest would give."""
    change = step(claim, target * MIB, Pace(0.0 if long_ago else None), 1000.0)
    after = claim.assigned + change
    assert change % MIB == 0
    if change < 0:
        assert long_ago and after >= max(claim.minimum, claim.needed, target * MIB)
        assert after >= (claim.demand or 0) + guest_floor(after) or after >= claim.maximum
    if change > 0:
        assert after <= min(claim.maximum, target * MIB)


MACHINES = st.lists(
    st.tuples(st.integers(40, 3000), st.integers(1, 10_000), st.integers(5, 200)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=8, deadline=None)
@given(MACHINES, st.integers(10, 150))
def test_any_crowd_comes_to_rest(machines: list[tuple[int, int, int]], percent: int) -> None:
    """However scarce memory is: within it but for what is not worth moving, and nothing moves."""
    guests = [
        Guest(Claim(512 * MIB, None, 256 * MIB, 6 * GIB, buffer, weight), used * MIB)
        for used, weight, buffer in machines
    ]
    wanted = sum(guest.look().wanted for guest in guests)
    memory = max(wanted * percent // 100, len(guests) * 512 * MIB)
    run(guests, memory, 150)
    assert sum(guest.claim.assigned for guest in guests) < memory + len(guests) * 32 * MIB
    assert all(256 * MIB <= guest.claim.assigned <= 6 * GIB for guest in guests)
    counts = [len(guest.changes) for guest in guests]
    run(guests, memory, 150, 150)
    assert counts == [len(guest.changes) for guest in guests]


def test_a_crowd_shares_what_there_is() -> None:
    """Machines that all want more settle, within the host's memory, and stay there."""
    guests = [a_guest(1500, startup=1024) for _ in range(8)]
    run(guests, 12 * GIB, 300)
    total = sum(guest.claim.assigned for guest in guests)
    assert total <= 12 * GIB + 8 * MIB
    assert total > 12 * GIB - 8 * band(2 * GIB), "what there is, is used"
    counts = [len(guest.changes) for guest in guests]
    run(guests, 12 * GIB, 300, 300)
    assert counts == [len(guest.changes) for guest in guests]


def test_without_a_report_nothing_happens() -> None:
    claim = Claim(GIB, None, 256 * MIB, 2 * GIB, 20, 5000)
    assert step(claim, 2 * GIB, Pace(), 0.0) == 0
    assert claim.wanted == claim.needed == GIB


def test_too_much_is_taken_only_after_a_while() -> None:
    claim, pace = Claim(2 * GIB, 300 * MIB, 256 * MIB, 4 * GIB, 20, 5000), Pace()
    moves = [step(claim, 512 * MIB, pace, now) for now in (0.0, 4.0, 9.9, 10.0)]
    assert moves == [0, 0, 0, -256 * MIB]
    assert step(replace(claim, demand=2 * GIB), 2 * GIB, pace, 11.0) >= 0
    assert pace.excess_since is None


def test_a_machine_keeps_little_that_the_host_has_not() -> None:
    """A sixteenth of each machine would be more than the host's reserve."""
    claim = Claim(4 * GIB, 3 * GIB, 256 * MIB, 8 * GIB, 100, 5000)
    for less, change in ((31, 0), (33, -33), (100, -100)):
        assert step(claim, 4 * GIB - less * MIB, Pace(0.0), 60.0) == change * MIB
    rich = replace(claim, demand=2 * GIB, buffer=95)
    assert rich.wanted == 2 * GIB * 195 // 100 < 4 * GIB
    assert step(rich, rich.wanted, Pace(0.0), 60.0) == 0, "there is enough for all"


def test_what_the_host_keeps() -> None:
    assert (reserve(GIB), reserve(20 * GIB), reserve(1024 * GIB)) == (256 * MIB, GIB, 4 * GIB)
