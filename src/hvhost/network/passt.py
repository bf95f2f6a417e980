"""NAT without rights: frames to and from ``passt``, which turns them into sockets of this computer.

A frame goes over a stream socket behind its length, 4 bytes with the most significant first. passt
knows no offloads: sums are made and large segments cut before.
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import frame
from hvhost.network.config import PortForward
from hvhost.network.transmit import Buffers

#: Bytes read from the socket at once.
READ_SIZE: Final = 1 << 18
#: Seconds in which passt gives up if it cannot do what it was told.
START_SECONDS: Final = 0.2
_END_SECONDS = 3.0
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Lease:
    """What passt tells its machine where others share the network: its addresses, the gateway's.

    Without one it passes this computer's own on. IPv6 is left out where this computer has none.
    """

    address: ipaddress.IPv4Interface
    gateway: ipaddress.IPv4Address
    address6: ipaddress.IPv6Address
    gateway6: ipaddress.IPv6Address
    gateway_mac: bytes

    @property
    def options(self) -> list[str]:
        """As passt takes them."""
        return [
            *("-a", str(self.address.ip), "-n", str(self.address.network.prefixlen)),
            *("-g", str(self.gateway), "-a", str(self.address6), "-g", str(self.gateway6)),
            *("-M", self.gateway_mac.hex(":")),
        ]


def check_passt() -> None:
    """:class:`HvHostError` where passt is missing."""
    if shutil.which("passt") is None:
        raise HvHostError("the network nat needs the program passt; install the package passt.")


def start_passt(
    forwards: tuple[PortForward, ...], lease: Lease | None = None, *, wait: float = START_SECONDS
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """passt and our end of its socket; :class:`HvHostError` where it is missing or gives up.

    Whoever does not *wait* is not told that it gives up, but for the end of the socket.
    """
    check_passt()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = ["passt", "--foreground", "--quiet", "--fd", str(theirs.fileno())]
    command += [] if lease is None else lease.options
    for option, udp in (("-t", False), ("-u", True)):
        ports = [f"{each.host}:{each.guest}" for each in forwards if each.udp is udp]
        command += [option, ",".join(ports) or "none"]
    with theirs, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):  # the usual case: it goes on
            process.wait(wait)
            ours.close()
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines()
            raise HvHostError(f"passt gave up: {said[-1] if said else 'it said nothing'}")
    ours.setblocking(False)
    return process, ours


def end_passt(process: subprocess.Popen[bytes]) -> None:
    """Wait for passt, which ends once our end of its socket is closed."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class PasstWire:
    """The wire to a running passt."""

    def __init__(
        self,
        stream: socket.socket,
        loop: Loop,
        *,
        readable: Callable[[], None],
        writable: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        self._stream, self._loop = stream, loop
        self._readable, self._writable, self._gone = readable, writable, gone
        self._unsent = bytearray()
        self._received = bytearray()
        self._position = 0
        self._interest = (False, False)
        self._closed = False

    def send(self, buffers: Buffers) -> bool:
        if self._unsent and not self._flush():
            return False
        whole = bytearray().join(buffers)
        offload = frame.unpack_offload(whole)
        with memoryview(whole) as view:
            for segment in frame.segments(view[frame.VIRTIO_NET_HDR_SIZE :], offload):
                self._unsent += _LENGTH.pack(len(segment))
                self._unsent += segment
        self._flush()
        return True

    def _flush(self) -> bool:
        try:
            while self._unsent and not self._closed:
                sent = self._stream.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._hung_up()
        self._watch()
        return not self._unsent

    def receive_into(self, buffers: list[memoryview]) -> int:
        size = self._next_size()
        if size is None:
            self._fill()
            size = self._next_size()
        if size is None:
            return 0
        start = self._position + _LENGTH.size
        left = memoryview(frame.NO_OFFLOAD + self._received[start : start + size])
        self._position = start + size
        total = len(left)
        for buffer in buffers:
            piece = left[: len(buffer)]
            buffer[: len(piece)] = piece
            left = left[len(piece) :]
            if not left:
                break
        return total

    def _next_size(self) -> int | None:
        """The size of the frame that lies ready; ``None`` if none is whole."""
        there = len(self._received) - self._position
        if there < _LENGTH.size:
            return None
        size: int = _LENGTH.unpack_from(self._received, self._position)[0]
        if size > frame.FRAME_LIMIT:
            self._hung_up()  # no frame is that large: we are out of step
            return None
        return size if there >= _LENGTH.size + size else None

    def _fill(self) -> None:
        if self._closed:
            return
        del self._received[: self._position]
        self._position = 0
        try:
            data = self._stream.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._received += data
        else:
            self._hung_up()

    def watch(self, *, read: bool, write: bool) -> None:
        again = read and not self._interest[0]
        self._interest = read, write
        self._watch()
        if again and self._next_size() is not None:
            self._loop.call_soon_threadsafe(self._readable)

    def _watch(self) -> None:
        if self._closed:
            return
        read, write = self._interest[0], self._interest[1] or bool(self._unsent)
        if read or write:
            self._loop.watch(self._stream.fileno(), self._ready, read=read, write=write)
        else:
            self._loop.remove(self._stream.fileno())

    def _ready(self) -> None:
        if self._unsent:
            self._flush()
        if self._interest[1] and not self._unsent:
            self._writable()
        if self._interest[0] and not self._closed:
            self._readable()

    def _hung_up(self) -> None:
        if not self._closed:
            self.close()
            self._gone()

    def close(self) -> None:
        """Let passt go; it ends by itself then."""
        if not self._closed:
            self._closed = True
            self._loop.remove(self._stream.fileno())
            self._stream.close()
