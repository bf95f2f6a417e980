"""A serial port as a Unix stream socket: raw bytes of the UART, any number of clients.

The guest never waits for a client: what a slow one has not read is kept up to a limit, and beyond
it that client is dropped. Nothing here runs while nothing happens; the worker's loop calls back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

CONSOLE_SCROLLBACK = 64 << 10
"""Bytes of COM1 a new client gets first."""

CLIENT_LIMIT = 1 << 20
"""Bytes kept for a client that does not read, before it is dropped."""

MAXIMUM_CLIENTS = 32
_READ_SIZE = 4096
_FLUSH_SECONDS = 0.5


class EventLoop(Protocol):
    """What a serial port needs of the worker's loop; callbacks run in the loop's thread.

    One file descriptor is given to one of :meth:`add_reader` and :meth:`add_writer`, never both.
    """

    def add_reader(self, fd: int, callback: Callable[[], object], /) -> object: ...

    def add_writer(self, fd: int, callback: Callable[[], object], /) -> object: ...

    def remove(self, fd: int, /) -> object: ...

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object: ...


def listen(path: Path) -> socket.socket:
    """A listening, non-blocking Unix socket at *path*, mode 0600.

    The name appears only once connections are accepted, so who sees it may connect.
    """
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(temporary))
        temporary.chmod(0o600)
        listener.listen(16)
        temporary.rename(path)
    except BaseException:
        listener.close()
        raise
    return listener


class _Client:
    """One connection; a second descriptor of it waits for writability."""

    __slots__ = ("behind", "connection", "pending", "reading", "writer", "writing")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.writer = os.dup(connection.fileno())
        self.pending = bytearray()
        self.behind = False
        self.reading = True
        self.writing = False

    def send(self) -> None:
        """Hand as much as the socket takes to it; ``OSError`` when the client is gone."""
        while self.pending:
            try:
                sent = self.connection.send(self.pending)
            except BlockingIOError:
                return
            del self.pending[:sent]

    def hung_up(self) -> bool:
        """Whether the client has closed both directions (a half-closed one still listens)."""
        poller = select.poll()
        poller.register(self.connection, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll(0))


class SerialSocket:
    """One serial port's clients.

    *on_input* gets the bytes clients type, in the loop's thread. *scrollback* is how many bytes of
    the past a new client gets first. :meth:`write` may be called from any thread.
    """

    def __init__(
        self, path: str | Path, on_input: Callable[[bytes], object], scrollback: int = 0
    ) -> None:
        self._path = Path(path)
        self._on_input = on_input
        self._limit = scrollback
        self._past = bytearray()
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._loop: EventLoop | None = None
        self._listener = listen(self._path)

    def fileno(self) -> int:
        """The listening socket's descriptor."""
        return self._listener.fileno()

    def attach(self, loop: EventLoop) -> None:
        """Take clients from now on; called once, in the loop's thread."""
        self._loop = loop
        loop.add_reader(self.fileno(), self._accept)

    def write(self, data: bytes) -> None:
        """Send what the guest's UART sent to every client; never blocks."""
        with self._lock:
            if self._limit:
                self._past += data
                if len(self._past) > 2 * self._limit:  # trimmed rarely, not at every byte
                    del self._past[: -self._limit]
            for client in list(self._clients):
                self._send(client, data)

    def close(self) -> None:
        """Give clients a last chance to read, then let go of them and of the path.

        Those too that connected when the machine was about to stop.
        """
        if self._loop is not None:
            self._loop.remove(self.fileno())
            while self._accept():
                pass
        self._listener.close()
        self._path.unlink(missing_ok=True)
        deadline = time.monotonic() + _FLUSH_SECONDS
        with self._lock:
            for client in list(self._clients):
                client.connection.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    client.connection.sendall(client.pending)
                except OSError as error:
                    logger.debug("%s: a client lost the end: %s", self._path.name, error)
                self._clients.discard(client)
                self._release(client)

    def _accept(self) -> bool:
        """Take the client that waits; whether there was one."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        connection.setblocking(False)
        assert self._loop is not None
        with self._lock:
            for client in [each for each in self._clients if each.hung_up()]:
                self._drop(client)
            if len(self._clients) >= MAXIMUM_CLIENTS:
                logger.warning(
                    "%s has %d clients; refused one more", self._path.name, MAXIMUM_CLIENTS
                )
                connection.close()
                return True
            client = _Client(connection)
            self._clients.add(client)
            self._loop.add_reader(connection.fileno(), lambda: self._read(client))
            self._send(client, bytes(self._past[-self._limit :]) if self._limit else b"")
        return True

    def _read(self, client: _Client) -> None:
        """The client typed, or closed its sending side."""
        if client not in self._clients:
            return
        assert self._loop is not None
        try:
            data = client.connection.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_input(data)
            return
        with self._lock:
            if client in self._clients:
                if client.hung_up():
                    self._drop(client)
                else:
                    client.reading = False
                    self._loop.remove(client.connection.fileno())

    def _send(self, client: _Client, data: bytes) -> None:
        """Queue *data* and send what goes; the lock is held."""
        assert self._loop is not None
        client.pending += data
        if client.behind:
            if len(client.pending) > CLIENT_LIMIT:
                logger.warning(
                    "%s: dropped a client that left %d bytes unread",
                    self._path.name,
                    len(client.pending),
                )
                self._drop(client)
            return
        try:
            client.send()
        except OSError:
            self._drop(client)
            return
        if client.pending:
            client.behind = True
            self._loop.call_soon_threadsafe(lambda: self._arm(client))

    def _arm(self, client: _Client) -> None:
        """In the loop's thread: wait until the client reads again."""
        with self._lock:
            if client in self._clients and self._loop is not None:
                client.writing = True
                self._loop.add_writer(client.writer, lambda: self._writable(client))

    def _writable(self, client: _Client) -> None:
        with self._lock:
            if client not in self._clients:
                return
            assert self._loop is not None
            try:
                client.send()
            except OSError:
                self._drop(client)
                return
            if not client.pending:
                self._loop.remove(client.writer)
                client.behind = client.writing = False

    def _drop(self, client: _Client) -> None:
        """Part with a client; the lock is held."""
        assert self._loop is not None
        self._clients.discard(client)
        with contextlib.suppress(OSError):  # the client may have gone first
            client.connection.shutdown(socket.SHUT_RDWR)
        # A descriptor closed in this thread could be reused while the loop still watches it.
        self._loop.call_soon_threadsafe(lambda: self._release(client))

    def _release(self, client: _Client) -> None:
        """In the loop's thread: give the descriptors back."""
        assert self._loop is not None
        if client.reading:
            self._loop.remove(client.connection.fileno())
        if client.writing:
            self._loop.remove(client.writer)
        client.connection.close()
        os.close(client.writer)
