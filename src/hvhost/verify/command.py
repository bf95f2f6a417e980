"""``hvhost verify``: prepare the guest, run the rows, print and keep what was found."""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from hvhost.errors import HvHostError
from hvhost.guests.catalog import DEFAULT_GUEST, FULL_GUESTS
from hvhost.manager.definition import define
from hvhost.manager.launcher import check_shape
from hvhost.verify.baseline import exit_status, failures, read_baseline, shipped_baseline
from hvhost.verify.contract import Row, find_rows, requested_rows
from hvhost.verify.guest import PreparedGuest
from hvhost.verify.options import VerifyOptions
from hvhost.verify.outputs import Outputs, check_outputs
from hvhost.verify.report import Reporter, render_report
from hvhost.verify.requirements import lacks_only_a_program
from hvhost.verify.results import VerifyReport
from hvhost.verify.runner import run_rows
from hvhost.verify.session import Session, Timing
from hvhost.version import own_version

Prepare = Callable[[VerifyOptions, Callable[[str], None]], PreparedGuest]


def describe_host(transport: str) -> dict[str, Any]:
    """What the JSON says of this computer."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "hvhost": own_version() or "source tree",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "transport": transport,
    }


def _allowed_lacks(options: VerifyOptions) -> frozenset[str]:
    allowed = {row.id for row in find_rows(options.allow_lacks, option="--allow-lacks")}
    if options.baseline is not None:
        allowed |= read_baseline(options.baseline)
    if options.kernel is None and not options.debs:
        allowed |= shipped_baseline(options.guest or DEFAULT_GUEST)
    return frozenset(allowed)


def _allowed_of(guest: PreparedGuest, rows: Sequence[Row]) -> frozenset[str]:
    """Rows that say nothing about this kernel if they are lacking."""
    # Programs that its daemons' distribution is known not to have: not the kernel's to bring.
    known = shipped_baseline(guest.daemons_of)
    excused = {
        row.id
        for row in rows
        if row.id in known and lacks_only_a_program(row, guest.modules, guest.daemons)
    }
    if guest.is_64_bit:
        # About another kernel than this one: shown where the distribution has that.
        excused.add("pae")
    return frozenset(excused)


def verify_guest(
    options: VerifyOptions,
    prepare: Prepare,
    *,
    timing: Timing | None = None,
    out: Console | None = None,
    progress: Console | None = None,
) -> tuple[int, VerifyReport]:
    """:func:`verify` of a guest made by *prepare*, with the report itself."""
    rows = requested_rows(options.rows)
    if options.guest in FULL_GUESTS:
        from hvhost.verify.complete import TIMING, provable

        if options.daemons is not None:
            raise HvHostError(
                f"The complete guest {options.guest} has the daemons of its own packages; leave "
                "--daemons out, or name a guest without -full."
            )
        rows = provable(rows, options.guest, named=bool(options.rows))
        timing = timing or TIMING
    allowed = _allowed_lacks(options)
    check_shape(define(kernel="", cpus=options.cpus, memory=options.memory))
    check_outputs(options)
    outputs = Outputs(options)
    used = set[str]()

    def inspect(session: Session) -> None:
        used.update(session.transports)
        outputs.keep_session(session)

    with Reporter(progress or Console(stderr=True)) as reporter:
        reporter.step("preparing the guest")
        guest = prepare(options, reporter.step)
        allowed |= _allowed_of(guest, rows)
        outcome = run_rows(guest, rows, options.cpus, reporter, timing=timing, inspect=inspect)
    report = VerifyReport(
        host=describe_host(", ".join(sorted(used)) or options.transport.value),
        guest={"kernel": outcome.kernel, "os": guest.os_name},
        results=outcome.results,
        bus_found=outcome.bus_found,
        finding=outcome.finding,
        notes=outcome.notes,
    )
    named = bool(options.rows)
    failed = failures(report.results, rows_named=named, allowed=allowed)
    try:
        (out or Console()).print(render_report(report, failed))
    finally:  # also when whoever was to read the table has gone
        outputs.keep_report(report)
    outputs.check_kept()
    status = exit_status(
        report.results, rows_named=named, allowed=allowed, bus_found=report.bus_found
    )
    return status, report


def verify(options: VerifyOptions) -> int:
    """Verify a guest and print the table; the exit status. Called in the main thread.

    :class:`HvHostError` for bad input and for a computer that cannot start a machine.
    """
    if options.guest in FULL_GUESTS:
        from hvhost.verify.complete import prepare as prepare_complete

        make: Prepare = prepare_complete
    else:
        from hvhost.verify.live_guest import prepare

        make = prepare
    # As Ctrl-C does: out of all blocks in order, so that no machine is left.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        return verify_guest(options, make)[0]
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)
