"""Waiting longer on a computer that has more to run than processors, and only then."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_guest import FAST, ScriptedGuest, Silent

from hvhost.verify.contract import Status, find_rows
from hvhost.verify.rows import Proof
from hvhost.verify.runner import run_rows
from hvhost.verify.session import MOST_PATIENCE, Session, Timing, patience


@pytest.mark.parametrize(
    ("load", "cpus", "factor"),
    [(0.1, 2, 1.0), (2.0, 2, 1.0), (5.0, 2, 2.5), (5.0, 8, 1.0), (90.0, 2, MOST_PATIENCE)],
)
def test_patience_follows_the_load(
    monkeypatch: pytest.MonkeyPatch, load: float, cpus: int, factor: float
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    assert patience() == factor


def test_waits_are_stretched_and_polls_are_not() -> None:
    timing = Timing(stretch=lambda: 3.0)
    session = Session(ScriptedGuest(), 2, lambda text: None, timing)
    assert session.timing.boot == 3 * timing.boot
    assert session.timing.event == 3 * timing.event
    assert session.timing.patiently(20.0) == 60.0
    assert (session.timing.poll, session.timing.settle) == (timing.poll, timing.settle)


@pytest.mark.parametrize(("factor", "status"), [(1.0, Status.FAILS), (100.0, Status.WORKS)])
def test_a_rows_time_is_stretched(factor: float, status: Status) -> None:
    timing = Timing(
        **{name: getattr(FAST, name) for name in ("boot", "poll")}, stretch=lambda: factor
    )
    late = threading.Event()
    threading.Timer(0.3, late.set).start()

    def prove(session: Session):  # type: ignore[no-untyped-def]
        session.running()
        late.wait(5)
        yield "seen"

    rows = find_rows(["smp"], option="--rows")
    proofs = [Proof("smp", prove, 0.1)]
    outcome = run_rows(ScriptedGuest(), rows, 2, Silent(), timing=timing, proofs=proofs)
    assert outcome.results[0].status is status


@pytest.mark.parametrize(("faults", "pauses"), [((), []), (("32-bit",), [30.0, 30.0, 5.0])])
def test_ticks_of_a_32_bit_guest_are_waited_for_until_they_are_past_zero(
    monkeypatch: pytest.MonkeyPatch, faults: tuple[str, ...], pauses: list[float]
) -> None:
    """It is no time of the row's, and people see how long it takes."""
    uptime, slept, steps = 240.0, list[float](), list[str]()

    def sleep(seconds: float) -> None:
        nonlocal uptime
        uptime += seconds
        slept.append(seconds)

    probe: Any = SimpleNamespace(read=lambda path: f"{uptime:.2f} 9.99\n")
    monkeypatch.setattr(time, "sleep", sleep)
    session = Session(ScriptedGuest(*faults), 2, steps.append, Timing())
    session.await_ticks(probe)
    assert slept == pauses
    assert session.excused == sum(pauses)
    assert [step.split()[1] for step in steps] == ["65", "35", "5"][: len(pauses)]


@pytest.mark.parametrize(("excused", "status"), [(0.0, Status.FAILS), (60.0, Status.WORKS)])
def test_excused_time_does_not_count(excused: float, status: Status) -> None:
    late = threading.Event()
    threading.Timer(0.3, late.set).start()

    def prove(session: Session):  # type: ignore[no-untyped-def]
        session.excused += excused
        late.wait(5)
        yield "seen"

    rows = find_rows(["smp"], option="--rows")
    proofs = [Proof("smp", prove, 0.1)]
    outcome = run_rows(ScriptedGuest(), rows, 2, Silent(), timing=FAST, proofs=proofs)
    assert outcome.results[0].status is status
