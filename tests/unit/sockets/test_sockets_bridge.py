"""Connections between a simulated guest's sockets and Unix sockets."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.errors import LocalProtocolError
from hvhost.sockets import bridge as bridge_module
from hvhost.sockets.device import SocketDevice
from hvhost.sockets.protocol import answer_to_guest, service_id
from hvhost.vmbus.protocol import (
    OpenChannel,
    OpenChannelResult,
    RelidReleased,
    TlConnectRequest,
    TlConnectResult,
    Unload,
)
from simulated.devices import Echo
from simulated.sockets import FROM_HOST, GuestSocket, SocketHost, data_packet

OWN = uuid.UUID("9b7a3b1e-0000-4000-8000-00155d010203")
SOON = 0.05  # seconds after which an offer that nobody takes is given up


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for the paths of sockets."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def host(directory: Path) -> Iterator[SocketHost]:
    host = SocketHost(directory)
    yield host
    assert not [fault for fault in host.guest.faults if "expected" not in fault]
    host.close()


def ended(program: socket.socket) -> bool:
    return program.recv(1) == b""


def over(host: SocketHost) -> bool:
    """The connection is gone from bridge, bus and guest."""
    host.guest.collect_offers()
    host.guest.take_rescinds()
    return not host.bridge.connections and not host.guest.server.channels


# Connecting.


@pytest.mark.parametrize("service", [5000, 0, 2**32 - 1, OWN])
def test_the_guest_connects_to_a_program(host: SocketHost, service: int | uuid.UUID) -> None:
    listener = host.listen(service)
    endpoint = host.request(service)
    program, _ = listener.accept()
    (offer,) = host.new_offers()
    assert (offer.if_type, offer.if_instance) == (service_id(service), endpoint)
    assert offer.user_def[FROM_HOST] == 0 and offer.chn_flags & 0x2000
    guest = host.open(offer)
    guest.send(b"hello")
    assert program.recv(100) == b"hello"
    program.sendall(b"world")
    host.run()
    assert guest.receive() == b"world"
    program.close()
    listener.close()


@pytest.mark.parametrize(
    ("line", "service"),
    [
        (b"CONNECT 6000\n", service_id(6000)),
        (b"CONNECT 6000\r\n", service_id(6000)),
        (f"CONNECT {OWN}\n".encode(), OWN),
    ],
)
def test_a_program_connects_to_the_guest(host: SocketHost, line: bytes, service: uuid.UUID) -> None:
    program = host.dial(line)
    (offer,) = host.new_offers()
    assert offer.if_type == service and offer.user_def[FROM_HOST] == 1
    guest = host.open(offer)
    assert program.recv(100) == b"OK 1073741824\n"
    assert offer.if_instance == service_id(1073741824)
    program.sendall(b"hello")
    host.run()
    assert guest.receive() == b"hello"
    guest.send(b"world")
    assert program.recv(100) == b"world"
    program.close()


def test_a_line_may_come_in_pieces_and_with_data_behind_it(host: SocketHost) -> None:
    program = host.dial(b"CONN")
    program.sendall(b"ECT 60")
    host.run()
    program.sendall(b"00\nearly")
    host.run()
    guest = host.accept()
    host.run()
    assert guest.receive() == b"early"
    program.close()


def refusal(host: SocketHost, line: bytes, seconds: float = 0.0) -> str:
    program = host.dial(line)
    host.run(seconds)
    answer = program.recv(1000).decode()
    assert answer.startswith("REFUSED ") and answer.endswith(".\n")
    assert ended(program)
    program.close()
    return answer[8:-1]


def test_lines_that_are_none(host: SocketHost) -> None:
    assert "must be CONNECT" in refusal(host, b"GET / HTTP/1.1\n")
    assert "must be CONNECT" in refusal(host, b"C" * 64)
    assert "no socket service" in refusal(host, b"CONNECT http\n")
    assert "no socket port" in refusal(host, b"CONNECT 4294967296\n")


def test_who_says_nothing_is_let_go(host: SocketHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "LINE_SECONDS", 0.02)
    assert "no connect line" in refusal(host, b"", 0.05)
    program = host.dial(b"CONNECT")
    program.shutdown(socket.SHUT_WR)
    host.run()
    assert ended(program)


def test_only_so_many_may_say_nothing(host: SocketHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "MAXIMUM_HANDSHAKES", 2)
    silent = [host.dial(b"") for _ in range(2)]
    assert "too many" in refusal(host, b"")
    silent.pop().close()
    host.run()
    assert "no socket service" in refusal(host, b"CONNECT x\n")
    silent.pop().close()


def test_nobody_listens_in_the_guest(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    assert "nobody in the guest accepted" in refusal(host, b"CONNECT 1\n", 0.1)
    assert over(host)


def test_a_paused_guest_is_not_connected_to_and_its_time_is_not_counted(
    host: SocketHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.bridge.accept_seconds = SOON
    program = host.dial(b"CONNECT 1\n")
    (offer,) = host.new_offers()
    host.bridge.pause()
    name = host.directory.name
    assert f"{name!r} is paused; `hvhost resume {name}`" in refusal(host, b"CONNECT 2\n")
    monkeypatch.setattr(bridge_module, "ACCEPT_LIMIT", 0.2)
    host.run(0.3)  # longer than an offer waits
    host.bridge.resume()
    guest = host.open(offer)
    assert program.recv(100).startswith(b"OK ")
    guest.send(b"hello")
    assert program.recv(100) == b"hello"
    program.close()


def test_a_resumed_guest_that_takes_nothing_is_given_up(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    host.bridge.pause()
    host.bridge.resume()
    assert "nobody in the guest accepted" in refusal(host, b"CONNECT 1\n", 0.1)


def test_a_connection_that_was_accepted_is_not_given_up(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    guest, program = host.host_to_guest()
    host.run(2 * SOON)
    guest.send(b"hello")
    assert program.recv(100) == b"hello"
    program.close()


def test_an_offer_waits_while_the_guest_takes_others(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    program = host.dial(b"CONNECT 1\n")
    (offer,) = host.new_offers()
    host.bridge.accepted_at = time.monotonic() + 3600.0  # no wait of this test is longer
    host.run(2 * SOON)
    guest = host.open(offer)
    assert program.recv(100).startswith(b"OK ")
    guest.send(b"hello")
    assert program.recv(100) == b"hello"
    program.close()


def test_an_offer_that_ended_before_its_time_is_not_blamed_on_the_guest(
    host: SocketHost, caplog: pytest.LogCaptureFixture
) -> None:
    host.bridge.accept_seconds = SOON
    pending = host.dial(b"CONNECT 9\n")
    host.bridge.detach()
    with caplog.at_level("INFO"):
        host.run(2 * SOON)
    assert not caplog.records
    assert ended(pending)


def test_what_the_loop_still_had_for_a_connection_that_ended(host: SocketHost) -> None:
    """A virtual processor's thread ended it while the loop waited for the lock."""
    guest, program = host.guest_to_host()
    (connection,) = host.bridge.connections
    host.guest.close(guest.channel.offer.child_relid)
    connection._ready()
    assert ended(program)


def test_an_acceptance_that_comes_too_late(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    program = host.dial(b"CONNECT 1\n")
    (offer,) = host.new_offers()
    host.run(0.1)
    pfns = host.guest.allocate(14)
    handle, status = host.guest.make_gpadl(offer.child_relid, [(14 * 4096, 0, pfns)])
    assert status == 0  # the guest did not look at the rescind yet
    host.guest.post(OpenChannel(offer.child_relid, 1, handle, 0, 7))
    assert host.guest.reply(OpenChannelResult).status != 0
    program.close()


def test_there_is_no_guest(directory: Path) -> None:
    host = SocketHost(directory, version=0)
    assert "has not connected to its bus" in refusal(host, b"CONNECT 1\n")
    host.bridge.detach()
    assert "being reset" in refusal(host, b"CONNECT 1\n")
    listener = host.listen(2)
    assert host.bridge.guest_connects(service_id(1), service_id(2)) is False
    listener.close()
    host.close()
    assert not (directory / "vsock.sock").exists()


def test_nobody_listens_on_the_host(host: SocketHost) -> None:
    endpoint = host.request(5000)
    result = host.guest.reply(TlConnectResult)
    assert (result.guest_endpoint_id, result.status) == (endpoint, 0xC0000236)
    listener = host.listen(5000)
    listener.close()  # its name is still there
    host.request(5000)
    assert host.guest.reply(TlConnectResult).status == 0xC0000236
    assert not host.guest.server.channels


def test_an_old_guest_is_not_told_of_a_refusal(directory: Path) -> None:
    host = SocketHost(directory, version=0x40000)
    host.guest.post(TlConnectRequest(service_id(1), service_id(2)), connection_id=1)
    assert not host.guest.replies(TlConnectResult)
    host.close()


def test_a_program_that_does_not_accept(host: SocketHost) -> None:
    listener = host.listen(5000)
    listener.listen(0)
    host.request(5000)
    host.request(5000)  # its backlog is full
    assert len(host.bridge.connections) == 1
    assert host.guest.reply(TlConnectResult).status == 0xC0000236
    listener.close()


def test_a_guest_that_asks_and_does_not_open(host: SocketHost) -> None:
    host.bridge.accept_seconds = SOON
    listener = host.listen(5000)
    host.request(5000)
    program, _ = listener.accept()
    host.run(0.1)
    assert ended(program)
    assert over(host)
    listener.close()


def test_an_endpoint_in_use_is_refused(host: SocketHost) -> None:
    listener = host.listen(5000)
    endpoint = host.request(5000)
    host.request(5000, endpoint)
    assert host.guest.reply(TlConnectResult).status == 0xC0000236
    assert len(host.bridge.connections) == 1
    listener.close()


def test_a_guest_cannot_pose_as_another_device(host: SocketHost) -> None:
    echo = Echo(host.guest.memory)
    host.guest.server.add_device(echo)
    listener = host.listen(echo.offer.interface_type)
    host.request(echo.offer.interface_type, echo.offer.interface_instance)
    assert not host.bridge.connections
    listener.close()


def test_switched_off(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    host.bridge.enabled = False
    assert "switched off" in refusal(host, b"CONNECT 1\n")
    listener = host.listen(5000)
    host.request(5000)
    assert host.guest.reply(TlConnectResult).status == 0xC0000236
    guest.send(b"goes on")
    assert program.recv(100) == b"goes on"
    program.close()
    listener.close()


def test_connections_are_limited(host: SocketHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "MAXIMUM_CONNECTIONS", 2)
    _first = host.host_to_guest()
    _second = host.guest_to_host()
    assert "2 connections already" in refusal(host, b"CONNECT 1\n")
    listener = host.listen(5000)
    host.request(5000)
    assert host.guest.reply(TlConnectResult).status == 0xC0000236
    listener.close()


def test_a_bus_that_is_full(host: SocketHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvhost.vmbus.server.MAX_CHANNEL_RELIDS", 2)
    _first = host.host_to_guest()
    assert "the bus is full" in refusal(host, b"CONNECT 1\n")


# Ending.


@pytest.mark.parametrize("first", ["guest", "program"])
def test_each_direction_ends_by_itself(host: SocketHost, first: str) -> None:
    guest, program = host.guest_to_host()
    if first == "guest":
        guest.send(b"last words")
        guest.finish()
        host.run()
        assert program.recv(100) == b"last words" and ended(program)
        program.sendall(b"still here")
        host.run()
        assert guest.receive() == b"still here" and not guest.ended
        program.shutdown(socket.SHUT_WR)
        host.run()
    else:
        program.sendall(b"last words")
        program.shutdown(socket.SHUT_WR)
        host.run()
        assert guest.receive() == b"last words" and guest.ended
        assert host.bridge.connections
        guest.send(b"still here")
        assert program.recv(100) == b"still here"
        guest.finish()
        host.run()
        assert ended(program)
    guest.receive()
    assert guest.ended and over(host)


def test_what_a_program_sent_before_it_closed_arrives(host: SocketHost) -> None:
    guest, program = host.host_to_guest()
    data = os.urandom(60_000)  # more than the ring holds
    program.settimeout(0.2)
    program.sendall(data)
    program.close()
    received = b""
    for _ in range(50):
        host.run()
        received += guest.receive()
        if guest.ended:
            break
    assert received == data
    assert over(host)


@pytest.mark.parametrize("size", [3924, 3932, 3956, 3964])
def test_the_end_arrives_too_if_the_ring_has_no_room_for_it(host: SocketHost, size: int) -> None:
    program = host.dial(b"CONNECT 1\n")
    guest = host.accept(pages=2)
    host.run()
    assert program.recv(100).startswith(b"OK ")
    program.sendall(bytes(size))
    program.close()
    host.run()
    assert not guest.ended
    received = guest.receive()
    host.run()
    received += guest.receive()
    assert received == bytes(size) and guest.ended
    host.run()
    assert over(host)


def test_a_program_that_closed_does_not_keep_the_loop_busy(host: SocketHost) -> None:
    _guest, program = host.host_to_guest()
    program.sendall(bytes(100_000))
    program.close()
    host.run()
    before = host.loop.wake_ups
    host.run(0.05)
    assert host.loop.wake_ups - before < 25


def test_what_the_guest_sends_to_a_program_that_closed(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    guest.send(b"unread")
    program.close()  # with data unread: a reset
    host.run()
    guest.receive()
    assert guest.ended and over(host)


def test_a_program_that_closes_while_the_guest_sends(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    while guest.send(bytes(4088)):
        host.run()
    program.close()
    host.run()
    guest.receive()
    assert guest.ended and over(host)


def test_a_guest_that_closed_and_left_data_unread(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    program.settimeout(0.2)
    with pytest.raises(TimeoutError):
        for _ in range(10_000):
            program.sendall(bytes(4096))
            host.run()
    guest.finish()
    program.close()
    host.run()
    assert host.bridge.connections  # it may still read
    host.run(0.1)
    assert over(host)


def test_a_channel_that_the_guest_closes(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    host.guest.close(guest.channel.offer.child_relid)
    host.run()
    assert ended(program)
    host.guest.post(RelidReleased(guest.channel.offer.child_relid))
    assert over(host)


def test_a_guest_that_restarts(host: SocketHost) -> None:
    _guest, program = host.guest_to_host()
    accept_seconds, host.bridge.accept_seconds = host.bridge.accept_seconds, SOON
    pending = host.dial(b"CONNECT 9\n")
    host.guest.server.reset()
    host.run()
    assert ended(program)
    host.run(0.1)
    assert pending.recv(100).startswith(b"REFUSED")
    assert not host.guest.server.channels and not host.bridge.connections
    host.bridge.accept_seconds = accept_seconds
    host.guest.connect()
    guest, program = host.guest_to_host()
    guest.send(b"again")
    assert program.recv(100) == b"again"
    program.close()


def test_a_guest_that_unloads_its_bus(host: SocketHost) -> None:
    _guest, program = host.guest_to_host()
    host.guest.post(Unload())
    assert ended(program)
    assert not host.guest.server.channels and not host.bridge.connections


def test_a_computer_that_goes(host: SocketHost) -> None:
    _guest, program = host.guest_to_host()
    pending = host.dial(b"CONNECT 9\n")
    host.bridge.detach()
    assert ended(program)
    assert ended(pending)
    assert not host.bridge.connections


def test_a_bridge_that_closes(directory: Path) -> None:
    host = SocketHost(directory)
    program = host.dial(b"CONN")
    host.close()
    assert ended(program)


# Much data, and who does not take it.


def test_the_guest_is_held_back_while_a_program_does_not_read(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    data = random.Random(1).randbytes(4 << 20)
    sent = 0
    while more := guest.send(data[sent : sent + (64 << 10)]):
        sent += more
        host.run()
    (connection,) = host.bridge.connections
    kept = sum(len(part) for part in connection._to_program)
    assert kept <= 96 << 10 and sent < 2 << 20
    received = bytearray()
    program.setblocking(False)
    while len(received) < len(data):
        host.run()
        with contextlib.suppress(BlockingIOError):
            received += program.recv(1 << 20)
        sent += guest.send(data[sent : sent + (64 << 10)])
    assert received == data
    program.close()


def test_a_program_is_held_back_while_the_guest_does_not_read(host: SocketHost) -> None:
    guest, program = host.host_to_guest()
    data = random.Random(2).randbytes(4 << 20)
    program.setblocking(False)
    sent = 0
    for _ in range(1000):
        host.run()
        try:
            sent += program.send(data[sent : sent + (64 << 10)])
        except BlockingIOError:
            break
    assert sent < 2 << 20
    (channel,) = host.guest.server.channels
    assert channel.queued <= 1
    before = host.loop.wake_ups
    host.run(0.05)
    assert host.loop.wake_ups - before < 25
    received = bytearray()
    while len(received) < len(data):
        received += guest.receive(3)
        host.run()
        with contextlib.suppress(BlockingIOError):
            sent += program.send(data[sent : sent + (64 << 10)])
    assert received == data
    program.close()


def test_a_full_ring_does_not_stop_the_other_direction(host: SocketHost) -> None:
    guest, program = host.host_to_guest()
    program.settimeout(0.05)
    with pytest.raises(TimeoutError):
        while True:
            program.sendall(bytes(1 << 16))
            host.run()
    guest.send(b"this way is free")
    host.run()
    assert program.recv(100) == b"this way is free"
    program.close()


def test_a_socket_that_takes_part_of_a_packet(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    (connection,) = host.bridge.connections
    connection._stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is
    data = random.Random(3).randbytes(100_000)
    sent, received = 0, b""
    while len(received) < len(data):
        sent += guest.send(data[sent:])
        host.run()
        received += program.recv(1 << 20)
    assert received == data
    program.close()


@pytest.mark.parametrize("pages", [2, 3, 65])
def test_rings_of_any_size(host: SocketHost, pages: int) -> None:
    program = host.dial(b"CONNECT 1\n")
    guest = host.accept(pages=pages)
    host.run()
    program.recv(100)
    data = os.urandom(150_000)
    program.settimeout(None)
    received, sent = bytearray(), 0
    while len(received) < len(data):
        sent += program.send(data[sent : sent + 50_000]) if sent < len(data) else 0
        host.run()
        received += guest.receive()
    assert received == data
    program.close()


def test_hundreds_of_connections(directory: Path) -> None:
    host = SocketHost(directory, pages=8000)
    pairs: list[tuple[GuestSocket, socket.socket]] = []
    for number in range(300):
        program = host.dial(f"CONNECT {number}\n".encode())
        pairs.append((host.accept(pages=2), program))
    host.run()
    for number, (guest, program) in enumerate(pairs):
        assert program.recv(100) == f"OK {(1 << 30) + number}\n".encode()
        guest.send(b"%d" % number)
        program.sendall(b"%d" % -number)
    host.run()
    for number, (guest, program) in enumerate(pairs):
        assert program.recv(100) == b"%d" % number
        assert guest.receive() == b"%d" % -number
    for _, program in pairs:
        program.close()
    host.run()
    assert over(host)
    assert not host.guest.faults
    host.close()


# A bad guest.


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<II", 1, 9) + bytes(8),
        struct.pack("<II", 1, 2**32 - 1),
        struct.pack("<II", 3, 0),
        struct.pack("<II", 1, 16385) + bytes(16385),
    ],
)
def test_a_bad_packet_ends_its_connection_only(directory: Path, payload: bytes) -> None:
    host = SocketHost(directory)
    good, program = host.guest_to_host()
    bad, victim = host.guest_to_host()
    bad.channel.write(payload)
    host.run()
    assert ended(victim)
    assert len(host.guest.faults) == 1
    good.send(b"goes on")
    assert program.recv(100) == b"goes on"
    host.guest.take_rescinds()
    assert len(host.bridge.connections) == len(host.guest.server.channels) == 1
    host.close()


def test_a_packet_after_the_last_one(directory: Path) -> None:
    host = SocketHost(directory)
    guest, program = host.guest_to_host()
    guest.finish()
    guest.send(b"and another thing")
    host.run()
    assert "after the last one" in host.guest.faults[0]
    assert ended(program)
    host.close()


def test_a_packet_of_another_kind(directory: Path) -> None:
    host = SocketHost(directory)
    guest, program = host.guest_to_host()
    guest.channel.write(data_packet(b"x"), packet_type=11)
    host.run()
    assert "COMP" in host.guest.faults[0]
    assert ended(program)
    host.close()


def test_a_guest_that_breaks_the_ring_while_the_host_writes(directory: Path) -> None:
    host = SocketHost(directory)
    guest, program = host.guest_to_host()
    guest.channel.incoming.set_word(1, 12345)
    program.sendall(b"x")
    host.run()
    assert "read index" in host.guest.faults[0]
    assert ended(program)
    host.close()


def test_a_device_that_is_not_open_cannot_be_written_to() -> None:
    device = SocketDevice(answer_to_guest(service_id(1), service_id(2)), None)  # type: ignore[arg-type]
    assert not device.writable and not device.flushed and not device.paused
    with pytest.raises(LocalProtocolError):
        device.send(b"x")
    with pytest.raises(LocalProtocolError):
        device.finish()


def test_a_device_takes_nothing_after_the_last_packet(host: SocketHost) -> None:
    guest, program = host.guest_to_host()
    (connection,) = host.bridge.connections
    device = connection._device
    assert device is not None
    device.finish()
    assert not device.writable
    with pytest.raises(LocalProtocolError, match="port 5000 cannot be written to now"):
        device.send(b"x")
    with pytest.raises(LocalProtocolError):
        device.finish()
    host.run()
    assert guest.receive() == b"" and guest.ended
    program.close()
