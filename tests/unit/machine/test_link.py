"""What two processes of a machine tell each other, and what one does to the other."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.machine.link import LONGEST, Done, Failure, Link, LinkLostError, Received
from hvhost.plain import build, dump
from hvhost.storage import messages

KINDS = {each.__name__: each for each in (*messages.FROM_WORKER, *messages.FROM_STORAGE)}


@dataclass(frozen=True)
class Hello:
    text: str


class End:
    """A link that remembers what came."""

    def __init__(self, connection: socket.socket) -> None:
        self.received: list[Received] = []
        self.came, self.lost = threading.Semaphore(0), threading.Event()
        self.answer: Any = Done()
        self.link = Link("the other one", connection, [Hello], self._receive, self.lost.set)
        self.link.start()

    def _receive(self, received: Received) -> None:
        self.received.append(received)
        self.came.release()
        if received.number:
            self.link.serve(received.number, lambda: self._serve(received.message))

    def _serve(self, message: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Raw:
    """The other end, byte by byte."""

    end: End
    connection: socket.socket

    def frame(self, body: bytes, number: int = 0, answer: int = 0) -> None:
        self.connection.sendall(struct.pack("<IIB", len(body), number, answer) + body)


@pytest.fixture
def raw() -> Iterator[Raw]:
    ours, theirs = socket.socketpair()
    end = End(ours)
    yield Raw(end, theirs)
    end.link.close()
    theirs.close()


@pytest.fixture
def pair() -> Iterator[tuple[End, End]]:
    one, other = map(End, socket.socketpair())
    yield one, other
    one.link.close()
    other.link.close()


def test_messages_requests_and_files(pair: tuple[End, End]) -> None:
    one, other = pair
    reading, writing = os.pipe()
    one.link.send(Hello("a"), [reading])
    os.close(reading)
    assert other.came.acquire(timeout=10)
    (received,) = other.received
    assert received.message == Hello("a") and received.number == 0
    os.write(writing, b"through")
    assert os.read(received.files[0], 7) == b"through"
    os.close(writing)
    os.close(received.files[0])
    assert one.link.request(Hello("b")) == Done()
    other.answer = Hello("back")
    assert one.link.request(Hello("c")) == Hello("back")
    other.answer = HvHostError("that is not possible.")
    with pytest.raises(HvHostError, match="not possible"):
        one.link.request(Hello("d"))
    big = "x" * (2 << 20)  # more than a socket takes at once
    one.link.send(Hello(big))
    assert other.came.acquire(timeout=10)
    other.answer = Hello(big)
    assert one.link.request(Hello("e")) == Hello(big)


def test_who_waits_learns_of_the_end(pair: tuple[End, End]) -> None:
    one, other = pair
    held = threading.Event()
    other.link._receive = lambda received: held.set()
    error: list[Exception] = []

    def ask() -> None:
        try:
            one.link.request(Hello("a"))
        except HvHostError as problem:
            error.append(problem)

    thread = threading.Thread(target=ask)
    thread.start()
    assert held.wait(10)
    other.link.close()
    thread.join(10)
    assert isinstance(error[0], LinkLostError) and "the other one is gone" in str(error[0])
    assert one.lost.wait(10)
    one.link.send(Hello("b"))  # nobody hears it
    with pytest.raises(LinkLostError):
        one.link.request(Hello("c"))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a.vhdx"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_errors_of_files_come_whole(pair: tuple[End, End], error: OSError) -> None:
    one, other = pair
    other.answer = error
    with pytest.raises(type(error)) as raised:
        one.link.request(Hello("a"))
    assert (raised.value.errno, raised.value.filename) == (error.errno, error.filename)
    assert str(raised.value) == str(error)


def test_errors_that_only_look_like_those_of_files(pair: tuple[End, End]) -> None:
    one, other = pair
    other.answer = OSError("no number")
    with pytest.raises(HvHostError, match="no number"):
        one.link.request(Hello("a"))


def test_who_waits_no_longer(pair: tuple[End, End]) -> None:
    one, other = pair
    other.link._receive = lambda received: None
    with pytest.raises(TimeoutError, match="does not answer"):
        one.link.request(Hello("a"), timeout=0.05)
    assert not one.link._waiting


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b'["Hello"]',
        b'["Unknown",{}]',
        b'["Hello",{}]',
        b'["Hello",{"text":"a","more":1}]',
        b'["Hello",7]',
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_ends_the_link(
    raw: Raw, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    raw.frame(body)
    assert raw.end.lost.wait(10) and not raw.end.received
    assert "the other one does not keep to the protocol" in caplog.text
    with pytest.raises(LinkLostError):  # our end is open still, but nobody listens to answers
        raw.end.link.request(Hello("a"), timeout=10)


@pytest.mark.parametrize("words", [b"", b"\x05\0", b"\x05\0\0\0\0\0\0\0\0[1"])
def test_an_end_is_no_violation(words: bytes, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(words)
    theirs.close()
    assert end.lost.wait(10)
    end.link.close()
    assert not caplog.records


def test_a_frame_has_a_bound(raw: Raw) -> None:
    raw.connection.sendall(struct.pack("<IIB", LONGEST + 1, 0, 0))
    assert raw.end.lost.wait(10)


def test_answers_that_nobody_waits_for_and_files_that_nobody_wants(raw: Raw) -> None:
    raw.frame(b'["Done",{}]', 77, 1)
    raw.frame(b'["Hello",{"text":"after"}]')
    assert raw.end.came.acquire(timeout=10)
    before = len(list(Path("/proc/self/fd").iterdir()))
    answer = struct.pack("<IIB", 11, 5, 1) + b'["Done",{}]'
    reading, writing = os.pipe()
    socket.send_fds(raw.connection, [answer], [reading, writing])
    os.close(reading)
    os.close(writing)
    raw.frame(b'["Hello",{"text":"later"}]')
    assert raw.end.came.acquire(timeout=10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@settings(deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_nothing_gets_past_the_link(data: bytes, framed: bool) -> None:
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(struct.pack("<IIB", len(data), 0, 0) + data if framed else data)
    theirs.close()
    assert end.lost.wait(10)
    assert all(isinstance(each.message, Hello | Done | Failure) for each in end.received)
    end.link.close()


@given(st.one_of([st.from_type(each) for each in KINDS.values()]))
def test_messages_come_as_they_went(message: Any) -> None:
    assert build(KINDS[type(message).__name__], json.loads(dump(message))) == message
