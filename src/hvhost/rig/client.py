"""A worker's connection to the rig's keeper; starts the keeper when there is none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hvhost.errors import HvHostError
from hvhost.paths import python_environment, runtime_dir
from hvhost.rig import image, layout, qemu

ANSWER_SECONDS = 180.0
KEEPER_SECONDS = 20.0
STATUS_SECONDS = 5.0
_MAXIMUM_DESCRIPTORS = 250


class _LastWords:
    """Why the keeper ended the session: said once, asked for by every processor's thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reason: str | None = None


@dataclass(frozen=True, slots=True)
class RigSession:
    """What the keeper lent: descriptors and offsets into the shared memory, in bytes."""

    connection: socket.socket
    memory_descriptor: int
    control_offset: int
    memory_offset: int
    wake: int
    vectors: tuple[tuple[int, int], ...]
    """Pairs of MSI-X vector number and the eventfd that raises it."""
    events: tuple[int, ...]
    """Raised by the agent, indexed as ``layout.h`` says (``PEER_VECTORS`` of them)."""
    last_words: _LastWords = field(default_factory=lambda: _LastWords())


def _start_keeper() -> subprocess.Popen[bytes]:
    log = runtime_dir("rig") / "rig.out"
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "hvhost.rig.server"],
            env=python_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )


def _connect(progress: Callable[[str], None]) -> socket.socket:
    directory = runtime_dir("rig")
    deadline = math.inf
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers must not start two keepers
        keeper: subprocess.Popen[bytes] | None = None
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(directory / "rig.sock"))
                return connection
            except OSError:
                connection.close()
            if keeper is None:
                qemu.find_qemu(progress)  # both here, where somebody sees the progress
                image.rig_image(progress)
                keeper = _start_keeper()
                deadline = min(deadline, time.monotonic() + KEEPER_SECONDS)
            status = keeper.poll()
            if status or time.monotonic() > deadline:
                raise HvHostError(
                    f"the rig's keeper did not start; see {directory / 'rig.out'} for its errors."
                )
            if status == 0:
                keeper = None  # there was another one, just coming or just leaving
            time.sleep(0.02)


def open_session(
    memory_size: int, vectors: int, progress: Callable[[str], None] = lambda text: None
) -> RigSession:
    """Borrow *memory_size* bytes and *vectors* interrupt vectors; waits for the rig to be up.

    :class:`HvHostError` when it is full, does not start, or says nothing for three minutes.
    """
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        connection = _connect(progress)
        try:
            session = _negotiate(connection, memory_size, vectors, progress)
        except BaseException:
            connection.close()
            raise
        if session is not None:
            return session
        connection.close()  # the keeper was just leaving: start another
        if time.monotonic() > deadline:
            raise HvHostError("the rig did not answer; run `hvhost doctor`.")
        time.sleep(0.1)


def _negotiate(
    connection: socket.socket, memory_size: int, vectors: int, progress: Callable[[str], None]
) -> RigSession | None:
    connection.settimeout(ANSWER_SECONDS)
    received = b""
    descriptors: list[int] = []
    try:
        request = {"memory": memory_size, "vectors": vectors}
        connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            data, fds, _, _ = socket.recv_fds(connection, 65536, _MAXIMUM_DESCRIPTORS)
            descriptors += fds
            if not data:
                return None
            received += data
            while b"\n" in received:
                line, received = received.split(b"\n", 1)
                answer = json.loads(line)
                if "progress" in answer:
                    progress(answer["progress"])
                elif "error" in answer:
                    raise HvHostError(answer["error"])
                else:
                    session = _session(connection, answer, descriptors)
                    descriptors = []
                    return session
    except TimeoutError:
        raise HvHostError(
            f"the rig did not answer within {ANSWER_SECONDS:.0f} s; its log is "
            f"{runtime_dir('rig') / 'rig.log'}."
        ) from None
    except (ConnectionResetError, BrokenPipeError):
        return None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _session(
    connection: socket.socket, answer: dict[str, int | list[int]], descriptors: list[int]
) -> RigSession:
    numbers = answer["vectors"]
    assert isinstance(numbers, list)
    control_offset, memory_offset = answer["control_offset"], answer["memory_offset"]
    assert isinstance(control_offset, int)
    assert isinstance(memory_offset, int)
    expected = 2 + len(numbers) + layout.PEER_VECTORS
    if len(descriptors) != expected:
        raise HvHostError(
            f"the rig sent {len(descriptors)} descriptors instead of {expected}; "
            "raise the limit on open files (ulimit -n)."
        )
    connection.setblocking(False)
    first = 2 + len(numbers)
    return RigSession(
        connection,
        descriptors[0],
        control_offset,
        memory_offset,
        descriptors[1],
        tuple(zip(numbers, descriptors[2:first], strict=True)),
        tuple(descriptors[first:]),
    )


@dataclass(frozen=True, slots=True)
class RigStatus:
    """The rig's account; *seconds* since it is up, *memory* that its guests occupy, in bytes."""

    state: str
    pid: int | None = None
    emulator_pid: int | None = None
    seconds: float = 0.0
    machines: int = 0
    memory: int = 0


def status() -> RigStatus:
    """Whether a rig runs, without starting one."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(STATUS_SECONDS)
        try:
            connection.connect(str(runtime_dir("rig") / "rig.sock"))
            connection.sendall(b"status\n")
            with connection.makefile("rb") as answers:
                return RigStatus(**json.loads(answers.readline()))
        except TimeoutError:
            return RigStatus("no-answer")
        except (OSError, ValueError):
            return RigStatus("off")


def reason_of_end(session: RigSession) -> str:
    """The keeper's last words after the connection ended; the same for everybody who asks."""
    words = session.last_words
    with words.lock:
        if words.reason is None:
            words.reason = (
                "the rig is gone: its keeper or its QEMU was killed; start the machine again."
            )
            with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
                data = session.connection.recv(65536)
                words.reason = str(json.loads(data.splitlines()[-1])["error"])
        return words.reason


def close_session(session: RigSession) -> None:
    """Give the session back; the keeper tears it down."""
    session.connection.close()
    for descriptor in (
        session.memory_descriptor,
        session.wake,
        *(descriptor for _, descriptor in session.vectors),
        *session.events,
    ):
        os.close(descriptor)
