"""A person's terminal, or a pipe, on a machine's serial port."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import termios
import tty
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path

from hvhost.errors import HvHostError

ESCAPE = b"\x1d"
"""Ctrl-], as in virsh and telnet."""

_READ_SIZE = 65536


class Ending(Enum):
    """Why a terminal session ended."""

    ESCAPED = auto()
    """The person typed the escape character."""
    CLOSED = auto()
    """The worker closed the port: the machine stopped."""


def attach(serial_socket: Path, source: int, sink: int, *, only_output: bool = False) -> Ending:
    """Copy *source* to the port and the port to *sink* (file descriptors) until one ends it.

    A terminal as *source* is put into raw mode for that long, and only there the escape character
    counts. The end of *source* alone ends nothing. What *sink* does not take yet is kept here, so
    that the guest is never held up.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with connection:
        try:
            connection.connect(str(serial_socket))
        except OSError as error:
            raise HvHostError(
                f"the serial port {serial_socket} cannot be opened ({error.strerror});"
                " has the machine stopped?"
            ) from error
        with _raw(source) as interactive:
            return _copy(connection, None if only_output else source, sink, interactive)


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[bool]:
    """Raw mode for the block; yields whether there is a terminal to type at."""
    if not os.isatty(terminal):
        yield False
        return
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal, termios.TCSANOW)
    try:
        yield True
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _copy(connection: socket.socket, source: int | None, sink: int, interactive: bool) -> Ending:
    """The loop of :func:`attach`; *source* is ``None`` when nobody types."""
    output, typed = bytearray(), bytearray()
    poller = select.poll()
    while True:
        with contextlib.suppress(KeyError):
            poller.unregister(sink)
        poller.register(connection, select.POLLIN | (select.POLLOUT if typed else 0))
        if source is not None:
            with contextlib.suppress(KeyError):
                poller.unregister(source)
            if len(typed) < _READ_SIZE:
                poller.register(source, select.POLLIN)
        if output:
            poller.register(sink, select.POLLOUT)
        ready = dict(poller.poll())
        if sink in ready and output:
            # A pipe that polls writable takes PIPE_BUF (at least 512 bytes) without blocking.
            del output[: os.write(sink, output[:512])]
        if source is not None and ready.get(source):
            data = os.read(source, _READ_SIZE)
            if interactive and ESCAPE in data:
                return Ending.ESCAPED
            if not data:
                poller.unregister(source)
                source = None
            typed += data
        if ready.get(connection.fileno(), 0) & select.POLLOUT:
            del typed[: connection.send(typed)]
        if ready.get(connection.fileno(), 0) & ~select.POLLOUT:
            received = _receive(connection)
            if not received:
                _drain(sink, output)
                return Ending.CLOSED
            output += received


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_READ_SIZE)
    except ConnectionResetError:
        return b""


def _drain(sink: int, output: bytearray) -> None:
    while output:
        del output[: os.write(sink, output)]
