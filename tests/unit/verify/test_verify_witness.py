"""What the host's witness counts, and what it passes over, on sockets that say what we want."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.verify import witness

Answers = Callable[[bytes], list[bytes]]


class Wire:
    """A socket without a network: what is sent to it is answered by *answers*.

    Nothing blocks: to read where nothing has come is an error.
    """

    def __init__(self, answers: Answers = lambda sent: []) -> None:
        self.answers = answers
        self.sent: list[bytes] = []
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        self._addresses: list[tuple[object, ...]] = []

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *why: object) -> None:
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def setsockopt(self, *words: object) -> None:
        pass

    def bind(self, address: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def arrive(self, data: bytes, kind: int = 0) -> None:
        """*data* comes in, as a packet of this ``sll_pkttype``."""
        self._theirs.send(data)
        self._addresses.append(("tap0", 3, kind))

    def sendto(self, data: bytes, address: object) -> None:
        self.sent.append(data)
        for each in self.answers(data):
            self.arrive(each)

    def recv(self, size: int) -> bytes:
        return self.recvmsg(size)[0]

    def recvmsg(self, size: int, *more: int) -> tuple[bytes, list[Any], int, tuple[object, ...]]:
        try:
            data = self._ours.recv(size)
        except BlockingIOError:
            raise TimeoutError("nothing has come") from None
        status = struct.pack("=IIIHHHH", 0, len(data), len(data), 0, 0, 0, 0)
        auxiliary = (witness.SOL_PACKET, witness.PACKET_AUXDATA, status)
        return data, [auxiliary], 0, self._addresses.pop(0)


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wire], Wire]:
    """Have the witness's next sockets be a wire."""

    def plug(wire: Wire) -> Wire:
        names = {**vars(socket), "socket": lambda *words: wire}
        monkeypatch.setattr(witness, "socket", SimpleNamespace(**names))
        return wire

    return plug


Plug = Callable[[Wire], Wire]


def echo(packet: bytes, reply: int, identity: bytes = b"", data: bytes = b"") -> bytes:
    """An answer to an echo request; other than it should be where that is given."""
    head = bytes((reply, 0, 0, 0)) + (identity or packet[4:8])
    return head + (data or packet[8:])


@pytest.mark.parametrize(
    ("address", "reply", "header"), [("192.0.2.1", 0, bytes(20)), ("2001:db8::1", 129, b"")]
)
def test_only_an_answer_of_that_kind_to_that_request_counts(
    plug: Plug, address: str, reply: int, header: bytes
) -> None:
    def answers(packet: bytes) -> list[bytes]:
        others = [
            echo(packet, 3, data=b"unreachable"),  # of another kind, with the same number
            echo(packet, reply, identity=b"else", data=b"another's"),
        ]
        return [header + each for each in (*others, echo(packet, reply))]

    plug(Wire(answers))
    seen = witness.ping(address, size=100)
    assert (seen["sent"], seen["answers"], len(seen["seconds"])) == (1, 1, 1)


def test_an_answer_with_other_bytes_is_none(plug: Plug) -> None:
    plug(Wire(lambda packet: [bytes(20) + echo(packet, 0, data=b"x" * 56)]))
    assert witness.ping("192.0.2.1", count=3)["answers"] == 0


def test_nobody_who_answers_is_waited_for_until_the_time_is_over(plug: Plug) -> None:
    plug(Wire())
    assert witness.ping("192.0.2.1", count=2, timeout=0.01) == {
        "sent": 2,
        "answers": 0,
        "seconds": [],
    }


def test_a_source_waits_for_a_listener_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    tried: list[float] = []

    def refuse(address: object, timeout: float) -> socket.socket:
        tried.append(timeout)
        assert len(tried) < 10, "it is tried for ever"
        raise ConnectionRefusedError

    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(ConnectionRefusedError):
        witness.source("192.0.2.1", 5001, 1, timeout=3.0)
    assert len(tried) == 4


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The writer of the witness's input."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as file, os.fdopen(writer, "w") as end:
        monkeypatch.setattr("sys.stdin", file)
        yield end


ONE, OTHER = bytes.fromhex("02 00 00 00 00 01"), bytes.fromhex("02 00 00 00 00 02")


def frame(source: bytes, size: int = 60) -> bytes:
    return (b"\xff" * 6 + source + b"\x12\x34").ljust(size, b"\0")


@pytest.mark.parametrize(
    ("sender", "frames", "largest"), [("", 2, 86), ("02:00:00:00:00:01", 1, 46)]
)
def test_what_arrives_is_counted_and_what_leaves_is_not(
    plug: Plug, stdin: Any, sender: str, frames: int, largest: int
) -> None:
    wire = plug(Wire())
    wire.arrive(frame(ONE))
    wire.arrive(frame(OTHER, 100))
    wire.arrive(frame(ONE, 120), witness.PACKET_OUTGOING)
    stdin.close()  # it is enough, once what is there was counted
    seen = witness.watch("tap0", 60.0, sender)
    assert (seen["frames"], seen["largest"]) == (frames, largest)


def test_a_watch_ends_with_its_time(plug: Plug, stdin: Any) -> None:
    plug(Wire())
    assert witness.watch("tap0", 0.01)["frames"] == 0


def dhcp_message(kind: bytes, *more: bytes) -> bytes:
    head = bytearray(240)
    head[0], head[28:34] = 1, ONE
    return bytes(head) + b"\x35\x01" + kind + b"".join(more) + b"\xff"


def test_a_lease_is_offered_and_acknowledged_and_nothing_else_answered(plug: Plug) -> None:
    wire = plug(Wire())
    wire.arrive(dhcp_message(b"\x08"))  # INFORM asks for no address
    wire.arrive(bytes(240))  # BOOTP
    wire.arrive(dhcp_message(b"\x01"))
    wire.arrive(dhcp_message(b"\x03"))
    leased = witness.dhcp("tap0", "192.0.2.1", "192.0.2.7")
    assert leased == {"client": "02:00:00:00:00:01", "address": "192.0.2.7"}
    assert [witness.dhcp_options(each)[53] for each in wire.sent] == [b"\x02", b"\x05"]
    offered = {each[16:20] for each in wire.sent}
    assert offered == {socket.inet_aton("192.0.2.7")}


CUT = [
    dhcp_message(b"\x03")[:241],  # the code of an option, and no more
    dhcp_message(b"\x03")[:242],  # and its length
    bytes(240) + b"\x35\x00",  # a kind without a byte
    bytes(240) + b"\x0c\xff" + b"name",  # longer than the message
]


@pytest.mark.parametrize("message", CUT, ids=repr)
def test_a_cut_message_is_not_answered(plug: Plug, message: bytes) -> None:
    wire = plug(Wire())
    wire.arrive(message)
    wire.arrive(dhcp_message(b"\x03", b"\0\0"))
    assert witness.dhcp("tap0", "192.0.2.1", "192.0.2.7")["address"] == "192.0.2.7"
    assert len(wire.sent) == 1


@given(st.binary(max_size=64))
def test_options_are_read_of_any_bytes(data: bytes) -> None:
    for code, value in witness.dhcp_options(bytes(240) + data).items():
        assert bytes((code, len(value))) + value in data


def test_options_behind_padding_and_the_end() -> None:
    data = b"\x00\x00\x0c\x02vm\x00\x35\x01\x03\xff\x32\x04\x7f\x00\x00\x01"
    assert witness.dhcp_options(bytes(240) + data) == {12: b"vm", 53: b"\x03"}
