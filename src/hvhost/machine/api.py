"""The door of a live machine: its HTTP/JSON API on a Unix socket only its owner can open.

At start the worker pays for a listening socket and a sleeping thread. The web server and
everything it needs are imported when the first client connects, in that thread; see
:mod:`hvhost.machine.application` for what is served.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from hvhost.machine.model import LiveMachine
from hvhost.machine.serial import listen

if TYPE_CHECKING:
    from hvhost.machine.application import Server

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 3.0


class ApiServer:
    """Serves one machine's API; :meth:`start` returns at once.

    The socket exists, mode 0600, from the moment of :meth:`start` to :meth:`close`.
    """

    def __init__(self, machine: LiveMachine, socket_path: str | Path) -> None:
        self._machine = machine
        self._path = Path(socket_path)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)
        self._lock = threading.Lock()
        self._closing = False
        self._server: Server | None = None

    def start(self) -> None:
        """Listen; ``OSError`` when the socket cannot be bound."""
        self._listener = listen(self._path)
        self._thread.start()

    def close(self) -> None:
        """Take no more clients, let requests being answered end (a second at most), and stop."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            if self._server is not None:
                self._server.close()
        os.write(self._wake_writer, b"\0")
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)
            self._listener.close()
        self._path.unlink(missing_ok=True)
        if not self._thread.is_alive():
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake_reader, select.POLLIN)
        poller.poll()
        if self._closing:
            return
        from hvhost.machine.application import Server

        with self._lock:
            if self._closing:
                return
            self._server = Server(self._machine)
        try:
            self._server.run(self._listener)
        except Exception:
            logger.exception("the API of machine %s ended", self._machine.config.name)
