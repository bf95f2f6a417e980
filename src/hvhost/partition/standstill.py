"""A partition that stands still: no virtual processor runs, and its clock does not go on.

Hyper-V freezes a paused partition's reference time, so that its guest finds no hole in it: no
watchdog of the guest barks, and no time-out of its own has passed. KVM's clock, from which the
reference counter and the TSC page are made, runs on by itself and is put back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from hvhost.errors import HvHostError
from hvhost.partition.processor import Processor

log = logging.getLogger(__name__)


class Clock(Protocol):
    """The part of :class:`hvhost.kvm.vm.Vm` that counts time."""

    def clock_nanoseconds(self) -> int: ...

    def set_clock_nanoseconds(self, nanoseconds: int) -> None: ...


class Standstill:
    """Stops and starts *processors* and *clock* together; one thread at a time."""

    def __init__(self, processors: Sequence[Processor], clock: Clock) -> None:
        self._processors, self._clock = processors, clock
        self._stopped_at = 0

    def begin(self) -> None:
        """When this returns, nothing runs; :class:`HvHostError`, and all runs on, if that fails."""
        paused: list[Processor] = []
        try:
            for processor in self._processors:
                processor.pause()
                paused.append(processor)
            self._stopped_at = self._clock.clock_nanoseconds()
        except BaseException:
            for processor in paused:
                processor.resume()
            raise

    def end(self, before: Callable[[], None] = lambda: None) -> None:
        """Let all run again; *before* is called with the clock put back and nothing running."""
        try:
            try:
                self._clock.set_clock_nanoseconds(self._stopped_at)
            except OSError as error:
                # The guest's clock jumps ahead then, which is right, but its time-outs pass.
                log.warning("the partition's clock could not be put back: %s", error)
            before()
        except HvHostError as error:
            log.warning("%s", error)
        finally:
            for processor in self._processors:
                processor.resume()
