"""The bridge between Hyper-V sockets and Unix sockets in a machine's directory.

Guest to host: what connects to port P of the host is connected to ``vsock_P.sock`` (or
``hvsock_GUID.sock``) if somebody listens there. Host to guest: who connects to ``vsock.sock`` and
writes a connect line is connected to that service of the guest (see ``protocol.py``).

A connection is over when both sides have said that they send no more, when the program on the host
closed its socket (what it had sent still reaches the guest), when writing to it fails, or when the
guest's channel ends.

All of it runs with the bus's lock held, on the machine's loop or on the thread of a virtual
processor; nothing here waits.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.machine.loop import Loop
from hvhost.machine.serial import listen
from hvhost.sockets.device import SocketDevice
from hvhost.sockets.protocol import (
    CONNECT_LINE_LIMIT,
    CONNECT_SOCKET,
    answer_to_guest,
    describe,
    listen_name,
    offer_to_guest,
    parse_connect_line,
    service_id,
)
from hvhost.vmbus.channel import Channel, ChannelState
from hvhost.vmbus.server import VmbusServer

logger = logging.getLogger(__name__)

#: Seconds an offered connection waits to be accepted, while the guest accepts no other either.
ACCEPT_SECONDS: Final = 5.0
#: Seconds it waits at most, also for a guest that works its way through hundreds of them.
ACCEPT_LIMIT: Final = 30.0
#: Seconds a program has for its connect line.
LINE_SECONDS: Final = 10.0
#: Seconds a guest that sends no more may leave unread what it was sent, once the program is done.
LINGER_SECONDS: Final = 10.0
#: Connections at once, of both directions; further ones are refused.
MAXIMUM_CONNECTIONS: Final = 1024
#: Programs at once that have not written their connect line yet.
MAXIMUM_HANDSHAKES: Final = 1024

_BACKLOG = 1024
_FIRST_HOST_PORT = 1 << 30  # above what programs listen on, so that both kinds look different
_READS_PER_ROUND = 16
_BUFFERS_PER_WRITE = 64
_GONE = (ChannelState.RESCINDED, ChannelState.RELEASED)


@dataclass(frozen=True, slots=True)
class Attachment:
    """The running computer: its bus and the lock around every call into it."""

    bus: VmbusServer
    lock: threading.RLock


class SocketBridge:
    """The sockets of one machine, in *directory*; :meth:`open` and :meth:`close` on *loop*."""

    def __init__(
        self,
        directory: Path,
        loop: Loop,
        *,
        accept_seconds: float = ACCEPT_SECONDS,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self.loop = loop
        self.accept_seconds, self.linger_seconds = accept_seconds, linger_seconds
        self.connections: set[Connection] = set()
        #: False refuses new connections both ways.
        self.enabled = True
        #: The guest stands still: nobody in it can take a connection.
        self.paused = False
        #: When the guest accepted a connection last.
        self.accepted_at = 0.0
        self._directory = directory
        self._handshakes: set[_Handshake] = set()
        self._attachment: Attachment | None = None
        self._listener: socket.socket | None = None
        self._host_ports = itertools.count(_FIRST_HOST_PORT)

    def open(self) -> None:
        """Take programs that want to connect to the guest; ``OSError`` if that cannot be."""
        self._listener = listen(self._directory / CONNECT_SOCKET)
        self._listener.listen(_BACKLOG)
        self.loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Take no more programs, and let go of those not connected yet."""
        if self._listener is not None:
            self.loop.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None
            (self._directory / CONNECT_SOCKET).unlink(missing_ok=True)
        for handshake in list(self._handshakes):
            handshake.close()

    def attach(self, bus: VmbusServer, lock: threading.RLock) -> None:
        """A computer was built."""
        self.paused = False
        self._attachment = Attachment(bus, lock)
        bus.on_connect = self.guest_connects

    def detach(self) -> None:
        """The computer is about to go: end all connections."""
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            with attachment.lock:
                for connection in list(self.connections):
                    connection.end()

    def pause(self) -> None:
        """The guest stands still: connections stay, new ones are refused; with the lock held."""
        self.paused = True

    def resume(self) -> None:
        """The guest goes on, and has all its time again to take what it was offered."""
        self.paused, self.accepted_at = False, time.monotonic()
        for connection in self.connections:
            connection.offered_again()

    def guest_connects(self, endpoint: uuid.UUID, service: uuid.UUID) -> bool:
        """The guest's *endpoint* asks for *service* of the host; whether somebody listens."""
        attachment = self._attachment
        if attachment is None or not self.enabled or self._full():
            return False
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            stream.connect(str(self._directory / listen_name(service)))
            connection = Connection(self, attachment, stream, b"")
            connection.offer(SocketDevice(answer_to_guest(service, endpoint), connection))
        except (OSError, LocalProtocolError) as error:
            logger.debug("the guest's connection to %s was refused: %s", describe(service), error)
            stream.close()
            return False
        return True

    def host_connects(self, service: uuid.UUID, stream: socket.socket, early: bytes) -> None:
        """Connect *stream* to *service* of the guest; *early* was read from it already.

        :class:`HvHostError` if that cannot even be tried; the stream is then still the caller's.
        """
        attachment = self._attachment
        if attachment is None:
            raise HvHostError("the machine is being reset; try again.")
        with attachment.lock:
            if self.paused:
                name = self._directory.name
                raise HvHostError(f"machine {name!r} is paused; `hvhost resume {name}` first.")
            if not self.enabled:
                raise HvHostError("sockets are switched off for this machine.")
            if self._full():
                raise HvHostError(f"the machine has {MAXIMUM_CONNECTIONS} connections already.")
            if attachment.bus.version is None:
                raise HvHostError("the guest has not connected to its bus; wait until it booted.")
            port = next(self._host_ports)
            connection = Connection(self, attachment, stream, early, f"OK {port}\n".encode())
            offer = offer_to_guest(service, service_id(port))
            try:
                connection.offer(SocketDevice(offer, connection))
            except LocalProtocolError as error:
                raise HvHostError(f"the guest cannot be connected to: {error}") from error

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call *callback* on the loop's thread after *seconds*; any thread."""
        self.loop.call_soon_threadsafe(lambda: self.loop.call_later(seconds, callback))

    def _full(self) -> bool:
        return len(self.connections) >= MAXIMUM_CONNECTIONS

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            stream, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of descriptors: the program is told by its time-out
            logger.warning("a program cannot be connected to the guest: %s", error)
            return
        stream.setblocking(False)
        handshake = _Handshake(self, stream, self._handshakes.discard)
        if len(self._handshakes) >= MAXIMUM_HANDSHAKES:
            handshake.refuse("too many programs connect at once; try again.")
            return
        self._handshakes.add(handshake)
        handshake.start()


class _Handshake:
    """A program that has not written its connect line yet; on the loop's thread."""

    def __init__(
        self, bridge: SocketBridge, stream: socket.socket, done: Callable[[_Handshake], None]
    ) -> None:
        self._bridge, self._stream, self._done = bridge, stream, done
        self._line = b""
        self._over = False

    def start(self) -> None:
        self._bridge.loop.add_reader(self._stream.fileno(), self._read)
        self._bridge.loop.call_later(LINE_SECONDS, self._late)

    def close(self) -> None:
        self._leave()
        self._stream.close()

    def refuse(self, reason: str) -> None:
        with contextlib.suppress(OSError):  # it may be gone
            self._stream.send(f"REFUSED {reason}\n".encode())
        self.close()

    def _leave(self) -> None:
        self._over = True
        self._bridge.loop.remove(self._stream.fileno())
        self._done(self)

    def _late(self) -> None:
        if not self._over:
            self.refuse(f"no connect line came within {LINE_SECONDS:g} s.")

    def _read(self) -> None:
        try:
            data = self._stream.recv(CONNECT_LINE_LIMIT - len(self._line))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._line += data
        line, end, early = self._line.partition(b"\n")
        if not end:
            if not data:
                self.close()
            elif len(self._line) >= CONNECT_LINE_LIMIT:
                self.refuse("the first line must be CONNECT and a port number or a GUID.")
            return
        try:
            service = parse_connect_line(line)
            # Out of the loop first: from here on the connection watches the stream.
            self._leave()
            self._bridge.host_connects(service, self._stream, early)
        except HvHostError as error:
            self.refuse(str(error))


class Connection:
    """One connection and its Unix socket; :class:`hvhost.sockets.device.Stream` of its device.

    *early* is what the program sent already, *greeting* what it gets once it is connected.
    """

    def __init__(
        self,
        bridge: SocketBridge,
        attachment: Attachment,
        stream: socket.socket,
        early: bytes,
        greeting: bytes = b"",
    ) -> None:
        self._bridge, self._stream = bridge, stream
        self._bus, self._lock = attachment.bus, attachment.lock
        self._device: SocketDevice | None = None
        self._channel: Channel | None = None
        self._greeting = greeting
        self._from_program = early
        self._to_program: deque[bytes | memoryview] = deque()
        self._program_finished = False
        self._program_gone = False
        self._guest_finished = False
        self._told_finished = False
        self._accepted = False
        self._offered_at = 0.0
        self._lingers = False
        self._over = False
        self._interest: tuple[bool, bool] | None = None

    # For the bridge.

    def offer(self, device: SocketDevice) -> None:
        """Put *device* on the bus; :class:`LocalProtocolError` if it cannot be."""
        self._device = device
        self._channel = self._bus.add_device(device)
        self._offered_at = time.monotonic()
        self._bridge.connections.add(self)
        self._bridge.later(self._bridge.accept_seconds, self._late)

    def end(self) -> None:
        """End the connection at once, on both sides; doing so again changes nothing."""
        self._over = True
        self._bridge.connections.discard(self)
        if self._interest is not None:
            self._bridge.loop.remove(self._stream.fileno())
        self._stream.close()
        self._to_program.clear()
        channel = self._channel
        if channel is not None and channel.state not in _GONE:
            self._bus.remove_device(channel)

    def offered_again(self) -> None:
        """Time in which the guest stood still does not count."""
        if not self._accepted:
            self._offered_at = time.monotonic()

    def _late(self) -> None:
        with self._lock:
            if self._accepted or self._over:
                return
            bridge, now = self._bridge, time.monotonic()
            if bridge.paused:
                bridge.later(bridge.accept_seconds, self._late)
                return
            left = max(self._offered_at, bridge.accepted_at) + bridge.accept_seconds - now
            left = min(left, self._offered_at + ACCEPT_LIMIT - now)
            if left > 0:
                bridge.later(left, self._late)
                return
            assert self._device is not None
            logger.info("%s: nobody in the guest took it", self._device.offer.name)
            if self._greeting:
                sentence = (
                    f"REFUSED nobody in the guest accepted the connection within "
                    f"{now - self._offered_at:.1f} s.\n"
                )
                with contextlib.suppress(OSError):
                    self._stream.send(sentence.encode())
            self.end()

    # For the device; with the lock held.

    def connected(self) -> None:
        self._accepted = True
        self._bridge.accepted_at = time.monotonic()
        if self._greeting:
            self._to_program.append(self._greeting)

    def received(self, data: bytes) -> None:
        self._to_program.append(data)

    def finished(self) -> None:
        self._guest_finished = True

    def disconnected(self) -> None:
        self.end()

    def settle(self) -> None:
        """Move what can be moved, and wait for what cannot."""
        self._write()
        self._read()
        self._end_or_wait()

    def _write(self) -> None:
        """To the program; and as long as it does not take all, nothing more from the guest."""
        device, queue = self._device, self._to_program
        assert device is not None
        while queue:
            try:
                sent = self._stream.sendmsg(list(itertools.islice(queue, _BUFFERS_PER_WRITE)))
            except BlockingIOError:
                device.paused = True
                return
            except OSError:  # closed: what the guest sends is lost, as on any other socket
                self._forget_program()
                break
            while sent:
                first = queue.popleft()
                if sent < len(first):
                    queue.appendleft(memoryview(first)[sent:])
                    break
                sent -= len(first)
        if self._guest_finished and not self._told_finished:
            self._told_finished = True
            with contextlib.suppress(OSError):  # it may be gone
                self._stream.shutdown(socket.SHUT_WR)
        if device.paused:
            device.paused = False
            self._bridge.loop.call_soon_threadsafe(self._process)

    def _read(self) -> None:
        """From the program, as long as the guest's ring has room."""
        device = self._device
        assert device is not None
        for _ in range(_READS_PER_ROUND):
            if not device.writable:  # nor is it once the program has finished
                return
            size = device.data_size
            data, self._from_program = self._from_program[:size], self._from_program[size:]
            if not data:
                try:
                    data = self._stream.recv(size)
                except BlockingIOError:
                    return
                except ConnectionResetError:  # all it sent was read; it left something unread
                    self._forget_program()
            if data:
                device.send(data)
            else:
                self._program_finished = True
                device.finish()

    def _end_or_wait(self) -> None:
        device = self._device
        assert device is not None
        if self._program_finished and not self._program_gone and self._hung_up():
            self._forget_program()
        if not self._to_program and (self._program_gone or self._told_finished):
            # Linux reads what is in the ring after the rescind, too.
            if self._program_finished and device.flushed:
                self.end()
                return
            if self._guest_finished and (self._program_gone or self._program_finished):
                self._linger()
        if self._program_gone:
            return  # the guest's signal of new room brings us back
        interest = (not self._program_finished and device.writable, bool(self._to_program))
        if interest != self._interest:
            self._interest = interest
            self._bridge.loop.watch(
                self._stream.fileno(), self._ready, read=interest[0], write=interest[1]
            )

    def _linger(self) -> None:
        """Nobody but the guest could still want something, and it may never read again."""
        if not self._lingers:
            self._lingers = True
            self._bridge.later(self._bridge.linger_seconds, self._give_up)

    def _forget_program(self) -> None:
        """It closed its socket; not to be told of that again and again."""
        self._program_gone = True
        self._to_program.clear()
        if self._interest is not None:
            self._bridge.loop.remove(self._stream.fileno())
            self._interest = None

    def _hung_up(self) -> bool:
        """The program closed its socket for good (not just its sending side)."""
        poller = select.poll()
        poller.register(self._stream, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poller.poll(0))

    # On the loop's thread.

    def _ready(self) -> None:
        with self._lock:
            if self._over:
                return
            if self._hung_up():
                self._forget_program()  # what it sent is still there to be read
            self._process()

    def _give_up(self) -> None:
        with self._lock:
            if self._bridge.paused:
                self._bridge.later(self._bridge.linger_seconds, self._give_up)
            else:
                self.end()

    def _process(self) -> None:
        with self._lock:
            channel = self._channel
            if not self._over and channel is not None and channel.process():
                self._bridge.loop.call_soon_threadsafe(self._process)
