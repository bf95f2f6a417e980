"""The row ``hvsocket``: how it waits for a guest to let go of hundreds of connections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
from scripted_guest import FAST

from hvhost.verify.guest import CommandResult, Probe, RowFailed
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
