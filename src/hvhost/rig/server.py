"""The rig's keeper: one process per user that owns the rig's QEMU and lends it to machines.

It is the ivshmem server: QEMU is peer 0, the keeper peer 1, each machine's worker a peer of its
own. A worker connects to ``rig.sock``, says how much memory it needs, and receives the shared
memory, its eventfds and its place in it; when the connection ends, for whatever reason, the agent
is told to tear the session down and the memory is returned to the computer. QEMU dies with the
keeper, and the keeper ends with the last session.

Protocol on ``rig.sock``: one JSON object per line. Request ``{"memory": bytes, "vectors": n}``;
answers ``{"progress": text}`` while the rig starts, then ``{"error": text}`` or the session
``{"session", "control_offset", "memory_offset"}`` with the descriptors of :func:`send_session`.
The line ``status`` is answered with :meth:`Keeper.account`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import mmap
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.paths import runtime_dir
from hvhost.rig import image, layout, qemu
from hvhost.units import GIB, MIB, format_size

log = logging.getLogger(__name__)

SHARED_SIZE = 64 * GIB
START_SECONDS = 45.0
CONNECT_SECONDS = 15.0
DEVICE_SECONDS = 5.0
CLIENT_SECONDS = 2.0
FAREWELL_SECONDS = 0.5
START_ATTEMPTS = 3
PING_SECONDS = 5.0
HANG_SECONDS = 20.0
KEEPER_PEER = 1
FIRST_SESSION_PEER = 2
MAXIMUM_PEER = 0xFFFE
ALIGNMENT = 2 * MIB
_FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


def _events(count: int) -> list[int]:
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]


@dataclass(eq=False)
class Session:
    """One worker's place in the rig."""

    connection: socket.socket
    received: bytes = b""
    index: int | None = None
    peer: int = 0
    memory_offset: int = 0
    events: list[int] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)
    closing: bool = False


class Memory:
    """The sparse shared memory and who has which part of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("hvhost-rig", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.control = mmap.mmap(self.descriptor, layout.CONTROL_AREA)
        self._words = memoryview(self.control).cast("I")  # each access one load or store
        self._used: list[tuple[int, int]] = [(0, layout.CONTROL_AREA)]
        self._fallocate = ctypes.CDLL(None, use_errno=True).fallocate

    def load(self, offset: int) -> int:
        """One 32-bit word of the control area."""
        return self._words[offset >> 2]

    def store(self, offset: int, value: int) -> None:
        """Set one 32-bit word of the control area."""
        self._words[offset >> 2] = value

    def allocate(self, size: int) -> int:
        """Offset of *size* bytes, first fit, aligned to 2 MiB.

        :class:`HvHostError` when the rig is full or *size* is no size.
        """
        if size <= 0:
            raise HvHostError(f"the rig cannot lend {size} bytes of memory; ask for more.")
        size = -(-size // ALIGNMENT) * ALIGNMENT
        place = 0
        for start, end in sorted(self._used):
            if start - place >= size:
                break
            place = max(place, end)
        if place + size > self.size:
            raise HvHostError(
                f"the rig has no room for another {format_size(size)} of guest memory; "
                "stop a machine or give this one less."
            )
        self._used.append((place, place + size))
        return place

    def free(self, offset: int) -> None:
        """Take back what :meth:`allocate` gave; its pages too."""
        for entry in self._used:
            if entry[0] == offset:
                self._used.remove(entry)
                self.punch(entry[0], entry[1] - entry[0])
                return

    def punch(self, offset: int, size: int) -> None:
        """Give the pages back to the computer; they read as zero again."""
        result = self._fallocate(
            self.descriptor,
            _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE,
            ctypes.c_long(offset),
            ctypes.c_long(size),
        )
        if result < 0:
            reason = os.strerror(ctypes.get_errno())
            raise HvHostError(f"the rig could not give memory back to this computer: {reason}.")

    def close(self) -> None:
        """Let go of it all."""
        self._words.release()
        self.control.close()
        os.close(self.descriptor)


class Keeper:
    """State of the keeper process; :meth:`serve` is its life."""

    def __init__(self, directory: Path, linger: float) -> None:
        self.directory = directory
        self.linger = linger
        self.selector = selectors.DefaultSelector()
        self.memory = Memory(SHARED_SIZE)
        self.sessions: dict[int, Session] = {}
        self.clients: list[Session] = []
        self.waiting: list[Session] = []
        self.free_vectors = list(range(layout.FIRST_FREE_VECTOR, layout.VECTORS))
        self.ready = False
        self.served = False
        self.pings = 0
        self.started = self.last_pong = time.monotonic()
        # No number is used twice: QEMU 7.2 to 10.0 frees what it keeps of a peer that left, and
        # writes there again if one with the same number comes.
        self.next_peer = FIRST_SESSION_PEER
        self.idle_since = time.monotonic()
        self.console = b""
        self.console_line = b""
        self.image = (Path(), Path())
        self.process: subprocess.Popen[bytes] | None = None
        self.device: socket.socket | None = None
        self.door: socket.socket | None = None
        self.wake: list[int] = []
        self.own: list[int] = []

    # --- QEMU ------------------------------------------------------------------------------

    def start_qemu(self) -> None:
        """Start QEMU; :meth:`on_qemu` is called when it connects as the ivshmem client."""
        path = self.directory / "shared.sock"
        path.unlink(missing_ok=True)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(str(path))
        self.door.listen(1)
        self.memory.punch(0, layout.CONTROL_AREA)
        self.memory.store(layout.HEADER_MAGIC, layout.RIG_MAGIC)
        self.memory.store(layout.HEADER_VERSION, layout.RIG_VERSION)
        self.console = self.console_line = b""
        self.process = qemu.start(qemu.rig_arguments(*self.image, path), stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.started = self.last_pong = time.monotonic()
        self.selector.register(self.door, selectors.EVENT_READ, self.on_qemu)
        self.selector.register(self.process.stdout, selectors.EVENT_READ, self.read_console)

    def on_qemu(self) -> None:
        """Give QEMU the shared memory and its eventfds; :meth:`on_agent` notices when it is up."""
        assert self.door is not None
        assert self.process is not None
        self.device, _ = self.door.accept()
        self.device.settimeout(DEVICE_SECONDS)
        self.close_door()
        self.wake = _events(layout.VECTORS)
        self.own = _events(1)
        self.selector.register(self.own[0], selectors.EVENT_READ, self.on_agent)
        try:
            self.send_device(0)
            self.send_device(0)
            self.send_device(-1, self.memory.descriptor)
            self.send_device(KEEPER_PEER, self.own[0])
            for descriptor in self.wake:
                self.send_device(0, descriptor)
        except HvHostError as error:
            log.warning("%s", error)
            self.process.kill()

    def close_door(self) -> None:
        if self.door is not None:
            self.selector.unregister(self.door)
            self.door.close()
            self.door = None
            (self.directory / "shared.sock").unlink(missing_ok=True)

    def send_device(self, value: int, descriptor: int | None = None) -> None:
        assert self.device is not None
        descriptors = [] if descriptor is None else [descriptor]
        try:
            socket.send_fds(self.device, [struct.pack("<q", value)], descriptors)
        except TimeoutError:
            raise HvHostError("the rig's QEMU hangs: it takes no messages.") from None
        except OSError as error:
            raise HvHostError(
                f"the rig's QEMU died ({error.strerror}{self.how_qemu_ended()}): "
                f"{self.read_console()}"
            ) from error

    def how_qemu_ended(self) -> str:
        """For a sentence: by a signal, or by itself, as when the rig's kernel resets."""
        if self.process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.process.wait(FAREWELL_SECONDS)
            if status < 0:
                return f", by signal {-status}"
            return f", status {status}" if status else ", the rig's kernel reset itself"
        return ""

    def read_console(self) -> str:
        """Take in what QEMU and the rig's kernel printed; its last line."""
        if self.process is not None and self.process.stdout is not None:
            with contextlib.suppress(OSError):
                data = self.process.stdout.read() or b""
                *complete, self.console_line = (self.console_line + data).split(b"\n")
                for line in complete:
                    log.info("rig console: %s", line.decode("utf-8", "replace").rstrip())
                self.console = (self.console + data)[-8192:]
        lines = self.console.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"

    def stop_qemu(self) -> None:
        self.close_door()
        if self.process is None:
            return
        for item in (self.own[0] if self.own else None, self.process.stdout):
            with contextlib.suppress(KeyError, ValueError):
                if item is not None:
                    self.selector.unregister(item)
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.device is not None:
            self.device.close()
        for descriptor in (*self.wake, *self.own):
            os.close(descriptor)
        self.process, self.device, self.wake, self.own, self.ready = None, None, [], [], False

    # --- the agent -------------------------------------------------------------------------

    def on_agent(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.own[0])
        if not self.ready and self.memory.load(layout.HEADER_AGENT_READY):
            self.ready = True
            log.info("rig ready after %.1f s", time.monotonic() - self.started)
            for session in self.waiting[:]:
                self.open_session(session)
        if self.memory.load(layout.HEADER_PONG) == self.pings:
            self.last_pong = time.monotonic()
        for index, session in list(self.sessions.items()):
            self.advance(index, session)

    def advance(self, index: int, session: Session) -> None:
        """Take a session one step further, by what the agent made of the last one.

        The agent owns the state while it is OPENING or CLOSING: a worker that leaves meanwhile is
        heeded once the agent is done.
        """
        place = self.entry(index) + layout.SESSION_STATE
        state = self.memory.load(place)
        if session.closing and state == layout.SESSION_OPEN:
            self.memory.store(place, layout.SESSION_CLOSING)
            self.wake_agent()
        elif session.closing and state == layout.SESSION_FREE:
            self.forget(index, session)
        elif not session.closing and state == layout.SESSION_OPEN and session.events:
            self.send_session(session)

    def wake_agent(self) -> None:
        os.eventfd_write(self.wake[0], 1)

    def entry(self, index: int) -> int:
        return int(layout.HEADER_SESSIONS + index * layout.SESSION_ENTRY_SIZE)

    # --- sessions --------------------------------------------------------------------------

    def tell(self, session: Session, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            session.connection.sendall(json.dumps(message).encode() + b"\n")

    def tell_waiting(self, message: dict[str, object]) -> None:
        for session in self.waiting:
            self.tell(session, message)

    def on_request(self, session: Session) -> None:
        try:
            data = session.connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            self.end_session(session)
            return
        session.received += data
        if b"\n" not in session.received or session in self.waiting or session.index is not None:
            return
        if session.received == b"status\n":
            session.received = b""
            self.tell(session, self.account())
            return
        self.waiting.append(session)
        self.served = True
        if self.ready:
            self.open_session(session)
        else:
            self.tell(session, {"progress": "starting the rig"})

    def account(self) -> dict[str, object]:
        """What ``hvhost rig status`` shows; times in seconds, sizes in bytes."""
        return {
            "state": "running" if self.ready else "starting",
            "pid": os.getpid(),
            "emulator_pid": self.process.pid if self.process is not None else None,
            "seconds": round(time.monotonic() - self.started, 1) if self.ready else 0.0,
            "machines": len(self.sessions),
            "memory": os.fstat(self.memory.descriptor).st_blocks * 512,
        }

    def open_session(self, session: Session) -> None:
        self.waiting.remove(session)
        try:
            request = json.loads(session.received.split(b"\n", 1)[0])
            size, vectors = int(request["memory"]), int(request["vectors"])
            free = [i for i in range(layout.MAXIMUM_SESSIONS) if i not in self.sessions]
            if not free or vectors > len(self.free_vectors):
                raise HvHostError("the rig serves no more machines; stop one first.")
            if self.next_peer > MAXIMUM_PEER:
                raise HvHostError("the rig is worn out; stop all machines, then it starts anew.")
            session.memory_offset = self.memory.allocate(size)
        except HvHostError as error:
            self.tell(session, {"error": str(error)})
            return
        except (ValueError, KeyError, TypeError) as error:
            self.tell(session, {"error": f"the rig did not understand its client ({error!r})."})
            return
        session.index = free[0]
        session.peer, self.next_peer = self.next_peer, self.next_peer + 1
        session.vectors = [self.free_vectors.pop(0) for _ in range(vectors)]
        session.events = _events(layout.PEER_VECTORS)
        self.sessions[session.index] = session
        for descriptor in session.events:
            self.send_device(session.peer, descriptor)
        control = layout.control_offset(session.index)
        self.memory.punch(control, layout.CONTROL_SIZE)
        entry = self.entry(session.index)
        self.memory.store(entry + layout.SESSION_PEER, session.peer)
        struct.pack_into("<Q", self.memory.control, entry + layout.SESSION_CONTROL, control)
        self.memory.store(entry + layout.SESSION_STATE, layout.SESSION_OPENING)
        self.wake_agent()

    def send_session(self, session: Session) -> None:
        """Hand over: shared memory, session wake, guest interrupt vectors, then its eventfds."""
        assert session.index is not None
        message = {
            "session": session.index,
            "control_offset": layout.control_offset(session.index),
            "memory_offset": session.memory_offset,
            "vectors": session.vectors,
        }
        descriptors = [
            self.memory.descriptor,
            self.wake[1 + session.index],
            *(self.wake[vector] for vector in session.vectors),
            *session.events,
        ]
        with contextlib.suppress(OSError):
            socket.send_fds(session.connection, [json.dumps(message).encode() + b"\n"], descriptors)
        for descriptor in session.events:
            os.close(descriptor)
        session.events = []

    def end_session(self, session: Session) -> None:
        self.selector.unregister(session.connection)
        self.clients.remove(session)
        session.connection.close()
        if session in self.waiting:
            self.waiting.remove(session)
        if session.index is None:
            self.idle_since = time.monotonic()
            return
        session.closing = True
        self.advance(session.index, session)

    def forget(self, index: int, session: Session) -> None:
        self.memory.free(session.memory_offset)
        self.free_vectors += session.vectors
        for descriptor in session.events:
            os.close(descriptor)
        self.send_device(session.peer)  # without a descriptor: the peer is gone
        del self.sessions[index]
        self.idle_since = time.monotonic()

    # --- life ------------------------------------------------------------------------------

    def serve(self, listener: socket.socket) -> None:
        """Run until nobody needs the rig any more; :class:`HvHostError` when it cannot go on."""
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ, lambda: self.accept(listener))
        self.image = image.rig_image(lambda text: self.tell_waiting({"progress": text}))
        attempts = 0
        next_ping = 0.0
        while True:
            if self.process is None:
                attempts += 1
                self.start_qemu()
            now = time.monotonic()
            if self.ready and now >= next_ping:
                self.pings = (self.pings + 1) & 0xFFFFFFFF
                self.memory.store(layout.HEADER_PING, self.pings)
                self.wake_agent()
                next_ping = now + PING_SECONDS
            for key, _ in self.selector.select(self.next_time_out(now, next_ping)):
                key.data()
            now = time.monotonic()
            assert self.process is not None
            idle = not self.sessions and not self.waiting and now - self.idle_since > self.linger
            if not self.ready:
                limit = CONNECT_SECONDS if self.device is None else START_SECONDS
                if self.process.poll() is not None or now - self.started > limit:
                    self.give_up_attempt(attempts, self.read_console())
                elif idle and self.served:
                    return  # whom it was started for has left
            elif self.process.poll() is not None:
                raise HvHostError(
                    f"the rig's QEMU died{self.how_qemu_ended()}: {self.read_console()}"
                )
            elif now - self.last_pong > HANG_SECONDS:
                raise HvHostError(
                    f"the rig's QEMU hangs: it has not answered for {HANG_SECONDS:.0f} s."
                )
            elif idle:
                return

    def give_up_attempt(self, attempts: int, reason: str) -> None:
        """End a QEMU that does not come up; :class:`HvHostError` if it was the last attempt."""
        self.stop_qemu()
        if attempts >= START_ATTEMPTS:
            raise HvHostError(
                f"the rig did not start in {attempts} attempts ({reason}); its log is "
                f"{self.directory / 'rig.log'}."
            )
        log.warning("rig attempt %d failed: %s", attempts, reason)
        self.tell_waiting({"progress": "the rig did not come up, trying again"})

    def next_time_out(self, now: float, next_ping: float) -> float:
        if not self.ready:
            return min(1.0, CONNECT_SECONDS)
        wait = next_ping - now
        if not self.sessions and not self.waiting:
            wait = min(wait, self.idle_since + self.linger - now)
        return max(0.01, wait)

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = listener.accept()
            connection.settimeout(CLIENT_SECONDS)
            session = Session(connection)
            self.clients.append(session)
            self.selector.register(
                connection, selectors.EVENT_READ, lambda: self.on_request(session)
            )

    def fail(self, reason: str, listener: socket.socket) -> None:
        """Tell everybody why the rig is gone; who comes in the next moment hears it too."""
        told: list[Session] = []
        deadline = time.monotonic() + FAREWELL_SECONDS
        while True:
            for session in self.clients:
                if session not in told:
                    self.tell(session, {"error": reason})
                    told.append(session)
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self.accept(listener)
            except TimeoutError:
                return


def main() -> int:
    """``python -m hvhost.rig.server``: started by :mod:`hvhost.rig.client`, never by people."""
    directory = runtime_dir("rig")
    logging.basicConfig(
        filename=directory / "rig.log",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    lock = (directory / "keeper.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0  # one is there; its sockets are not ours to take away
    path = directory / "rig.sock"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(16)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # 66 eventfds a machine, QEMU's too
    keeper = Keeper(directory, float(os.environ.get("HVHOST_RIG_LINGER", "2")))
    try:
        keeper.serve(listener)
    except HvHostError as error:
        log.error("%s", error)
        keeper.fail(str(error), listener)
        return 1
    except Exception as error:
        log.exception("the keeper ends")
        keeper.fail(
            f"the rig's keeper failed ({error!r}); its log is {directory / 'rig.log'}.", listener
        )
        return 1
    finally:
        path.unlink(missing_ok=True)
        listener.close()
        keeper.stop_qemu()
    return 0


if __name__ == "__main__":
    sys.exit(main())
