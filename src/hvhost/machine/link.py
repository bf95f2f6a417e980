"""Between two processes of one machine: messages, requests with their answers, open files.

A frame is its length, the number of its request (0: a message that nobody answers), whether it is
the answer, and JSON: the name of a message's dataclass and its fields. The other end may be in
the hands of a hostile guest, so a frame is bounded, and what is not one of the known messages ends
the link. Whoever waits for an answer gets :class:`LinkLostError` when the other end is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final

from hvhost.errors import GuestMemoryError, HvHostError, RemoteProtocolError
from hvhost.plain import build, dump

log = logging.getLogger(__name__)

#: Bytes of the longest frame: a ring of a million pages, which no driver asks for, fits.
LONGEST: Final = 16 << 20
MOST_FILES: Final = 253  # SCM_MAX_FD
_HEADER = struct.Struct("<IIB")


class LinkLostError(HvHostError):
    """The other process is gone."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a request that gives nothing back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer to a request that failed: an exception of one of :data:`_ERRORS`' names.

    ``number`` and ``path`` are those of an :class:`OSError`.
    """

    kind: str
    text: str
    number: int = 0
    path: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What *error* says."""
        if isinstance(error, OSError) and error.errno is not None:
            path = None if error.filename is None else str(error.filename)
            return cls("OSError", error.strerror or "", error.errno, path)
        name = type(error).__name__
        return cls(name if name in _ERRORS else "HvHostError", str(error) or name)

    def exception(self) -> Exception:
        """The exception to raise."""
        if self.kind == "OSError":
            return OSError(self.number, self.text, self.path)
        return _ERRORS.get(self.kind, HvHostError)(self.text)


_ERRORS: Final = {
    each.__name__: each for each in (HvHostError, RemoteProtocolError, GuestMemoryError)
}


@dataclass(frozen=True, slots=True)
class Received:
    """A message, the number to answer it with (0: no answer), and open files that are ours now."""

    message: Any
    number: int = 0
    files: tuple[int, ...] = ()


class Link:
    """One end of *connection*, a stream socket; *name* is the other end's, for people.

    *kinds* are the dataclasses that may come; *receive* gets each message on the link's own thread
    and must not wait there for the other end; *lost* is called there once, at the end.
    """

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        kinds: Sequence[type],
        receive: Callable[[Received], None],
        lost: Callable[[], None],
    ) -> None:
        self._gone = f"{name} is gone; start the machine again."
        self._name, self._connection = name, connection
        self._kinds = {each.__name__: each for each in (*kinds, Done, Failure)}
        self._receive, self._lost = receive, lost
        self._sending = threading.Lock()
        self._waiting: dict[int, SimpleQueue[Any]] = {}
        self._numbers = 0
        self._over = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def send(self, message: Any, files: Sequence[int] = ()) -> None:
        """Send a message; the other end gets copies of *files*. Nothing if it is gone."""
        with contextlib.suppress(LinkLostError):
            self._write(0, False, message, files)

    def request(
        self, message: Any, files: Sequence[int] = (), *, timeout: float | None = None
    ) -> Any:
        """Send a message and wait for its answer; the exception it may be is raised.

        :class:`TimeoutError` if there is none within *timeout* seconds.
        """
        answer: SimpleQueue[Any] = SimpleQueue()
        with self._sending:
            self._numbers += 1
            number = self._numbers
        self._waiting[number] = answer
        try:
            if self._over:
                raise LinkLostError(self._gone)
            self._write(number, False, message, files)
            result = answer.get(timeout=timeout)
        except Empty:
            raise TimeoutError(f"{self._name} does not answer.") from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(result, Failure):
            raise result.exception()
        if isinstance(result, LinkLostError):
            raise result
        return result

    def reply(self, number: int, message: Any = Done()) -> None:
        """Answer a request."""
        with contextlib.suppress(LinkLostError):
            self._write(number, True, message, ())

    def serve(self, number: int, function: Callable[[], Any]) -> None:
        """Answer a request with what *function* returns or raises."""
        try:
            result = function()
        except Exception as error:
            if not isinstance(error, HvHostError | OSError):
                log.exception("in a request of %s", self._name)
            self.reply(number, Failure.of(error))
        else:
            self.reply(number, Done() if result is None else result)

    def close(self) -> None:
        """End it; the thread ends too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._connection.close()

    def _write(self, number: int, answer: bool, message: Any, files: Sequence[int]) -> None:
        fields = dump(message)
        body = f'["{type(message).__name__}",{fields}]'.encode()
        frame = _HEADER.pack(len(body), number, answer) + body
        try:
            with self._sending:
                sent = socket.send_fds(self._connection, [frame], files)
                if sent < len(frame):
                    self._connection.sendall(memoryview(frame)[sent:])
        except OSError as error:
            raise LinkLostError(self._gone) from error

    def _run(self) -> None:
        try:
            while True:
                self._next()
        except (OSError, HvHostError, ValueError, TypeError, KeyError, AttributeError) as error:
            if not isinstance(error, OSError):
                log.warning("%s does not keep to the protocol: %r", self._name, error)
        except Exception:
            log.exception("in a message of %s", self._name)
        self._over = True
        for answer in list(self._waiting.values()):
            answer.put(LinkLostError(self._gone))
        self._lost()

    def _next(self) -> None:
        """Handle one frame; :class:`ConnectionResetError` at the end."""
        header, files, _, _ = socket.recv_fds(self._connection, _HEADER.size, MOST_FILES)
        kept = False
        try:
            length, number, answer = _HEADER.unpack(
                header + self._exactly(_HEADER.size - len(header))
            )
            if length > LONGEST:
                raise HvHostError(f"a frame of {length} bytes")
            name, fields = json.loads(self._exactly(length))
            message = build(self._kinds[name], fields)
            if not answer:
                kept = True
                self._receive(Received(message, number, tuple(files)))
            elif number in self._waiting:
                self._waiting[number].put(message)
        finally:
            if not kept:
                for descriptor in files:
                    os.close(descriptor)

    def _exactly(self, length: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < length:
            piece = self._connection.recv(min(length - len(pieces), 1 << 20))
            if not piece:
                raise ConnectionResetError("the other end was closed")
            pieces += piece
        return bytes(pieces)
