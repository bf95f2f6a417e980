"""The requested rows, run against one guest in the order that boots it least often.

Whatever happens to a row — its proof does not come, its time is up, the worker dies — becomes that
row's result; the next row gets a guest that works, or one that is started anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hvhost.errors import HvHostError
from hvhost.verify.contract import VMBUS, Row, Status
from hvhost.verify.guest import GuestLacks, HostLacks, PreparedGuest, RowFailed
from hvhost.verify.requirements import has_driver, what_guest_lacks
from hvhost.verify.results import RowResult
from hvhost.verify.rows import PROOFS, Proof
from hvhost.verify.session import BootFailed, Session, Timing

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_LACKS = {HostLacks: Status.HOST_LACKS, GuestLacks: Status.GUEST_LACKS}


class Observer(Protocol):
    """Who is told what happens while it happens; called from more than one thread."""

    def step(self, text: str) -> None: ...

    def row_started(self, row: Row) -> None: ...

    def row_done(self, result: RowResult) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run of the rows found; ``kernel`` is the release that the guest itself gave."""

    results: tuple[RowResult, ...]
    kernel: str
    bus_found: bool | None
    finding: tuple[str, ...]
    notes: tuple[str, ...]


def _missing(row: Row, guest: PreparedGuest) -> RowResult:
    lacks = what_guest_lacks(row, guest.modules, guest.daemons)
    if lacks is not None:
        evidence: tuple[str, ...] = (f"not in hvhost yet; {lacks}",)
    elif guest.modules is None:
        evidence = ("not in hvhost yet", "the kernel's modules are not at hand")
    else:
        evidence = ("not in hvhost yet", "the guest has its drivers and daemons")
    return RowResult(row, Status.MISSING, evidence=evidence)


def _prove(proof: Proof, row: Row, session: Session) -> RowResult:
    """Run one proof in its own thread, so that no call that hangs outlives the row's time."""
    lines: list[str] = []
    failure: list[Exception] = []

    def work() -> None:
        session.adopt()
        try:
            for line in proof.prove(session):
                lines.append(line)  # noqa: PERF402 — each line must be there when time is up
        except Exception as error:
            failure.append(error)

    session.excused = 0.0
    started = time.monotonic()
    thread = threading.Thread(target=work, name=f"row-{row.id}", daemon=True)
    thread.start()
    longest = proof.seconds
    while thread.is_alive() and time.monotonic() - started < longest:
        thread.join(min(proof.seconds, _LOOK_SECONDS))
        # The load of a minute ago may be what delayed the row.
        longest = max(longest, proof.seconds * session.timing.stretch() + session.excused)
    overdue = thread.is_alive()
    session.adopt()
    seconds = time.monotonic() - started
    seen = tuple(lines)
    if overdue:
        status = Status.FAILS
        evidence = (f"no end after {seconds:.0f} s while {session.doing}", *seen)
        session.abandon()
    elif not failure:
        # A proof ends with its summary; the table shows the first line.
        status, evidence = Status.WORKS, (*seen[-1:], *seen[:-1])
        if not seen:
            raise AssertionError(f"the proof of {row.id} gave no evidence")
    else:
        error = failure[0]
        further = error.evidence if isinstance(error, RowFailed) else ()
        status = next(
            (outcome for kind, outcome in _LACKS.items() if isinstance(error, kind)), Status.FAILS
        )
        sentence = str(error)
        if not isinstance(error, HvHostError):
            logger.error("row %s broke", row.id, exc_info=error)
            sentence = f"hvhost's own check broke: {type(error).__name__}: {error}"
        evidence = (sentence, *further, *seen)
        session.recover()
    return RowResult(row, status, seconds, evidence)


def _prove_surely(proof: Proof, row: Row, session: Session) -> RowResult:
    """:func:`_prove`, and once more, with a note, if emulated processors lost the guest."""
    mark = session.heard()
    result = _prove(proof, row, session)
    if result.status is Status.FAILS and (loss := session.emulation_loss(mark)):
        session.notes.append(
            f"{row.id} was tried twice: at first {loss}, as happens on emulated processors"
        )
        result = _prove(proof, row, session)
    return result


def _boot(session: Session) -> tuple[str | None, tuple[str, ...]]:
    """The release the guest reports, or the finding of a guest that did not come up.

    A kernel that does not reach user space is booted once more with its whole log on the console.
    """
    try:
        return session.running().read("/proc/sys/kernel/osrelease").strip(), ()
    except BootFailed as failure:
        if not failure.in_user_space and not session.verbose:
            session.step("no user space; starting it again with its whole log on the console")
            session.drop()
            session.verbose = True
            kernel, finding = _boot(session)
            if kernel is not None:
                session.notes.append(f"the first boot failed, the second did not: {failure}")
            return kernel, finding
        return None, (str(failure), *failure.evidence)
    except HvHostError as error:
        # A machine that could not even be started is the caller's to hear of.
        if not session.machines:
            raise
        return None, (str(error),)


def run_rows(
    guest: PreparedGuest,
    rows: Sequence[Row],
    cpus: int,
    observer: Observer,
    *,
    timing: Timing | None = None,
    proofs: Sequence[Proof] = PROOFS,
    inspect: Callable[[Session], None] = lambda session: None,
) -> Outcome:
    """Run *rows* on *guest*; *inspect* sees the session when all is done and the machine ended.

    *inspect* must not raise: the results would be lost.

    :class:`HvHostError` only where no machine could be started at all.
    """
    wanted = {row.id: row for row in rows}
    plan = [(proof, wanted[proof.row_id]) for proof in proofs if proof.row_id in wanted]
    provable = {row.id for _, row in plan}
    results: dict[str, RowResult] = {}

    def done(result: RowResult) -> None:
        results[result.row.id] = result
        observer.row_done(result)

    for row in rows:
        if row.id not in provable:
            done(_missing(row, guest))
    bus_found: bool | None = None
    finding: tuple[str, ...] = ()
    kernel: str | None = None
    session = Session(guest, cpus, observer.step, timing)
    try:
        if plan:
            kernel, finding = _boot(session)
            bus_found = kernel is not None
        for proof, row in plan:
            if lacks := what_guest_lacks(row, guest.modules, guest.daemons):
                done(RowResult(row, Status.GUEST_LACKS, evidence=(lacks, *finding)))
            elif not bus_found:
                done(RowResult(row, Status.FAILS, evidence=finding))
            else:
                observer.row_started(row)
                done(_prove_surely(proof, row, session))
    finally:
        session.drop()
        inspect(session)
    notes = list(session.notes)
    if kernel is not None and guest.modules is not None and kernel != guest.modules.release:
        notes.append(
            f"the guest runs {kernel}, its modules are of {guest.modules.release}: "
            "no module of them can load"
        )
    if bus_found and guest.modules is not None and not has_driver(VMBUS, guest.modules):
        notes.append("the guest has a bus although its modules tree does not name hv_vmbus")
    return Outcome(
        results=tuple(results[row.id] for row in rows),
        kernel=kernel or guest.release,
        bus_found=bus_found,
        finding=finding,
        notes=tuple(notes),
    )
