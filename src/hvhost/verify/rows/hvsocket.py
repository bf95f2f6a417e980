"""``hvsocket``: streams between programs in the guest and Unix sockets on the host.

The guest's ends are the probe's own test programs on AF_VSOCK; what arrived there is told by the
guest's ``sha256sum`` and by its list of VMBus devices, which has one for each connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from hvhost.errors import HvHostError
from hvhost.machine.model import ShutdownAction
from hvhost.sockets.protocol import describe, service_id
from hvhost.verify.guest import Carrier, Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session

ECHO_PORT = 7000
HOST_PORT = 5000
NOBODY_PORT = 4444
OWN_SERVICE = uuid.UUID("6f0c7a0e-58f1-4c66-9f1a-68766f737431")
TRANSFER = 4 << 20
CONNECTIONS = 300
ROUND_TRIPS = 100
_CONNECT_SECONDS = 40.0
_DATA_SECONDS = 60.0


def _connect(session: Session, service: int | uuid.UUID = ECHO_PORT) -> socket.socket:
    stream = session.machine.connect(service, session.timing.patiently(_CONNECT_SECONDS))
    stream.settimeout(session.timing.patiently(_DATA_SECONDS))
    return stream


def _read_all(stream: socket.socket) -> bytes:
    data = bytearray()
    while part := stream.recv(1 << 18):
        data += part
    return bytes(data)


def _rate(size: int, seconds: float) -> str:
    return f"{size / seconds / (1 << 20):.1f} MiB/s"


def _guest_connections(probe: Probe) -> int:
    """Devices on the guest's bus whose interface type is a socket port."""
    listing = run(probe, "cat /sys/bus/vmbus/devices/*/class_id 2>/dev/null || true")
    return sum("-facb-11e6-bd58-64006a7986d3}" in line for line in listing.splitlines())


def _to_guest(session: Session) -> Iterator[str]:
    session.step("connecting to the guest")
    with _connect(session) as stream:
        seconds = []
        for number in range(ROUND_TRIPS):
            message = number.to_bytes(8, "little")
            started = time.perf_counter()
            stream.sendall(message)
            if stream.recv(8, socket.MSG_WAITALL) != message:
                raise RowFailed("what the guest sent back is not what it was sent")
            seconds.append(time.perf_counter() - started)
    data = os.urandom(TRANSFER)
    with _connect(session) as stream:

        def feed() -> None:
            with contextlib.suppress(OSError):  # the reader below notices
                stream.sendall(data)
                stream.shutdown(socket.SHUT_WR)

        started = time.perf_counter()
        feeder = threading.Thread(target=feed, daemon=True)
        feeder.start()
        answer = _read_all(stream)
        spent = time.perf_counter() - started
        feeder.join(session.timing.patiently(_DATA_SECONDS))
    if answer != data:
        raise RowFailed(f"of {TRANSFER} bytes sent to the guest and back, {len(answer)} returned")
    yield (
        f"host to guest: {ROUND_TRIPS} round trips, median {statistics.median(seconds) * 1e6:.0f} "
        f"us; {TRANSFER >> 20} MiB there and back whole at {_rate(TRANSFER, spent)} each way, "
        "read to the end after the host had closed its direction"
    )


def _to_host(session: Session, probe: Probe) -> Iterator[str]:
    session.step("connecting from the guest")
    received: list[bytes] = []
    seconds: list[float] = []
    size = TRANSFER // 2
    with session.machine.listen(HOST_PORT) as listener:
        listener.settimeout(session.timing.patiently(_CONNECT_SECONDS))

        def serve() -> None:
            with contextlib.suppress(OSError):  # nothing received is noticed below
                stream, _ = listener.accept()
                with stream:
                    stream.settimeout(session.timing.patiently(_DATA_SECONDS))
                    started = time.perf_counter()
                    data = _read_all(stream)
                    seconds.append(time.perf_counter() - started)
                    received.append(data)
                    # The guest has closed its direction, this one is still open.
                    stream.sendall(hashlib.sha256(data).hexdigest().encode() + b"\n")

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        told = run(
            probe,
            f"head -c {size} /dev/urandom > /tmp/sent; sha256sum < /tmp/sent; "
            f"hvhost-probe connect {HOST_PORT} < /tmp/sent; rm /tmp/sent",
            session.timing.patiently(_DATA_SECONDS),
        ).split()
        server.join(session.timing.patiently(_CONNECT_SECONDS))
    if not received or len(told) < 3:
        raise RowFailed(
            f"the guest's connection to the host's {describe(service_id(HOST_PORT))}"
            " brought nothing"
        )
    if not told[0] == told[2] == hashlib.sha256(received[0]).hexdigest():
        raise RowFailed("the host received something else than the guest sent", told)
    yield (
        f"guest to host: {size >> 20} MiB whole (sha256 {told[0][:12]}… said by the guest) at "
        f"{_rate(size, seconds[0])}, and the host's answer after the guest's end of data"
    )


def _many(session: Session, probe: Probe) -> Iterator[str]:
    session.step(f"opening {CONNECTIONS} connections at once")
    before = _guest_connections(probe)
    streams: list[socket.socket] = []
    started = time.perf_counter()
    try:
        while len(streams) < CONNECTIONS:
            streams.append(_connect(session))
        spent = time.perf_counter() - started
        there = _guest_connections(probe)
        if there < CONNECTIONS:
            raise RowFailed(f"of {CONNECTIONS} connections the guest lists {there}")
        for number, stream in enumerate(streams):
            stream.sendall(b"%06d" % number)
        for number, stream in enumerate(streams):
            if stream.recv(6, socket.MSG_WAITALL) != b"%06d" % number:
                raise RowFailed("two connections got each other's data")
    finally:
        for stream in streams:
            stream.close()
    _await_gone(session, probe, before)
    yield (
        f"at once: {CONNECTIONS} connections, all on the guest's bus, each with its own data "
        f"({spent * 1e3 / CONNECTIONS:.0f} ms to open one); none left after the host closed them"
    )


def _await_gone(session: Session, probe: Probe, before: int) -> None:
    """Wait for the guest to let go of closed connections, as long as it goes on doing so."""
    left, moved_at = _guest_connections(probe), time.monotonic()
    while left > before:
        time.sleep(session.timing.poll)
        now = _guest_connections(probe)
        if now < left:
            left, moved_at = now, time.monotonic()
        elif time.monotonic() - moved_at > session.timing.event:
            raise RowFailed(f"{left} connections are left in the guest after the host closed them")


def _nobody(session: Session, probe: Probe) -> Iterator[str]:
    session.step("connecting where nobody listens")
    lines = []
    for service in (NOBODY_PORT, OWN_SERVICE):
        started = time.monotonic()
        try:
            session.machine.connect(service, _CONNECT_SECONDS).close()
        except HvHostError as error:
            if "nobody" not in str(error):
                raise RowFailed(f"nobody listens in the guest, but: {error}") from error
        else:
            raise RowFailed("a connection was accepted where nobody listens in the guest")
        lines.append(f"{describe(service_id(service))} {time.monotonic() - started:.1f} s")
    result = probe.run(["hvhost-probe", "connect", str(NOBODY_PORT)], 30.0)
    if result.status == 0 or "timed out" not in result.output:
        raise RowFailed(f"nobody listens on the host, but the guest says {result.output.strip()!r}")
    yield f"nobody there: host refused after {' and '.join(lines)}; guest's connect timed out"


def _by_guid(session: Session) -> Iterator[str]:
    service = service_id(ECHO_PORT)
    with _connect(session, service) as stream:
        stream.sendall(b"guid")
        if stream.recv(4, socket.MSG_WAITALL) != b"guid":
            raise RowFailed("the connection by service GUID does not work")
    yield (
        f"by service GUID: {service}; Linux takes no others than these, so one of the user's own "
        "is shown refused above and proved against the simulated guest only"
    )


def _next_boot(session: Session, what: str, begin: Callable[[], None]) -> Probe:
    """Boot anew with a connection open: it ends, and the new guest takes another."""
    session.step(f"a {what} with a connection open")
    with _connect(session) as stream:
        stream.sendall(b"here")
        if stream.recv(4, socket.MSG_WAITALL) != b"here":
            raise RowFailed(f"before a {what}, the guest's sockets do not work")
        mark, events = len(session.machine.console()), session.event_mark()
        begin()
        if session.await_event("reset", events) is None:
            raise RowFailed(f"the guest was to do a {what} and did not")
        if _read_all(stream):
            raise RowFailed(f"data came from a guest after a {what}")
    probe = session.await_boot(mark)
    _listen(session, probe)
    with _connect(session) as stream:
        stream.sendall(b"again")
        if stream.recv(5, socket.MSG_WAITALL) != b"again":
            raise RowFailed(f"after a {what}, the guest's sockets do not work")
    return probe


def _boots(session: Session) -> Iterator[str]:
    machine = session.machine
    _next_boot(session, "reboot", lambda: machine.shut_down(ShutdownAction.REBOOT))
    _next_boot(session, "reset", machine.reset)
    yield "reboot by init, and reset: an open connection ended, and the next boot took new ones"


def _listen(session: Session, probe: Probe) -> None:
    # The log is there before the program is: it starts in its own time.
    start = f"setsid hvhost-probe listen {ECHO_PORT} </dev/null >>/tmp/echo.log 2>&1 &"
    run(probe, f": >/tmp/echo.log; {start}")
    deadline = time.monotonic() + session.timing.event
    while "listening" not in (log := probe.read("/tmp/echo.log")):
        if time.monotonic() > deadline:
            raise RowFailed("no program of the guest can listen on AF_VSOCK", log.splitlines())
        time.sleep(session.timing.poll)


def prove(session: Session) -> Iterator[str]:
    """Both directions with half-close, many at once, nobody there, by GUID, across reboots."""
    probe = session.running()
    if probe.carrier is not Carrier.SOCKET:
        raise RowFailed(f"the guest's probe was reached over its {probe.carrier}, not over sockets")
    yield "the probe of this and the other rows is asked over a Hyper-V socket"
    try:
        yield from _connections(session, probe)
    except TimeoutError:
        raise RowFailed(f"a connection neither moved nor ended while {session.doing}") from None
    except ConnectionError as error:
        raise RowFailed(f"a connection broke while {session.doing}: {error.strerror}") from error
    yield (
        f"both directions with half-close, {CONNECTIONS} connections at once, refusal, a reboot "
        "and a reset with a connection open"
    )


def _connections(session: Session, probe: Probe) -> Iterator[str]:
    _listen(session, probe)
    yield from _to_guest(session)
    yield from _to_host(session, probe)
    yield from _many(session, probe)
    yield from _nobody(session, probe)
    yield from _by_guid(session)
    yield from _boots(session)
