"""The worker's event loop: file descriptors, timers, calls from other threads; idle costs nothing.

Not asyncio, because a machine must start quickly also where Python is slow, and asyncio's import
alone costs more than everything this loop does.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable

from hvhost.errors import HvHostError

log = logging.getLogger(__name__)
_LONGEST_SLEEP = 3600.0  # epoll takes no more than 24 days
Callback = Callable[[], object]


class Loop:
    """Runs callbacks on the thread that calls :meth:`run`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Callback]] = []
        self._order = itertools.count()
        self._soon: deque[Callback] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = False
        self.wake_ups = 0
        self.add_reader(self._wake, lambda: os.eventfd_read(self._wake))

    def _add(self, descriptor: int, callback: Callback, events: int) -> None:
        known = descriptor in self._callbacks
        self._callbacks[descriptor] = callback
        if known:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)

    def add_reader(self, descriptor: int, callback: Callback) -> None:
        """Call *callback* whenever *descriptor* is readable; any thread."""
        self._add(descriptor, callback, select.EPOLLIN)

    def add_writer(self, descriptor: int, callback: Callback) -> None:
        """Call *callback* whenever *descriptor* is writable; any thread."""
        self._add(descriptor, callback, select.EPOLLOUT)

    def watch(self, descriptor: int, callback: Callback, *, read: bool, write: bool) -> None:
        """Call *callback* for what is asked, and whenever the peer has hung up; any thread."""
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        self._add(descriptor, callback, events)

    def remove(self, descriptor: int) -> None:
        """Forget a descriptor; any thread, before it is closed."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Call *callback* on the loop's thread, soon; any thread, signal handlers too."""
        self._soon.append(callback)
        os.eventfd_write(self._wake, 1)

    def call_later(self, seconds: float, callback: Callback) -> None:
        """Call *callback* after *seconds*; the loop's thread only."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def stop(self) -> None:
        """Make :meth:`run` return; any thread."""
        self._running = False
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Until :meth:`stop`; a stop from within a callback lets the others that are due run.

        What a callback raises is logged and ends nothing.
        """
        self._running = True
        while self._running:
            timeout = -1.0
            if self._soon:
                timeout = 0.0
            elif self._timers:
                timeout = min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST_SLEEP)
            ready = self._epoll.poll(timeout)
            self.wake_ups += 1
            for descriptor, _ in ready:
                callback = self._callbacks.get(descriptor)
                if callback is not None:
                    self._call(callback)
            now, due = time.monotonic(), []
            while self._timers and self._timers[0][0] <= now:
                due.append(heapq.heappop(self._timers)[2])
            for callback in due:  # one that asks for another at once gets it in the next round
                self._call(callback)
            for _ in range(len(self._soon)):
                self._call(self._soon.popleft())

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except HvHostError as error:
            log.warning("%s", error)
        except Exception:  # one callback's bug must not end the machine
            log.exception("in the worker's loop")

    def close(self) -> None:
        """Give its own descriptors back; those it watched are their owners'."""
        self._epoll.close()
        os.close(self._wake)
