"""Runs inside a software KVM host: a guest gives memory and gets it, under hvhost and under QEMU.

``python -m bench.memory_inside KERNEL INITRD QEMU`` prints one JSON object: for each program its
figures in GiB/s. ``QEMU`` is a JSON list: the emulator with its own options. All guests have the
same kernel and the same memory; each is asked for the same change, and the time runs until the
program says that it is done. A peer that did not get there has no figures.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bench.inside_guests import MEMORY_MIB, hvhost, qemu
from hvhost.errors import HvHostError
from hvhost.units import GIB, MIB

MEMORY = MEMORY_MIB * MIB
PIECE = 128 * MIB
LIMIT = 120.0
# Report at once, and use what was added. QEMU offers its devices when the guest's driver asks.
PREPARE = """
for second in $(seq 60); do [ -d /sys/module/hv_balloon ] && break; sleep 1; done
[ -d /sys/module/hv_balloon ] || dmesg | grep -iE 'vmbus|hyper' >&2
echo online > /sys/devices/system/memory/auto_online_blocks &&
echo 0 > /sys/module/hv_balloon/parameters/pressure_report_delay
"""
STEPS = (
    ("hot-add", MEMORY + PIECE),
    ("inflate", MEMORY),
    ("deflate", MEMORY + PIECE),
    ("inflate again", MEMORY),
)
# virtio-balloon cannot give a guest more than it was started with.
STEPS_LESS = tuple((name, size - PIECE) for name, size in STEPS[1:])
HYPERV = (
    "hv-relaxed,hv-vapic,hv-time,hv-vpindex,hv-synic,hv-stimer,hv-runtime,hv-frequencies,hv-reset"
)
VIRTIO_BALLOON = ("-device", "virtio-balloon-pci")
HV_BALLOON = (
    *("-cpu", f"host,kvm=off,{HYPERV}"),  # Linux prefers KVM to Hyper-V where it sees both
    *("-m", f"{MEMORY // MIB}M,maxmem=80G,slots=2"),
    *("-global", "PIIX4_PM.disable_s4=1"),  # with S4 Linux neither balloons nor adds
    *("-object", f"memory-backend-ram,id=more,size={GIB}"),
    *("-device", "vmbus-bridge", "-device", "hv-balloon,memdev=more,status-report=on"),
)

SetMemory = Callable[[int], object]


class Qmp:
    """QEMU's control socket; *path* is where it listens."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> Any:
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while line := self._file.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise HvHostError(f"QEMU: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]
        raise HvHostError("QEMU ended.")

    def await_answer(self, command: str) -> None:
        """Until QEMU can answer it, because the guest's driver is there."""
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                self.ask(command)
                return
            except HvHostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def set_memory(self, size: int) -> None:
        self.ask("balloon", value=size)
        deadline = time.monotonic() + LIMIT
        while (actual := self.ask("query-balloon")["actual"]) != size:
            if time.monotonic() > deadline:
                raise HvHostError(
                    f"QEMU's guest did not get to {size >> 20} MiB; it has {actual >> 20}."
                )
            time.sleep(0.01)


@contextmanager
def ours(kernel: str, initrd: str) -> Iterator[SetMemory]:
    from hvhost.manager.client import MachineClient
    from hvhost.manager.memory import MemoryClient

    with hvhost(kernel, initrd, []) as machine:
        machine.run(PREPARE, LIMIT)
        memory = MemoryClient(MachineClient("bench"))
        deadline = time.monotonic() + LIMIT
        while memory.info().demand is None:
            if time.monotonic() > deadline:
                raise HvHostError("the guest's memory driver does not report.")
            time.sleep(0.2)
        yield lambda size: memory.set(size, LIMIT)


@contextmanager
def theirs(
    program: Sequence[str], kernel: str, initrd: str, devices: Sequence[str]
) -> Iterator[SetMemory]:
    with tempfile.TemporaryDirectory() as directory:
        control = Path(directory, "qmp")
        words = [*devices, "-qmp", f"unix:{control},server=on,wait=off"]
        with (
            qemu(kernel, initrd, words, program) as machine,
            closing(Qmp(control)) as qmp,
        ):
            if devices == HV_BALLOON:
                machine.run(PREPARE, LIMIT)
                qmp.await_answer("query-hv-balloon-status-report")
            else:
                qmp.await_answer("query-balloon")
            yield qmp.set_memory


def measure(set_memory: SetMemory, steps: Sequence[tuple[str, int]]) -> dict[str, float]:
    figures = {}
    for name, size in steps:
        started = time.perf_counter()
        set_memory(size)
        figures[name] = PIECE / GIB / (time.perf_counter() - started)
    return figures


def main() -> int:
    kernel, initrd, program = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    result = {}
    with ours(kernel, initrd) as set_memory:
        result["hvhost"] = measure(set_memory, STEPS)
    print(json.dumps(result), file=sys.stderr, flush=True)
    for name, devices, steps in (
        ("QEMU hv-balloon", HV_BALLOON, STEPS),
        ("QEMU virtio-balloon", VIRTIO_BALLOON, STEPS_LESS),
    ):
        try:
            with theirs(program, kernel, initrd, devices) as set_memory:
                result[name] = measure(set_memory, steps)
        except (HvHostError, OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
