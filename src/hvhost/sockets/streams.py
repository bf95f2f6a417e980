"""Hyper-V sockets as asyncio streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from hvhost.errors import HvHostError
from hvhost.sockets.protocol import (
    CONNECT_SOCKET,
    Service,
    connect_line,
    describe,
    listen_name,
    parse_answer,
    service_id,
)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_BACKLOG = 1024


async def open_connection(
    directory: Path, service: Service, timeout: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams to *service* of the guest of the machine in *directory*.

    :class:`HvHostError` when the guest does not take the connection, and after *timeout* seconds.
    """
    identity = service_id(service)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(str(directory / CONNECT_SOCKET))
            try:
                writer.write(connect_line(identity))
                parse_answer(await reader.readline())
            except BaseException:
                writer.transport.abort()
                raise
    except TimeoutError:
        raise HvHostError(
            f"the machine did not connect {describe(identity)} of its guest within {timeout:g} "
            "seconds; look into its log."
        ) from None
    except OSError as error:
        raise HvHostError(
            f"the guest's sockets cannot be reached through {directory / CONNECT_SOCKET}: "
            f"{error.strerror or error}."
        ) from error
    return reader, writer


class Listener:
    """Takes the guest's connections to one service until :meth:`close`."""

    def __init__(self, server: asyncio.Server, path: Path) -> None:
        """For :meth:`start` only."""
        self._server, self._path = server, path

    @classmethod
    async def start(cls, directory: Path, service: Service, serve: Serve) -> Self:
        """Listen for *service*; :class:`HvHostError` if somebody does already."""
        identity = service_id(service)
        path = directory / listen_name(identity)
        try:
            _, writer = await asyncio.open_unix_connection(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # nobody, or one who went without cleaning up
        else:
            writer.close()
            raise HvHostError(f"somebody listens for {describe(identity)} of this machine already.")
        try:
            server = await asyncio.start_unix_server(serve, path=str(path), backlog=_BACKLOG)
        except OSError as error:
            raise HvHostError(
                f"{path} cannot be listened on: {error.strerror or error}."
            ) from error
        path.chmod(0o600)
        return cls(server, path)

    async def close(self) -> None:
        """Take no more connections; those there are go on."""
        self._server.close()
        self._path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
