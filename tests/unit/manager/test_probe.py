"""Over what the probe of a running guest is asked."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.guests.probe import PROBE_PORT, ProbeClient
from hvhost.machine.serial import listen
from hvhost.manager import probe as probe_module
from hvhost.manager.directory import MachineDirectory
from hvhost.manager.probe import connect_probe


@pytest.fixture
def directory(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> MachineDirectory:
    """Of a machine whose serial port answers, and whose guest runs."""
    monkeypatch.setattr(probe_module, "_check_not_paused", lambda directory: None)
    monkeypatch.setattr(ProbeClient, "wait_ready", lambda self, timeout, drivers: None)
    found = MachineDirectory.of("m1")
    found.path.mkdir(parents=True)
    return found


@pytest.mark.parametrize("sockets", [True, False])
def test_sockets_come_first_and_the_serial_line_where_there_are_none(
    directory: MachineDirectory, sockets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    asked: list[tuple[Path, int]] = []

    def connect(path: Path, port: int, timeout: float) -> socket.socket:
        asked.append((path, port))
        if not sockets:
            raise HvHostError("nobody in the guest accepted the connection.")
        return ours

    monkeypatch.setattr(probe_module, "connect", connect)
    with listen(directory.serial_socket(2)) as serial, ours, theirs:
        probe = connect_probe(directory)
        assert asked == [(directory.path, PROBE_PORT)]
        serial.settimeout(0)
        with contextlib.closing(probe):
            if sockets:
                with pytest.raises(BlockingIOError):
                    serial.accept()
            else:
                serial.accept()[0].close()


def test_neither_is_there(directory: MachineDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HvHostError, match="second serial port of machine 'm1' cannot be reached"):
        connect_probe(directory)
