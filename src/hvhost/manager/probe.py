"""The probe in a running guest, over whatever reaches it best."""

from __future__ import annotations

import logging
import socket

from hvhost.errors import HvHostError
from hvhost.guests.probe import PROBE_PORT, ProbeClient, ProbeTimeout
from hvhost.machine.model import MachineState, paused_error
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory
from hvhost.sockets.client import connect

logger = logging.getLogger(__name__)

_SERIAL_PORT = 2
_CONNECT_SECONDS = 10.0


def connect_probe(directory: MachineDirectory, timeout: float = 10.0) -> ProbeClient:
    """The probe of the guest in *directory*, ready: over Hyper-V sockets, else its serial line.

    :class:`HvHostError` if it answers on neither within *timeout* seconds.
    """
    try:
        client = ProbeClient(connect(directory.path, PROBE_PORT, _CONNECT_SECONDS))
    except HvHostError as error:
        logger.info("not over sockets: %s", error)
        _check_not_paused(directory)  # the serial line would be silent for as long as that
        client = _serial_probe(directory)
    try:
        client.wait_ready(timeout, drivers=False)
    except ProbeTimeout:
        client.close()
        raise HvHostError(
            f"the guest of machine {directory.name!r} does not run commands for the host: it has"
            " not booted, or does not carry hvhost's probe; `hvhost verify` and"
            " Machine.start(guest=…) make guests that do."
        ) from None
    except BaseException:
        client.close()
        raise
    return client


def _check_not_paused(directory: MachineDirectory) -> None:
    if MachineClient(directory.name).info().state is MachineState.PAUSED:
        raise paused_error(directory.name)


def _serial_probe(directory: MachineDirectory) -> ProbeClient:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(directory.serial_socket(_SERIAL_PORT)))
    except OSError as error:
        stream.close()
        raise HvHostError(
            f"the second serial port of machine {directory.name!r} cannot be reached:"
            f" {error.strerror}."
        ) from error
    return ProbeClient(stream)
