"""A machine's serial port for asyncio programs: read, type, and wait for what the guest says."""

from __future__ import annotations

import asyncio
import codecs
import re
from pathlib import Path

from hvhost.errors import HvHostError

TRANSCRIPT_LIMIT = 4 << 20
"""Characters of the past a console keeps, read or not."""

_TAIL_LINES = 8


class Console:
    """One connection to a serial port; text is UTF-8, what is not becomes U+FFFD.

    What the guest sends is taken in at once, read or not, so the worker never drops this client.
    Reading methods consume the text in order and are for one task at a time.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._read = 0
        self._arrived = asyncio.Event()
        self._closed = False
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def open(cls, path: Path, name: str) -> Console:
        """Connect to the port at *path* of machine *name*; starts with its scrollback."""
        console = cls(name)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: _Receiver(console), str(path))
        except OSError as error:
            raise HvHostError(
                f"the console of machine {name!r} cannot be opened ({error}); has it stopped?"
            ) from error
        return console

    @property
    def transcript(self) -> str:
        """All the guest sent, up to the last 4 Mi characters, whether read or not."""
        return self._text

    async def read(self) -> str:
        """What has come since the last reading, waiting for something; ``""`` at the end."""
        while self._read == len(self._text) and not self._closed:
            await self._wait()
        text = self._text[self._read :]
        self._read = len(self._text)
        return text

    async def expect(
        self, pattern: str | re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]:
        """Wait until unread text matches the regular expression; consumes through the match.

        *timeout* is in seconds. Raises :class:`HvHostError` with the last lines seen when it has
        passed or the machine has stopped; nothing is consumed then.
        """
        compiled = re.compile(pattern)
        try:
            async with asyncio.timeout(timeout):
                while True:
                    match = compiled.search(self._text, self._read)
                    if match is not None:
                        self._read = match.end()
                        return match
                    if self._closed:
                        raise HvHostError(
                            f"machine {self._name!r} stopped before its console showed"
                            f" {compiled.pattern!r}; {self._tail()}"
                        )
                    await self._wait()
        except TimeoutError:
            raise HvHostError(
                f"the console of machine {self._name!r} did not show {compiled.pattern!r} within"
                f" {timeout:g} seconds; {self._tail()}"
            ) from None

    def write(self, text: str) -> None:
        """Type *text* as it is; :class:`HvHostError` when the machine has stopped."""
        if self._closed or self._transport is None:
            raise HvHostError(
                f"machine {self._name!r} has stopped; nothing can be typed at its console."
            )
        self._transport.write(text.encode())

    def send_line(self, text: str) -> None:
        """Type *text* and the return key."""
        self.write(text + "\r")

    def close(self) -> None:
        """Let go of the port; the text that came stays readable."""
        if self._transport is not None:
            self._transport.close()

    async def _wait(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _tail(self) -> str:
        lines = self._text.replace("\r", "").splitlines()[-_TAIL_LINES:]
        return f"it last showed: {' ⏎ '.join(lines)}" if lines else "it showed nothing at all."

    def _receive(self, data: bytes, *, end: bool = False) -> None:
        self._text += self._decoder.decode(data, end)
        if len(self._text) > 2 * TRANSCRIPT_LIMIT:
            dropped = len(self._text) - TRANSCRIPT_LIMIT
            self._text = self._text[dropped:]
            self._read = max(self._read - dropped, 0)
        self._closed = self._closed or end
        self._arrived.set()


class _Receiver(asyncio.Protocol):
    """Feeds a console from its socket."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._console._transport = transport

    def data_received(self, data: bytes) -> None:
        self._console._receive(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._console._receive(b"", end=True)
