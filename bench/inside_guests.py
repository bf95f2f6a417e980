"""Guests inside a software KVM host, under hvhost and under QEMU: same kernel, same memory.

For the benches that run there and ask a guest to work: what is started is the guest's own
initramfs with :mod:`bench.peer` files below ``/bench``, and its probe takes commands.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.inside import QEMU, hvhost_command, qemu_command
from hvhost.errors import HvHostError
from hvhost.guests.probe import ProbeClient

BOOT_SECONDS = 240.0
MEMORY_MIB = 512
#: Loads what QEMU's devices need, ``/bench/modules`` in order, but for what is loaded already.
LOAD_MODULES = """
while read -r path parameters; do
    name=${path##*/}
    [ -d /sys/module/${name%.ko} ] || insmod /bench$path
done < /bench/modules
"""
LINKER = "/bench/ld-linux-x86-64.so.2 --library-path /bench"


@dataclass(frozen=True, slots=True)
class Started:
    """A machine: the probe in its guest, and the process that has its devices."""

    probe: ProbeClient
    pid: int

    def run(self, script: str, seconds: float = 60.0) -> str:
        """What a shell script in the guest printed; :class:`HvHostError` if it fails."""
        done = self.probe.run(script, seconds)
        if done.status:
            raise HvHostError(f"in the guest, {script.strip()[:80]!r}: {done.stderr!r}")
        return done.text


Start = Callable[..., AbstractContextManager[Started]]


@contextmanager
def hvhost(kernel: str, initrd: str, devices: list[str]) -> Iterator[Started]:
    """Our machine, on the local transport; *devices* are further words of ``hvhost run``."""
    from hvhost.manager.client import MachineClient
    from hvhost.manager.directory import MachineDirectory

    words = hvhost_command(kernel, initrd, MEMORY_MIB)
    subprocess.run([*words, *devices, "--detach"], check=True, stdout=sys.stderr)
    try:
        probe = _probe(MachineDirectory.of("bench").serial_socket(2))
        yield Started(probe, MachineClient("bench").info().pid)
        probe.close()
    finally:
        subprocess.run([*words[:1], "stop", "--force", "bench"], check=False)


@contextmanager
def qemu(
    kernel: str,
    initrd: str,
    devices: list[str],
    program: Sequence[str] = QEMU,
    boot_seconds: float = BOOT_SECONDS,
) -> Iterator[Started]:
    """QEMU's machine; *devices* are further words of its command line.

    *program* is the emulator to use, with options of its own; its guest has *boot_seconds*.
    """
    serial = Path("/run/bench-serial")
    serial.unlink(missing_ok=True)
    process = subprocess.Popen(
        [
            *qemu_command(kernel, initrd, MEMORY_MIB, program),
            *("-serial", "null", "-serial", f"unix:{serial},server=on,wait=off"),
            *devices,
        ],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    try:
        probe = _probe(serial, boot_seconds)
        started = Started(probe, process.pid)
        started.run(f"set -e; {LOAD_MODULES}")
        yield started
        probe.close()
    finally:
        process.kill()
        process.wait()


def _probe(path: Path, seconds: float = BOOT_SECONDS) -> ProbeClient:
    deadline = time.monotonic() + seconds
    while True:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(str(path))
            break
        except OSError:
            stream.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    client = ProbeClient(stream)
    client.wait_ready(seconds)
    return client
