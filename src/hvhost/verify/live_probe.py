"""The probe behind what the rows ask for, over Hyper-V sockets where the guest has them.

It is found on the serial line, which every kernel has; that is slow where each byte is an exit, so
a guest that can take sockets is asked over one from then on.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests.probe import PROBE_PORT, ProbeClient
from hvhost.sockets.client import connect
from hvhost.verify.guest import Carrier, CommandResult
from hvhost.verify.session import patience

log = logging.getLogger(__name__)

_FOUND_OUT_SECONDS = 10.0
_CONNECT_SECONDS = 15.0
_ANSWER_SECONDS = 10.0


class LiveProbe:
    """:class:`hvhost.verify.guest.Probe` over the probe's client."""

    def __init__(self, client: ProbeClient, carrier: Carrier) -> None:
        self._client = client
        self._carrier = carrier

    @property
    def carrier(self) -> Carrier:
        return self._carrier

    def read(self, path: str) -> str:
        return self._client.read_file(path).decode("utf-8", "replace")

    def read_bytes(self, path: str) -> bytes:
        return self._client.read_file(path)

    def read_all(self, *patterns: str) -> dict[str, str]:
        # One request for all of them; what grep cannot read it leaves out. Patterns are ours.
        result = self._client.run(f"cd /; grep -s -H '' {' '.join(patterns)}")
        files: dict[str, list[str]] = {}
        for line in result.stdout.decode("utf-8", "replace").splitlines():
            path, _, text = line.partition(":")
            files.setdefault(path, []).append(text)
        return {path: "\n".join(lines) for path, lines in files.items()}

    def write(self, path: str, text: str) -> None:
        self._client.write_text(path, text)

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        result = self._client.run([*command], timeout * patience())
        return CommandResult(
            result.status, (result.stdout + result.stderr).decode("utf-8", "replace")
        )

    def fire(self, path: str, text: str) -> None:
        # Late enough for the answer to this command to get out first.
        script = f"sleep 0.3; echo {shlex.quote(text)} > {shlex.quote(path)}"
        self._client.run(f"setsid sh -c {shlex.quote(script)} </dev/null >/dev/null 2>&1 &")

    def answers(self, timeout: float) -> bool:
        try:
            self._client.ping(timeout)
        except HvHostError:
            return False
        return True

    def close(self) -> None:
        self._client.close()


def best_probe(serial: ProbeClient, directory: Path) -> LiveProbe:
    """The guest's probe over a Hyper-V socket of the machine in *directory*, else over *serial*.

    Takes *serial*, on which the probe answers, and closes it if it is not needed.
    """
    client: ProbeClient | None = None
    try:
        if not serial.has_sockets(_FOUND_OUT_SECONDS * patience()):
            return LiveProbe(serial, Carrier.SERIAL_LINE)
        client = ProbeClient(connect(directory, PROBE_PORT, _CONNECT_SECONDS * patience()))
        client.wait_ready(_ANSWER_SECONDS * patience(), drivers=False)
    except HvHostError as error:
        log.warning("the probe is not reached over sockets: %s", error)
        if client is not None:
            client.close()
        return LiveProbe(serial, Carrier.SERIAL_LINE)
    serial.close()
    return LiveProbe(client, Carrier.SOCKET)
