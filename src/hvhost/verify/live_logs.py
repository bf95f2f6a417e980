"""What a live machine says and what happens to it, kept for when its worker is gone."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineEvent

log = logging.getLogger(__name__)

EVENT_WAIT = 5.0
_CONSOLE_CONNECT_SECONDS = 5.0


class ConsoleLog:
    """All that a machine's console said, collected in a thread."""

    def __init__(self, path: Path) -> None:
        self._data = bytearray()
        self._lock = threading.Lock()
        self._socket = connect_serial(path)
        self._thread = threading.Thread(target=self._collect, name="console", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with self._socket:
            try:
                while data := self._socket.recv(1 << 16):
                    with self._lock:
                        self._data += data
            except OSError as error:
                log.debug("the console ended: %s", error)

    def text(self) -> str:
        with self._lock:
            return self._data.decode("utf-8", "replace")

    def finish(self, timeout: float) -> None:
        """Wait for the last words of a machine that has ended."""
        self._thread.join(timeout)


class EventLog:
    """A machine's events, collected in a thread, so that its last ones outlive its worker."""

    def __init__(self, fetch: Callable[[int, float], list[MachineEvent]]) -> None:
        self._fetch = fetch
        self._events: list[MachineEvent] = []
        self._over = False
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._collect, name="events", daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        seen = 0
        while True:
            try:
                fresh = self._fetch(seen, EVENT_WAIT)
            except HvHostError as error:
                log.debug("no more events: %s", error)
                with self._arrived:
                    self._over = True
                    self._arrived.notify_all()
                return
            with self._arrived:
                self._events += fresh
                self._arrived.notify_all()
            seen = max([seen, *(event.sequence for event in fresh)])

    def after(self, sequence: int, timeout: float) -> list[MachineEvent] | None:
        """Events above *sequence*; waits up to *timeout* seconds for the first.

        ``None`` when there are none and none will come.
        """

        def newer() -> list[MachineEvent]:
            return [event for event in self._events if event.sequence > sequence]

        with self._arrived:
            self._arrived.wait_for(lambda: self._over or newer(), timeout)
            return newer() or (None if self._over else [])


def connect_serial(path: Path) -> socket.socket:
    """A machine's serial port, which is there a moment after it was started."""
    deadline = time.monotonic() + _CONSOLE_CONNECT_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise HvHostError(
                    f"the machine's serial port {path.name} cannot be reached: {error.strerror}."
                ) from error
            time.sleep(0.02)
        else:
            return connection
