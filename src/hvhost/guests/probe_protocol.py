"""What host and probe say to each other; bytes in, messages out, no I/O.

A frame is a payload and its CRC-32 (IEEE, little-endian), coded with COBS (Cheshire and Baker,
"Consistent Overhead Byte Stuffing", 1999) so that it holds no zero byte, between two zero bytes.
Each byte may cost an exit from the guest, and COBS adds one in 254. A receiver that starts in the
middle, or reads garbage, is in step again at the next zero byte.

A payload is a type (one character), the request's id (u32), and a body (little-endian):

==== ======== =======================================================================
host PING     anything; comes back unchanged in a PONG
host EXEC     timeout in ms (u32, 0: none), output limit per stream (u32), then each argument
              ended by NUL
host READ     offset (u32), most bytes (u32), path ended by NUL
host WRITE    offset (u32), flags (u16), mode (u16), path ended by NUL, data
probe HELLO   empty; the id is the probe's pid; sent once, when it starts
probe OUTPUT  bytes of standard output, or of the file
probe ERRORS  bytes of standard error
probe DONE    how it ended (u8), flags (u8), value (u32): always the last answer to a request
==== ======== =======================================================================

Only one request runs at a time. A further one ends the running command; a PING does not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from hvhost.errors import LocalProtocolError

FRAME_MAX = 4096  # payload bytes of one frame, in both directions
WRITE_CHUNK = 3072  # below what a tty buffers (4,096), so that nothing is lost in the guest
_HEADER = struct.Struct("<BI")
_DONE = struct.Struct("<BBI")
# A frame never codes to more than this; what is longer is garbage and need not be kept.
_CODED_MAX = FRAME_MAX + 4 + (FRAME_MAX + 4) // 254 + 1

FLAG_TRUNCATED = 1
WRITE_CREATE = 1


class MessageType(IntEnum):
    """The first byte of a payload."""

    PING = ord("P")
    EXEC = ord("X")
    READ = ord("R")
    WRITE = ord("W")
    HELLO = ord("H")
    PONG = ord("p")
    OUTPUT = ord("o")
    ERRORS = ord("e")
    DONE = ord("d")


class Ending(IntEnum):
    """How a request ended; the meaning of DONE's value in brackets."""

    EXITED = 0  # exit status; 0 for READ and WRITE
    SIGNALLED = 1  # signal number
    TIMED_OUT = 2
    FAILED = 3  # errno
    CANCELLED = 4  # by another request


@dataclass(frozen=True, slots=True)
class Message:
    """One payload, taken apart."""

    type: MessageType
    request: int
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Done:
    """The body of a DONE message."""

    ending: Ending
    value: int
    truncated: bool


def cobs_encode(data: bytes) -> bytes:
    """``data`` without zero bytes: at most one byte longer per 254, and one more."""
    coded = bytearray()
    for part in (data + b"\0").split(b"\0")[:-1]:
        while len(part) >= 254:
            coded.append(255)
            coded += part[:254]
            part = part[254:]
        coded.append(len(part) + 1)
        coded += part
    return bytes(coded)


def cobs_decode(coded: bytes) -> bytes | None:
    """The inverse of :func:`cobs_encode`; ``None`` for what it never produces."""
    data = bytearray()
    position = 0
    while position < len(coded):
        run = coded[position]
        end = position + run
        if run == 0 or end > len(coded):
            return None
        data += coded[position + 1 : end]
        position = end
        if run < 255 and position < len(coded):
            data.append(0)
    return bytes(data)


def encode(message: Message) -> bytes:
    """The frame of a message. Raises LocalProtocolError if it is longer than FRAME_MAX."""
    payload = _HEADER.pack(message.type, message.request) + message.body
    if len(payload) > FRAME_MAX:
        raise LocalProtocolError(
            f"A probe message of {len(payload)} bytes does not fit a frame of {FRAME_MAX}; "
            "send it in parts."
        )
    return b"\0" + cobs_encode(payload + zlib.crc32(payload).to_bytes(4, "little")) + b"\0"


def _decode_frame(coded: bytes) -> Message | None:
    plain = cobs_decode(coded)
    if plain is None or len(plain) < _HEADER.size + 4:
        return None
    payload = plain[:-4]
    if len(payload) > FRAME_MAX or zlib.crc32(payload).to_bytes(4, "little") != plain[-4:]:
        return None
    kind, request = _HEADER.unpack_from(payload)
    try:
        return Message(MessageType(kind), request, payload[_HEADER.size :])
    except ValueError:
        return None


class Decoder:
    """Bytes in any pieces in, messages out; what is not a message is dropped and counted."""

    def __init__(self) -> None:
        self._coded = bytearray()
        self._overlong = False
        self.dropped = 0  # frames, not bytes

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that ``data`` completes, in order."""
        *ended, rest = data.split(b"\0")
        for part in ended:
            self._keep(part)
            coded, overlong = bytes(self._coded), self._overlong
            self._coded.clear()
            self._overlong = False
            message = None if overlong else _decode_frame(coded)
            if message is not None:
                yield message
            elif coded or overlong:
                self.dropped += 1
        self._keep(rest)

    def _keep(self, part: bytes) -> None:
        if len(self._coded) + len(part) > _CODED_MAX:
            self._overlong = True
        else:
            self._coded += part


def ping(request: int, body: bytes = b"") -> bytes:
    """The frame of a PING."""
    return encode(Message(MessageType.PING, request, body))


def execute(request: int, arguments: Sequence[bytes], timeout_ms: int, limit: int) -> bytes:
    """The frame of an EXEC. Raises LocalProtocolError if the arguments cannot be sent."""
    if not arguments or any(b"\0" in argument for argument in arguments):
        raise LocalProtocolError("A command needs arguments, without NUL; check the command.")
    if len(arguments) > 255:
        raise LocalProtocolError("The probe takes at most 255 arguments; run a script instead.")
    body = struct.pack("<II", timeout_ms, limit) + b"".join(a + b"\0" for a in arguments)
    return encode(Message(MessageType.EXEC, request, body))


def read(request: int, path: bytes, offset: int, limit: int) -> bytes:
    """The frame of a READ."""
    body = struct.pack("<II", offset, limit) + path + b"\0"
    return encode(Message(MessageType.READ, request, body))


def write(request: int, path: bytes, data: bytes, offset: int, *, create: bool, mode: int) -> bytes:
    """The frame of a WRITE; ``create`` also empties a file that exists."""
    body = struct.pack("<IHH", offset, WRITE_CREATE if create else 0, mode) + path + b"\0" + data
    return encode(Message(MessageType.WRITE, request, body))


def parse_done(body: bytes) -> Done | None:
    """The body of a DONE message; ``None`` if it is not one."""
    if len(body) != _DONE.size:
        return None
    how, flags, value = _DONE.unpack(body)
    try:
        return Done(Ending(how), value, bool(flags & FLAG_TRUNCATED))
    except ValueError:
        return None
