from __future__ import annotations

import os
import socket
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.manager.terminal import Ending, attach


class Session:
    """The machine's side of a port, and a terminal attached to it in a thread."""

    def __init__(self, path: Path, source: int, sink: int) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        self.ending: Ending | None = None
        self.thread = threading.Thread(target=self._attach, args=(path, source, sink), daemon=True)
        self.thread.start()
        self.guest, _ = listener.accept()
        self.guest.settimeout(5)
        listener.close()

    def _attach(self, path: Path, source: int, sink: int) -> None:
        self.ending = attach(path, source, sink)

    def end(self) -> Ending | None:
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.ending


class Pipes:
    """What a shell gives a command whose input and output are not a terminal."""

    def __init__(self) -> None:
        self.source, self.typing = os.pipe()
        self.reading, self.sink = os.pipe()


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    for descriptor in (pipes.source, pipes.typing, pipes.reading, pipes.sink):
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_bytes_go_both_ways(tmp_path: Path, pipes: Pipes) -> None:
    session = Session(tmp_path / "s", pipes.source, pipes.sink)
    os.write(pipes.typing, b"ls\x1d\n\xff")  # no terminal: the escape character is a byte
    assert session.guest.recv(100) == b"ls\x1d\n\xff"
    session.guest.sendall(b"bin\x00\xfe")
    assert os.read(pipes.reading, 100) == b"bin\x00\xfe"
    session.guest.close()
    assert session.end() is Ending.CLOSED


def test_the_end_of_input_leaves_the_output(tmp_path: Path, pipes: Pipes) -> None:
    session = Session(tmp_path / "s", pipes.source, pipes.sink)
    os.close(pipes.typing)
    time.sleep(0.05)
    session.guest.sendall(b"still")
    assert os.read(pipes.reading, 100) == b"still"
    session.guest.close()
    assert session.end() is Ending.CLOSED


def test_an_output_nobody_reads_does_not_hold_the_guest_up(tmp_path: Path, pipes: Pipes) -> None:
    session = Session(tmp_path / "s", pipes.source, pipes.sink)
    data = bytes(range(256)) * 8192
    session.guest.sendall(data)  # 2 MiB: returns although nobody reads
    os.write(pipes.typing, b"x")
    assert session.guest.recv(1) == b"x"
    session.guest.close()
    received = b""
    while len(received) < len(data):
        received += os.read(pipes.reading, 65536)
    assert received == data
    assert session.end() is Ending.CLOSED


def test_input_a_guest_does_not_take_waits(tmp_path: Path, pipes: Pipes) -> None:
    session = Session(tmp_path / "s", pipes.source, pipes.sink)
    data = bytes(1 << 20)
    writer = threading.Thread(target=lambda: os.write(pipes.typing, data))
    writer.start()
    time.sleep(0.1)
    session.guest.sendall(b"!")
    assert os.read(pipes.reading, 1) == b"!"
    received = 0
    while received < len(data):
        received += len(session.guest.recv(65536))
    writer.join(5)
    session.guest.close()
    assert session.end() is Ending.CLOSED


def test_a_terminal_is_raw_meanwhile_and_left_by_the_escape(tmp_path: Path) -> None:
    person, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    assert before[3] & termios.ICANON
    session = Session(tmp_path / "s", terminal, terminal)
    while termios.tcgetattr(terminal)[3] & termios.ICANON:
        time.sleep(0.005)
    os.write(person, b"a\x03")  # Ctrl-C is the guest's
    received = b""
    while len(received) < 2:
        received += session.guest.recv(2)
    assert received == b"a\x03"
    assert not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    os.write(person, b"b\x1d")
    assert session.end() is Ending.ESCAPED
    assert termios.tcgetattr(terminal) == before
    os.close(person)
    os.close(terminal)


def test_a_machine_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match=r"cannot be opened .* has the machine stopped"):
        attach(tmp_path / "none", 0, 1)
