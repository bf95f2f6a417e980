"""A worker over a KVM in memory; the machine's command line says what happens."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fake_transport import FakeTransport, Halt, Other, Out, Script

from hvhost.errors import HvHostError
from hvhost.kvm.constants import Exit
from hvhost.machine import worker
from hvhost.machine.model import MachineConfig

POWER_OFF = Out(0x604, 2, b"\x00\x34")


def says(text: bytes) -> Script:
    for character in text:
        yield Out(0x3F8, 1, bytes([character]))


def power_off(kvm: FakeTransport) -> Script:
    yield from says(b"bye\n")
    yield POWER_OFF


def fails(kvm: FakeTransport) -> Script:
    yield Other(Exit.INTERNAL_ERROR, 3)


def halts(kvm: FakeTransport) -> Script:
    yield from says(b"up\n")
    yield Halt()


def die(transport: FakeTransport) -> None:
    """Once somebody can see it."""
    while not Path(sys.argv[1]).with_name("api.sock").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    transport.die("the rig's QEMU died: no reason")


def connect(config: MachineConfig, progress: Callable[[str], None]) -> FakeTransport:
    words = config.command_line.split()
    progress("looking for a KVM")
    if "slow" in words:
        try:
            time.sleep(60)
        except HvHostError:
            time.sleep(60)  # as somebody who would try something else instead
    if "unreachable" in words:
        raise HvHostError("there is no KVM; run `hvhost doctor`.")
    if "broken" in words:
        raise OSError(12, "Cannot allocate memory")
    guests = {"power-off": power_off, "fails": fails}
    guest = next((guests[word] for word in words if word in guests), halts)
    transport = FakeTransport(config.memory, *[guest] * config.cpus)
    if "dies" in words:
        threading.Thread(target=die, args=(transport,)).start()
    return transport


if __name__ == "__main__":
    setattr(worker, "connect", connect)  # noqa: B010 - not the worker's to export
    status = worker.main()
    print(f"threads left: {threading.active_count() - 1}", flush=True)
    sys.exit(status)
