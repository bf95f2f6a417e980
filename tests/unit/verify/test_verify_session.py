"""The session under all rows: whose guest it is, in what machine, and when a boot is given up."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scripted_guest import FAST, ScriptedGuest, Silent

from hvhost.verify import session as session_module
from hvhost.verify.contract import find_rows
from hvhost.verify.guest import ANY_SHAPE, RowFailed, Shape
from hvhost.verify.rows import Proof
from hvhost.verify.runner import run_rows
from hvhost.verify.session import BootFailed, Session


def make(guest: ScriptedGuest, **timing: float) -> Session:
    return Session(guest, 2, lambda text: None, replace(FAST, **timing))  # type: ignore[arg-type]


def test_a_session_without_a_machine() -> None:
    guest = ScriptedGuest()
    session = make(guest)
    with pytest.raises(RowFailed, match="not running"):
        _ = session.machine
    session.recover()
    assert not guest.machines


def test_a_row_whose_time_is_up_starts_no_guest() -> None:
    guest = ScriptedGuest()
    session = make(guest)
    thread = threading.Thread(target=session.adopt)
    thread.start()
    thread.join()
    with pytest.raises(RowFailed, match="time is up"):
        session.running()
    assert not guest.machines


def test_another_shape_or_guest_is_another_machine() -> None:
    guest, other = ScriptedGuest(), ScriptedGuest()
    session = make(guest)
    session.running()
    session.running()
    assert len(session.machines) == 1
    session.running(guest=other)
    assert session.machines == [*guest.machines, *other.machines]
    assert guest.machines[0].killed and not other.machines[0].killed
    small = Shape(cpus=1)
    session.running(small, guest=other)
    assert other.shapes == [ANY_SHAPE, small]
    assert other.machines[0].killed and not other.machines[1].killed


class Clock:
    """Time that passes only when it is looked at, a second each time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1.0
        return self.seconds


@pytest.mark.parametrize(("verbose", "least", "most"), [(True, 30, 100), (False, 500, 600)])
def test_only_a_kernel_that_should_talk_and_does_not_is_given_up_early(
    monkeypatch: pytest.MonkeyPatch, verbose: bool, least: int, most: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    session = make(ScriptedGuest("no-userspace"), boot=500.0, stall=30.0)
    session.verbose = verbose
    with pytest.raises(BootFailed):
        session.running()
    assert least <= clock.seconds <= most


def test_a_machine_that_stops_at_boot_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(session_module, "time", clock)
    session = make(ScriptedGuest("stops-at-boot"), boot=500.0)
    with pytest.raises(BootFailed, match="worker ended: the machine stopped"):
        session.running()
    assert clock.seconds < 100


def test_a_proof_without_evidence_is_none() -> None:
    def prove(session: Session) -> Iterator[str]:
        session.running()
        yield from itertools.repeat("", 0)

    rows = find_rows(["smp"], option="--rows")
    guest = ScriptedGuest()
    with pytest.raises(AssertionError, match="smp gave no evidence"):
        run_rows(guest, rows, 2, Silent(), timing=FAST, proofs=[Proof("smp", prove, 5.0)])
    assert all(machine.killed for machine in guest.machines)
