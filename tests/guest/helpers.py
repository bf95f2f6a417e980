"""What the tests of real guests share."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages
from hvhost.machine.model import HeartbeatStatus, MachineInfo
from hvhost.machine.storage_model import DriveConfig
from hvhost.manager.definition import define
from hvhost.memory.settings import DynamicMemory
from hvhost.verify.guest import Probe
from hvhost.verify.live import LiveMachine

BOOT_SECONDS = 300.0
"""A guest in the rig needs five seconds, on a busy computer several times that."""


def hvhost(
    *words: str | Path,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command line; output as text."""
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
    )


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-P", "-m", "hvhost", *map(str, words)]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


@dataclass
class Guest:
    """A running machine of our own and the probe in it."""

    machine: LiveMachine
    probe: Probe

    @classmethod
    def start(
        cls,
        images: GuestImages,
        *,
        append: str = "",
        kernel: Path | None = None,
        cpus: int = 1,
        memory: int = 512 << 20,
        transport: str = "auto",
        name: str | None = None,
        dynamic_memory: DynamicMemory | None = None,
        storage_process: bool = False,
        drives: tuple[DriveConfig, ...] = (),
    ) -> Guest:
        """Boot *images* and wait for its probe and its drivers."""
        machine = LiveMachine(
            replace(
                define(
                    kernel=kernel or images.kernel,
                    initrd=images.initrd,
                    command_line=f"console=ttyS0 panic=0 quiet {images.command_line} {append}",
                    cpus=cpus,
                    memory=memory,
                    transport=transport,
                    name=name,
                    dynamic_memory=dynamic_memory,
                ),
                storage_process=storage_process,
                drives=drives,
            )
        )
        try:
            return cls(machine, cls._connect(machine))
        except BaseException:
            tell(machine)
            machine.kill()
            raise

    @staticmethod
    def power_on(images: GuestImages, *, name: str | None = None) -> LiveMachine:
        """The machine alone, for tests that need nothing of its guest; it runs two processors."""
        machine = LiveMachine(
            define(kernel=images.kernel, initrd=images.initrd, name=name, transport="rig", cpus=2)
        )
        try:
            wait_for("the machine", lambda: machine.info().exits)
        except BaseException:
            tell(machine)
            machine.kill()
            raise
        return machine

    @staticmethod
    def _connect(machine: LiveMachine) -> Probe:
        probe = machine.connect_probe(BOOT_SECONDS)
        assert probe is not None, "the guest did not come up"
        return probe

    def booted_again(self, boots: int) -> None:
        """Wait until the machine has booted *boots* times and for the probe of that boot."""
        wait_for(f"boot {boots}", lambda: self.machine.info().boots == boots)
        self.probe.close()
        self.probe = self._connect(self.machine)

    def run(self, script: str, seconds: float = 30.0) -> str:
        """Output of a shell script in the guest, which must succeed."""
        result = self.probe.run(["/bin/sh", "-c", script], seconds)
        assert result.status == 0, f"{script}: {result.status}: {result.output}"
        return result.output

    def await_heartbeat(self, status: HeartbeatStatus, seconds: float = 30.0) -> MachineInfo:
        wait_for(status.value, lambda: self.machine.info().heartbeat is status, seconds)
        return self.machine.info()


def tell(machine: LiveMachine) -> None:
    """For whoever reads of a failed test: what happened to the machine and what it said last."""
    try:
        for event in machine.events(0, 0.0):
            print(f"{event.seconds:.1f} {event.kind} {event.detail}"[:200])
    except HvHostError as error:
        print(error)
    print(machine.console()[-4000:])


def machines_of(runtime: Path) -> set[str]:
    """Names under which machines have left something, or run."""
    return {path.name for path in (runtime / "machines").glob("*")}


def keeper_of(runtime: Path) -> int | None:
    """Process id of the rig's keeper, ``None`` when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(runtime / "rig" / "rig.sock"))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("=iII", credentials)[0]
    return pid


def processes_of(runtime: Path) -> dict[int, str]:
    """Command lines of all processes that were started to use *runtime*, by id."""
    setting = f"HVHOST_RUNTIME_DIR={runtime}".encode()
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if setting in (directory / "environ").read_bytes().split(b"\0"):
                words = (directory / "cmdline").read_bytes().split(b"\0")
                found[int(directory.name)] = b" ".join(words).decode(errors="replace").strip()
        except OSError:
            continue  # gone meanwhile, or another user's
    return {pid: line for pid, line in found.items() if line and pid != os.getpid()}


def emulators_of(runtime: Path) -> list[int]:
    """Process ids of the rigs' QEMUs."""
    return [pid for pid, line in processes_of(runtime).items() if "qemu-system" in line]


def end_rig(runtime: Path) -> None:
    """End the keeper; its QEMU goes with it."""
    pid = keeper_of(runtime)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        wait_for("the end of the rig", lambda: not processes_of(runtime), 20.0)
