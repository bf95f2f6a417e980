"""The host's programs: plain sockets and asyncio streams, with a bridge in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.sockets.client import connect
from hvhost.sockets.protocol import parse_answer
from hvhost.sockets.streams import Listener, open_connection


class Bridge:
    """Answers connect lines as told, and sends what is given behind the answer."""

    def __init__(self, directory: Path, answer: bytes) -> None:
        self.directory, self.answer = directory, answer
        self.lines: list[bytes] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(directory / "vsock.sock"))
        self.listener.listen()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        stream, _ = self.listener.accept()
        with stream:
            self.lines.append(stream.recv(100))
            if self.answer == b"nothing":
                stream.recv(1)
            else:
                stream.sendall(self.answer)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hv", dir="/tmp") as name:
        yield Path(name)


def by_socket(directory: Path, timeout: float = 5.0) -> bytes:
    with connect(directory, 7000, timeout) as stream:
        assert stream.gettimeout() is None
        return stream.recv(100)


def by_stream(directory: Path, timeout: float = 5.0) -> bytes:
    async def main() -> bytes:
        reader, writer = await open_connection(directory, 7000, timeout)
        data = await reader.read(100)
        writer.close()
        return data

    return asyncio.run(main())


@pytest.mark.parametrize("client", [by_socket, by_stream])
def test_what_follows_the_answer_is_the_guests(directory: Path, client) -> None:  # type: ignore[no-untyped-def]
    bridge = Bridge(directory, b"OK 1073741824\nhello")
    assert client(directory) == b"hello"
    assert bridge.lines == [b"CONNECT 7000\n"]
    bridge.close()


@pytest.mark.parametrize("client", [by_socket, by_stream])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"REFUSED nobody in the guest.\n", "refused: nobody in the guest."),
        (b"", "the machine went away."),
        (b"OK", "the machine went away."),
        (b"HTTP/1.1 200 OK\n", "the machine went away."),
        (b"x" * 1000, "the machine went away."),
        (b"\xff\xfe\n", "the machine went away."),
    ],
)
def test_refusals_are_told(directory: Path, client, answer: bytes, words: str) -> None:  # type: ignore[no-untyped-def]
    bridge = Bridge(directory, answer)
    with pytest.raises(HvHostError, match="refused") as refused:
        client(directory)
    assert str(refused.value).endswith(words)
    bridge.close()


@pytest.mark.parametrize("client", [by_socket, by_stream])
def test_no_answer_and_no_machine(directory: Path, client) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HvHostError, match="cannot be reached through"):
        client(directory)
    bridge = Bridge(directory, b"nothing")
    with pytest.raises(HvHostError, match=r"port 7000 of its guest within 0\.1 seconds"):
        client(directory, 0.1)
    bridge.close()


def test_answers() -> None:
    parse_answer(b"OK 1\n")
    with pytest.raises(HvHostError, match="refused: because"):
        parse_answer(b"REFUSED because\n")


def test_a_listener_serves_until_it_is_closed(directory: Path) -> None:
    path = directory / "vsock_5000.sock"
    path.touch()  # left behind by one that was killed

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()

    async def main() -> None:
        async with await Listener.start(directory, 5000, serve):
            assert path.stat().st_mode & 0o777 == 0o600
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(b"hello")
            writer.write_eof()
            assert await reader.read() == b"HELLO"
            writer.close()
            with pytest.raises(HvHostError, match="somebody listens for port 5000"):
                await Listener.start(directory, 5000, serve)
        assert not path.exists()

    asyncio.run(main())


def test_a_listener_without_a_machine(directory: Path) -> None:
    async def main() -> None:
        await Listener.start(directory / "none", 5000, lambda reader, writer: asyncio.sleep(0))

    with pytest.raises(HvHostError, match="cannot be listened on"):
        asyncio.run(main())
