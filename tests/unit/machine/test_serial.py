from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_machine import SmallLoop

from hvhost.machine import serial
from hvhost.machine.serial import SerialSocket


class Port:
    """A serial port on its loop, driven by the test."""

    def __init__(self, path: Path, scrollback: int) -> None:
        self.path = path
        self.typed = bytearray()
        self.loop = SmallLoop()
        self.serial = SerialSocket(path, self.typed.extend, scrollback)
        self.serial.attach(self.loop)

    def settle(self) -> None:
        while self.loop.run_once(0.02):
            pass

    def client(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(self.path))
        connection.settimeout(5)
        self.settle()
        return connection


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    port = Port(tmp_path / "serial1.sock", scrollback=16)
    yield port
    port.serial.close()
    port.loop.close()


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (part := connection.recv(length - len(data))):
        data += part
    return data


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_only_the_owner_may_connect(port: Port) -> None:
    assert stat.S_IMODE(port.path.stat().st_mode) == 0o600


def test_every_client_gets_what_the_guest_sends(port: Port) -> None:
    with port.client() as one, port.client() as two:
        port.serial.write(b"hello")
        assert receive(one, 5) == receive(two, 5) == b"hello"


def test_what_clients_type_reaches_the_guest(port: Port) -> None:
    with port.client() as one, port.client() as two:
        one.sendall(b"ab")
        port.settle()
        two.sendall(b"c")
        port.settle()
    assert port.typed == b"abc"


def test_a_new_client_first_gets_the_end_of_the_past(port: Port) -> None:
    for letter in b"abcdefghijklmnopqrstuvwxyz" * 3:
        port.serial.write(bytes([letter]))
    with port.client() as client:
        assert receive(client, 16) == b"klmnopqrstuvwxyz"
        port.serial.write(b"!")
        assert receive(client, 1) == b"!"


def test_a_client_that_came_as_the_machine_stopped_gets_its_last_words(tmp_path: Path) -> None:
    port = Port(tmp_path / "serial1.sock", scrollback=100)
    port.serial.write(b"the last words")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "serial1.sock"))  # the loop never ran again
        port.serial.close()
        assert receive(client, 14) == b"the last words"
        assert client.recv(1) == b""


def test_without_scrollback_the_past_is_gone(tmp_path: Path) -> None:
    port = Port(tmp_path / "serial2.sock", scrollback=0)
    port.serial.write(b"past")
    with port.client() as client:
        port.serial.write(b"now")
        assert receive(client, 3) == b"now"
    port.serial.close()


def test_a_slow_client_gets_everything_later(port: Port) -> None:
    data = bytes(range(256)) * 2048  # 512 KiB: more than a socket holds, less than the limit
    with port.client() as client:
        port.serial.write(data)
        reader: list[bytes] = []
        thread = threading.Thread(target=lambda: reader.append(receive(client, len(data))))
        thread.start()
        while thread.is_alive():
            port.loop.run_once(0.01)
        assert reader == [data]
        assert port.loop.run_once(0.05) == 0  # and then nothing wakes the loop


def test_a_client_that_never_reads_is_dropped_and_the_others_go_on(port: Port) -> None:
    with port.client() as stuck, port.client() as reading:
        received = bytearray()
        chunk = b"x" * 65536
        for _ in range(2 * serial.CLIENT_LIMIT // len(chunk)):
            port.serial.write(chunk)
            received += receive(reading, len(chunk))
            port.settle()
        assert len(received) == 2 * serial.CLIENT_LIMIT
        kept = 0
        while part := stuck.recv(1 << 20):
            kept += len(part)
        assert kept < serial.CLIENT_LIMIT
        port.serial.write(b"y")
        assert receive(reading, 1) == b"y"


def test_a_client_that_stops_typing_still_hears(port: Port) -> None:
    with port.client() as client:
        client.shutdown(socket.SHUT_WR)
        port.settle()
        port.serial.write(b"still here")
        assert receive(client, 10) == b"still here"
        assert port.loop.run_once(0.05) == 0


def test_clients_that_left_leave_nothing_behind(port: Port) -> None:
    port.client().close()
    port.settle()
    before = open_descriptors()
    for _ in range(20):
        port.client().close()
        port.settle()
    for _ in range(20):
        half = port.client()
        half.shutdown(socket.SHUT_WR)
        port.settle()
        half.close()
    port.client().close()
    port.settle()
    assert open_descriptors() <= before + 1


def test_a_client_that_left_is_let_go_at_once(port: Port) -> None:
    before = open_descriptors()
    port.client().close()
    port.settle()
    assert open_descriptors() == before


def test_what_a_dropped_client_had_typed_is_not_the_guests_any_more(port: Port) -> None:
    with port.client() as stuck:
        stuck.sendall(b"rm -rf /\n")
        for _ in range(2):
            port.serial.write(bytes(2 * serial.CLIENT_LIMIT))
        port.settle()
        assert port.typed == b""


def test_a_client_gone_during_a_write_harms_nobody(port: Port) -> None:
    with port.client() as stays:
        port.client().close()
        port.serial.write(b"one")
        port.serial.write(b"two")
        port.settle()
        assert receive(stays, 6) == b"onetwo"


def test_too_many_clients_are_refused(port: Port) -> None:
    clients = [port.client() for _ in range(serial.MAXIMUM_CLIENTS)]
    with port.client() as refused:
        assert refused.recv(1) == b""
    clients.pop().close()
    port.settle()
    with port.client() as welcome:
        port.serial.write(b"z")
        assert receive(welcome, 1) == b"z"
    for client in clients:
        client.close()


def test_close_hands_over_the_rest_and_ends_the_connection(tmp_path: Path) -> None:
    port = Port(tmp_path / "serial1.sock", scrollback=0)
    data = bytes(300_000)
    with port.client() as client:
        port.serial.write(data)
        received: list[bytes] = []
        thread = threading.Thread(target=lambda: received.append(receive(client, len(data) + 1)))
        thread.start()
        port.serial.close()
        thread.join(5)
        assert received == [data]
    assert not port.path.exists()


def test_close_does_not_wait_long_for_who_does_not_read(tmp_path: Path) -> None:
    port = Port(tmp_path / "serial1.sock", scrollback=0)
    with port.client():
        port.serial.write(bytes(900_000))
        closing = threading.Thread(target=port.serial.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()


def test_an_idle_port_wakes_nobody(port: Port) -> None:
    with port.client():
        assert port.loop.run_once(0.1) == 0


def test_the_name_appears_only_when_connections_are_accepted(tmp_path: Path) -> None:
    (tmp_path / ".serial1.sock").write_text("left by a worker that was killed")
    port = Port(tmp_path / "serial1.sock", scrollback=0)
    assert not (tmp_path / ".serial1.sock").exists()
    port.client().close()
    port.serial.close()
