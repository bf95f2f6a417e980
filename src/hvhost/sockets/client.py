"""Connecting to a service of the guest, for programs that wait."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.sockets.protocol import (
    CONNECT_SOCKET,
    Service,
    connect_line,
    describe,
    parse_answer,
    service_id,
)

_ANSWER_LIMIT = 400


def connect(directory: Path, service: Service, timeout: float) -> socket.socket:
    """A socket connected to *service* of the guest of the machine in *directory*.

    Without a time-out of its own. :class:`HvHostError` when the guest does not take it, and after
    *timeout* seconds.
    """
    identity = service_id(service)
    deadline = time.monotonic() + timeout
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout)
        stream.connect(str(directory / CONNECT_SOCKET))
        stream.sendall(connect_line(identity))
        line = b""
        # What follows the line belongs to the caller, so it is read to its end and no further.
        while not line.endswith(b"\n") and len(line) < _ANSWER_LIMIT:
            stream.settimeout(max(deadline - time.monotonic(), 0.001))
            seen = stream.recv(_ANSWER_LIMIT - len(line), socket.MSG_PEEK)
            if not seen:
                break
            line += stream.recv(seen.find(b"\n") + 1 or len(seen))
        parse_answer(line)
        stream.settimeout(None)
    except TimeoutError:
        stream.close()
        raise HvHostError(
            f"the machine did not connect {describe(identity)} of its guest within {timeout:g} "
            "seconds; look into its log."
        ) from None
    except OSError as error:
        stream.close()
        raise HvHostError(
            f"the guest's sockets cannot be reached through {directory / CONNECT_SOCKET}: "
            f"{error.strerror or error}."
        ) from error
    except HvHostError:
        stream.close()
        raise
    return stream
