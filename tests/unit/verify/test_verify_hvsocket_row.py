"""The row ``hvsocket``: how it waits for connections to go; that nothing which is wrong passes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from scripted_guest import FAST

from hvhost.errors import HvHostError
from hvhost.machine.serial import listen
from hvhost.sockets.protocol import service_id
from hvhost.verify.guest import Carrier, CommandResult, Probe, RowFailed
from hvhost.verify.rows import hvsocket
from hvhost.verify.session import Session
from hvhost.verify.sysfs import interface_name

CONNECTION = "{00001b58-facb-11e6-bd58-64006a7986d3}\n"
OTHER = "{57164f39-9115-4e78-ab55-382f3bd5422d}\n"


class Guest:
    """Lists so many connections at each look; the last number for ever."""

    def __init__(self, *left: int) -> None:
        self._left: Iterator[int] = iter(left)
        self._last = 0

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        self._last = next(self._left, self._last)
        return CommandResult(0, OTHER + CONNECTION * self._last)


def await_gone(guest: Guest) -> None:
    session = cast("Session", SimpleNamespace(timing=FAST))
    hvsocket._await_gone(session, cast("Probe", guest), 1)


def test_a_slow_guest_that_goes_on_is_waited_for() -> None:
    # Many more looks than fit into the time in which nothing may happen.
    steps = range(120, 0, -1)
    assert len(steps) * FAST.poll > 5 * FAST.event
    await_gone(Guest(*steps))


def test_a_guest_that_keeps_connections_fails() -> None:
    with pytest.raises(RowFailed, match=r"^7 connections are left in the guest"):
        await_gone(Guest(9, 8, 7))


def test_sockets_are_named_by_their_port() -> None:
    assert interface_name("00001b58-facb-11e6-bd58-64006a7986d3") == "socket, port 7000"
    assert interface_name("57164f39-9115-4e78-ab55-382f3bd5422d") == "heartbeat"
    own = "6f0c7a0e-58f1-4c66-9f1a-68766f737431"
    assert interface_name(own) == own


ECHO = service_id(hvsocket.ECHO_PORT)


class Whole:
    """A guest with an echoing program, and its machine; each fault makes one thing go wrong."""

    def __init__(self, directory: Path, *faults: str) -> None:
        self.directory, self.faults = directory, set(faults)
        self.carrier = Carrier.SERIAL_LINE if "serial" in faults else Carrier.SOCKET
        self.boots = 0
        self.ends: list[socket.socket] = []
        self.threads: list[threading.Thread] = []

    # The host's side.

    def connect(self, service: int | uuid.UUID, timeout: float) -> socket.socket:
        identity = service if isinstance(service, uuid.UUID) else service_id(service)
        if identity != ECHO and "accepts-all" not in self.faults:
            nobody = "the machine went away." if "other-word" in self.faults else "nobody took it."
            raise HvHostError(f"The connection to the guest was refused: {nobody}")
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        wrong = isinstance(service, uuid.UUID) and "no-guid" in self.faults
        wrong |= bool(self.boots) and "deaf-after" in self.faults
        thread = threading.Thread(target=self.echo, args=(theirs, wrong))
        thread.start()
        self.threads.append(thread)
        return ours

    def echo(self, stream: socket.socket, wrong: bool) -> None:
        with contextlib.suppress(OSError):
            whole = 0
            while data := stream.recv(1000 if "breaks" in self.faults else 1 << 16):
                whole += len(data)
                if "breaks" in self.faults and whole > 100:
                    stream.close()  # with data unread
                    return
                if "swaps" in self.faults and len(data) == 6:
                    data = b"000000"
                if "cuts" in self.faults and whole >= hvsocket.TRANSFER:
                    data = data[:-1]
                if wrong or ("alters" in self.faults and len(data) == 8):
                    data = bytes(each ^ 1 for each in data)
                stream.sendall(data)
            if "no-end" in self.faults:
                return
            stream.shutdown(socket.SHUT_RDWR)

    def listen(self, port: int) -> socket.socket:
        return listen(self.directory / f"vsock_{port}.sock")

    def console(self) -> str:
        return ""

    def shut_down(self, action: object) -> None:
        self.reset()

    def reset(self) -> None:
        self.boots += 1
        for stream in self.ends:
            with contextlib.suppress(OSError):
                if "ghost" in self.faults:
                    stream.sendall(b"ghost")
                stream.shutdown(socket.SHUT_RDWR)

    # The session's.

    def event_mark(self) -> int:
        return 0

    def await_event(self, kind: str, mark: int) -> object:
        return None if "no-reset" in self.faults else kind

    def await_boot(self, mark: int) -> Whole:
        return self

    # The guest's.

    def read(self, path: str) -> str:
        return "" if "no-listen" in self.faults else "listening on port 7000\n"

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        if command[0] == "hvhost-probe":
            if "host-accepts" in self.faults:
                return CommandResult(0, "")
            return CommandResult(1, "connect: Connection timed out")
        script = command[-1]
        if "class_id" in script:
            open_ones = sum(thread.is_alive() for thread in self.threads)
            if "lists-few" in self.faults or "keeps" in self.faults:
                open_ones = 3 if "lists-few" in self.faults else max(open_ones, len(self.threads))
            return CommandResult(0, OTHER + CONNECTION * open_ones)
        if script.startswith("head -c"):
            return CommandResult(0, self._send(int(script.split()[2])))
        return CommandResult(0, "")

    def _send(self, size: int) -> str:
        data = os.urandom(size)
        digest = hashlib.sha256(data).hexdigest()
        if "silent" in self.faults:
            return f"{digest}  -\n"
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(str(self.directory / f"vsock_{hvsocket.HOST_PORT}.sock"))
            stream.sendall(data[1:] if "loses" in self.faults else data)
            stream.shutdown(socket.SHUT_WR)
            return f"{digest}  -\n{stream.recv(100).decode()}"

    def prove(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        for name, value in (("TRANSFER", 1 << 18), ("CONNECTIONS", 5), ("ROUND_TRIPS", 3)):
            monkeypatch.setattr(hvsocket, name, value)
        patience = 0.2 if self.faults & {"silent", "no-end"} else 20.0
        for name in ("_CONNECT_SECONDS", "_DATA_SECONDS"):
            monkeypatch.setattr(hvsocket, name, patience)

        def step(text: str) -> None:
            session.doing = text

        session = SimpleNamespace(
            timing=FAST,
            machine=self,
            step=step,
            doing="",
            running=lambda: self,
            event_mark=self.event_mark,
            await_event=self.await_event,
            await_boot=self.await_boot,
        )
        try:
            return list(hvsocket.prove(cast("Session", session)))
        finally:
            for stream in self.ends:
                with contextlib.suppress(OSError):
                    stream.shutdown(socket.SHUT_RDWR)
            for thread in self.threads:
                thread.join()
            for stream in self.ends:
                stream.close()


def test_a_right_guest_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Whole(tmp_path)
    said = guest.prove(monkeypatch)
    assert guest.boots == 2
    assert "host to guest: 3 round trips" in said[1]
    assert "at once: 5 connections, all on the guest's bus" in said[3]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("serial", "reached over its serial"),
        ("no-listen", "can listen on AF_VSOCK"),
        ("alters", "is not what it was sent"),
        ("cuts", "of 262144 bytes sent to the guest and back, 262143 returned"),
        ("no-end", "a connection neither moved nor ended while connecting to the guest"),
        ("breaks", "a connection broke while connecting to the guest: Connection reset by peer"),
        ("silent", "port 5000 brought nothing"),
        ("loses", "received something else than the guest sent"),
        ("lists-few", "of 5 connections the guest lists 3"),
        ("swaps", "got each other's data"),
        ("keeps", "connections are left in the guest"),
        ("accepts-all", "accepted where nobody listens"),
        ("other-word", "nobody listens in the guest, but: The connection"),
        ("host-accepts", "nobody listens on the host, but the guest says ''"),
        ("no-guid", "by service GUID does not work"),
        ("no-reset", "was to do a reboot and did not"),
        ("ghost", "data came from a guest after a reboot"),
        ("deaf-after", "after a reboot, the guest's sockets do not work"),
    ],
)
def test_each_wrong_guest_fails(
    fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RowFailed) as failed:
        Whole(tmp_path, fault).prove(monkeypatch)
    assert said in str(failed.value)
