"""A machine that lives and dies with the command that started it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError
from hvhost.machine.config import MachineConfig
from hvhost.manager.launcher import SeeLogError, Worker, early_end, launch_forked

if TYPE_CHECKING:
    from hvhost.manager.terminal import Ending

_END_SECONDS = 5.0


def run(
    config: MachineConfig,
    *,
    source: int = 0,
    sink: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Ending:
    """Run *config* with its console on two file descriptors until it stops or the person leaves.

    *progress* gets what takes time before there is a console, and what ended before that.

    Nothing of the machine is left when this returns or raises, but for a log that the error names.
    Raises :class:`HvHostError` with the worker's words when the machine fails. Called in the main
    thread.
    """
    # Ends the blocks below in order, which gives the terminal back its modes.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        worker = launch_forked(config, progress)
        log_named = False
        try:
            return _attend(worker, source, sink, progress)
        except SeeLogError:
            log_named = True
            raise
        finally:
            if worker.process.poll() is None:
                worker.stop()
            if not log_named:
                worker.directory.remove()
    finally:
        signal.signal(signal.SIGTERM, before)


def _attend(worker: Worker, source: int, sink: int, progress: Callable[[str], None]) -> Ending:
    from hvhost.manager.terminal import Ending, attach  # while the guest boots

    try:
        ending = attach(worker.directory.serial_socket(1), source, sink)
    except HvHostError:
        if not worker.ended(_END_SECONDS):
            raise
        worker.check_ended_well()
        progress(f"{early_end(worker.directory, 'its console could be shown')}.")
        return Ending.CLOSED
    if ending is Ending.CLOSED:
        if not worker.ended(_END_SECONDS):
            raise SeeLogError(
                f"the worker of machine {worker.directory.name!r} closed its console but did not"
                f" end; it was killed, and {worker.directory.log_file} has its log."
            )
        worker.check_ended_well()
    return ending


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)
