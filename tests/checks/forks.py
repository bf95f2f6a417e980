"""Tests in a fork of a process that has pytest and all tests imported already."""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from math import ceil

import pytest
from _pytest.runner import runtestprotocol

from checks.find import SWITCH
from checks.switch import NOTES, OUT

#: What tests in a fork may take: so many times what they took before, and some seconds more. On a
#: busy computer that is of the processor's time, and of the clock's only what waits for ever.
PATIENCE = 5
PROCESSOR_SECONDS = 10
CLOCK_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test; *passed* is ``None`` if it was still running when time was over."""

    test: str
    passed: bool | None
    seconds: float


def run_forked(
    items: Sequence[pytest.Item],
    *,
    seconds: float,
    out: int = -1,
    notes: str = "",
    stop_early: bool = True,
    told: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run *items*, which took so many *seconds*, in a child without check number *out*.

    Ends at the first failure where *stop_early*. *told* hears of each test as it ends.
    """
    reader, writer = os.pipe()
    gc.freeze()  # what is there stays shared
    child = os.fork()
    if not child:
        os.close(reader)
        _in_child(items, seconds, out, notes, stop_early, writer)
    os.close(writer)
    try:
        return _listen(reader, time.monotonic() + CLOCK_SECONDS + 2 * PATIENCE * seconds, told)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _listen(reader: int, until: float, told: Callable[[Outcome], None]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    rest, running = b"", ""
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        data = os.read(reader, 1 << 16) if ready else b""
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            test, passed, seconds = json.loads(line)
            if passed is None:
                running = test
                continue
            running = ""
            outcomes.append(Outcome(test, passed, seconds))
            told(outcomes[-1])
        if not data:  # the end, or the time is over
            if running:
                outcomes.append(Outcome(running, None, 0.0))
            return outcomes


def _in_child(
    items: Sequence[pytest.Item],
    seconds: float,
    out: int,
    notes: str,
    stop_early: bool,
    writer: int,
) -> None:
    try:
        os.setsid()
        most = ceil(PROCESSOR_SECONDS + PATIENCE * seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most, most))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ[OUT], os.environ[NOTES] = str(out), notes
        switch = import_module(SWITCH)
        switch.out, switch.notes = out, notes  # type: ignore[attr-defined]
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)

        def tell(test: str, passed: bool | None, seconds: float) -> None:
            os.write(writer, json.dumps([test, passed, seconds]).encode() + b"\n")

        for item, following in zip(items, [*items[1:], None], strict=True):
            tell(item.nodeid, None, 0.0)
            started = time.monotonic()
            reports = runtestprotocol(item, log=False, nextitem=following)
            passed = not any(report.failed for report in reports)
            tell(item.nodeid, passed, time.monotonic() - started)
            if stop_early and not passed:
                break
        items[0].session._setupstate.teardown_exact(None)
    except BaseException as error:
        sys.stderr.write(repr(error))
    finally:
        os._exit(0)
