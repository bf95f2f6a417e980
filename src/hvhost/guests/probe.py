"""The host's end of the probe: commands and files in a running guest."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvhost.compiler import build_static
from hvhost.errors import HvHostError
from hvhost.guests import probe_protocol as protocol
from hvhost.guests.probe_protocol import Decoder, Ending, Message, MessageType

log = logging.getLogger(__name__)

# The AF_VSOCK port on which the probe serves requests, each connection by itself.
PROBE_PORT = 26742
SOURCE = Path(__file__).with_name("probe.c")
PING_INTERVAL = 1.0  # seconds
ANSWER_MARGIN = 10.0  # seconds beyond a command's own time limit, for a slow guest
FOLLOW_INTERVAL = 3600.0  # seconds between two looks at a command that says nothing
OUTPUT_LIMIT = 1 << 20  # bytes per stream
SCRIPT_PATH = "/tmp/.hvhost-script"
# Written once our initramfs has asked for the driver of every device (see initramfs.py).
READY_FILE = "/run/hvhost-ready"
# Written once the probe listens on Hyper-V sockets, or cannot (see probe.c).
SOCKETS_FILE = "/run/hvhost-sockets"
_LISTENING = b"listening\n"
_SELF = "/proc/self/exe"  # the probe itself, wherever it lies in the guest


class ProbeError(HvHostError):
    """The guest refused what the probe was asked, for the reason in the message."""


class ProbeTimeout(HvHostError):  # noqa: N818 # named after what happened
    """The guest did not answer in time: still booting, hung, or without our initramfs."""


class ProbeGone(HvHostError):  # noqa: N818 # named after what happened
    """The connection was closed: the machine ended or, over sockets, the guest did."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A command's end: ``status`` is its exit status, or minus the signal that ended it."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False

    @property
    def text(self) -> str:
        """Standard output as text, without the white space around it."""
        return self.stdout.decode("utf-8", "replace").strip()


class ProbeClient:
    """Runs commands in a guest; ``sock`` is connected to the probe, whatever carries the bytes.

    That is a Hyper-V socket (:data:`PROBE_PORT`) or the guest's second serial port, which all
    clients share.

    One thread at a time. A restart of the guest ends the request that runs (ProbeGone does not
    follow: call :meth:`wait_ready` and go on). Every method raises ProbeTimeout when the guest does
    not answer, and ProbeGone when the port was closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._decoder = Decoder()
        self._messages: deque[Message] = deque()
        # Answers meant for an earlier client of the same guest must not be taken for ours.
        self._requests = itertools.count(secrets.randbits(24) << 4 | 1)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _next_request(self) -> int:
        return next(self._requests) & 0xFFFFFFFF

    def _send(self, frame: bytes, deadline: float) -> None:
        view = memoryview(frame)
        while view:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                view = view[self._socket.send(view) :]
            except TimeoutError:
                raise ProbeTimeout(
                    "The guest's probe does not read what it is sent; look at the guest's console."
                ) from None
            except OSError as error:
                raise ProbeGone(_GONE) from error

    def _receive(self, deadline: float) -> Message | None:
        """The next message; ``None`` when there is none by ``deadline``."""
        while not self._messages:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise ProbeGone(_GONE) from error
            if not data:
                raise ProbeGone(_GONE)
            self._messages += self._decoder.feed(data)
        return self._messages.popleft()

    def ping(self, timeout: float = 10.0) -> float:
        """Seconds until the probe answers."""
        request = self._next_request()
        start = time.monotonic()
        self._send(protocol.ping(request), start + timeout)
        while message := self._receive(start + timeout):
            if message.type == MessageType.PONG and message.request == request:
                return time.monotonic() - start
        raise ProbeTimeout(
            f"The guest's probe did not answer within {timeout:g} s; look at its console."
        )

    def wait_ready(self, timeout: float, *, drivers: bool = True) -> None:
        """Wait until the probe answers and, if ``drivers``, all drivers were loaded.

        Also to be called after a restart of the guest. Raises ProbeTimeout that says which of the
        two did not happen within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        self._wait_probe(timeout)
        if drivers:
            try:
                self.wait_file(READY_FILE, max(deadline - time.monotonic(), 1.0))
            except ProbeTimeout as error:
                raise ProbeTimeout(
                    f"The guest did not finish loading its drivers within {timeout:g} s; look at "
                    "its console and its dmesg."
                ) from error

    def wait_file(self, path: str, timeout: float) -> None:
        """Wait until a file is there, asleep meanwhile; ProbeTimeout if it does not come."""
        self.run([_SELF, "wait", path], timeout)

    def has_sockets(self, timeout: float) -> bool:
        """Whether the probe can be reached over Hyper-V sockets at :data:`PROBE_PORT`.

        ProbeTimeout if the guest has not found that out within ``timeout`` seconds.
        """
        self.wait_file(SOCKETS_FILE, timeout)
        return self.read_file(SOCKETS_FILE) == _LISTENING

    def _wait_probe(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        sent: set[int] = set()
        next_ping = 0.0
        while (now := time.monotonic()) < deadline:
            if now >= next_ping:
                request = self._next_request()
                sent.add(request)
                try:
                    self._send(protocol.ping(request), min(deadline, now + PING_INTERVAL))
                except ProbeTimeout:
                    log.debug("the serial port takes no more pings yet")
                next_ping = now + PING_INTERVAL
            message = self._receive(min(next_ping, deadline))
            if message is None:
                continue
            if message.type == MessageType.PONG and message.request in sent:
                return
            if message.type == MessageType.HELLO:
                next_ping = 0.0
        raise ProbeTimeout(
            f"The guest's probe did not answer within {timeout:g} s; look at its console."
        )

    def _answer(
        self, request: int, deadline: float, what: str, limit: int = 0
    ) -> tuple[protocol.Done, bytes, bytes]:
        """The end of a request and its two streams, each of at most ``limit`` bytes."""
        stdout, stderr = bytearray(), bytearray()
        while message := self._receive(deadline):
            if message.type == MessageType.HELLO:
                raise ProbeTimeout(
                    f"The guest's probe was started again during {what}; wait until it is ready "
                    "and try again."
                )
            if message.request != request:
                continue
            if message.type == MessageType.OUTPUT:
                stdout += message.body
            elif message.type == MessageType.ERRORS:
                stderr += message.body
            # The guest is told the limit, but is not trusted to keep it.
            if max(len(stdout), len(stderr)) > limit:
                raise ProbeError(
                    f"The guest sent more than {limit} bytes for {what}; do not trust this guest."
                )
            if message.type == MessageType.DONE:
                done = protocol.parse_done(message.body)
                if done is not None:
                    return done, bytes(stdout), bytes(stderr)
        raise ProbeTimeout(f"The guest did not finish {what} in time; look at its console.")

    def run(
        self,
        command: str | list[str],
        timeout: float = 30.0,
        *,
        output_limit: int = OUTPUT_LIMIT,
    ) -> ExecResult:
        """Run a shell command, or a program with its arguments, for at most ``timeout`` seconds.

        Each stream is cut after ``output_limit`` bytes. Raises ProbeTimeout when it takes longer;
        the command is killed then.
        """
        if isinstance(command, str):
            arguments = ["/bin/sh", "-c", command]
            if len(os.fsencode(command)) > protocol.WRITE_CHUNK:
                self.write_file(SCRIPT_PATH, os.fsencode(command))
                arguments = ["/bin/sh", SCRIPT_PATH]
        else:
            arguments = command
        what = " ".join(arguments)[:80]
        deadline = time.monotonic() + timeout + ANSWER_MARGIN
        request = self._next_request()
        encoded = [os.fsencode(argument) for argument in arguments]
        frame = protocol.execute(request, encoded, max(int(timeout * 1000), 1), output_limit)
        self._send(frame, deadline)
        done, stdout, stderr = self._answer(request, deadline, what, output_limit)
        if done.ending == Ending.TIMED_OUT:
            raise ProbeTimeout(f"The command {what} took longer than {timeout:g} s in the guest.")
        if done.ending == Ending.CANCELLED:
            raise ProbeError(f"The command {what} was ended by another request to the guest.")
        if done.ending == Ending.FAILED:
            raise ProbeError(f"The guest cannot run {what}: {_strerror(done.value)}.")
        status = -done.value if done.ending == Ending.SIGNALLED else done.value
        return ExecResult(status, stdout, stderr, done.truncated)

    def follow(self, arguments: Sequence[str], output: Callable[[bool, bytes], None]) -> int:
        """Run a program to its end, however long that takes; its status as in ExecResult.

        ``output`` gets what the program writes while it runs; true means standard error.
        """
        request = self._next_request()
        encoded = [os.fsencode(argument) for argument in arguments]
        frame = protocol.execute(request, encoded, 0, 0xFFFFFFFF)
        self._send(frame, time.monotonic() + ANSWER_MARGIN)
        while True:
            message = self._receive(time.monotonic() + FOLLOW_INTERVAL)
            if message is None or message.request != request:
                if message is not None and message.type == MessageType.HELLO:
                    raise ProbeGone("The guest's probe was started again while the command ran.")
                continue
            if message.type in (MessageType.OUTPUT, MessageType.ERRORS):
                output(message.type == MessageType.ERRORS, message.body)
            elif message.type == MessageType.DONE:
                done = protocol.parse_done(message.body)
                if done is None:
                    continue
                if done.ending == Ending.CANCELLED:
                    raise ProbeError("The command was ended by another request to the guest.")
                if done.ending == Ending.FAILED:
                    raise ProbeError(f"The guest cannot run it: {_strerror(done.value)}.")
                return -done.value if done.ending == Ending.SIGNALLED else done.value

    def read_file(self, path: str, *, limit: int = 1 << 26, timeout: float = 60.0) -> bytes:
        """A file's content. Raises ProbeError if it cannot be read or is longer than ``limit``."""
        deadline = time.monotonic() + timeout
        request = self._next_request()
        self._send(protocol.read(request, os.fsencode(path), 0, limit), deadline)
        done, content, _ = self._answer(request, deadline, f"reading {path}", limit)
        if done.ending != Ending.EXITED:
            raise ProbeError(f"The guest cannot read {path}: {_strerror(done.value)}.")
        if done.truncated:
            raise ProbeError(f"The guest's {path} is longer than {limit} bytes; raise the limit.")
        return content

    def write_file(
        self, path: str, data: bytes, *, mode: int = 0o644, timeout: float = 60.0
    ) -> None:
        """Create or replace a file. Raises ProbeError if it cannot be written."""
        deadline = time.monotonic() + timeout
        name = os.fsencode(path)
        step = protocol.WRITE_CHUNK - len(name)
        if step < 1:
            raise ProbeError(f"The path {path[:40]}… is too long for the probe; shorten it.")
        for offset in range(0, len(data) or 1, step):
            request = self._next_request()
            part = data[offset : offset + step]
            frame = protocol.write(request, name, part, offset, create=offset == 0, mode=mode)
            self._send(frame, deadline)
            done, _, _ = self._answer(request, deadline, f"writing {path}")
            if done.ending != Ending.EXITED:
                raise ProbeError(f"The guest cannot write {path}: {_strerror(done.value)}.")

    def write_text(self, path: str, text: str) -> None:
        """Write a short text into a file that exists, as ``echo`` into sysfs does.

        The file is neither created nor emptied. Raises ProbeError with the kernel's reason.
        """
        deadline = time.monotonic() + 30.0
        request = self._next_request()
        frame = protocol.write(
            request, os.fsencode(path), text.encode(), 0, create=False, mode=0o644
        )
        self._send(frame, deadline)
        done, _, _ = self._answer(request, deadline, f"writing {path}")
        if done.ending != Ending.EXITED:
            raise ProbeError(f"The guest cannot write {path}: {_strerror(done.value)}.")


_GONE = "The connection to the guest's probe was closed: the guest or its machine ended."


def _strerror(number: int) -> str:
    name = errno.errorcode.get(number, "")
    return f"{os.strerror(number)} ({name})" if name else os.strerror(number)


def build_probe() -> Path:
    """The probe as a static program, compiled once for each version of its source.

    Raises HvHostError when there is no C compiler or it fails.
    """
    return build_static(SOURCE)
