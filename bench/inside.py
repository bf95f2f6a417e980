"""Runs inside a software KVM host: boots one kernel through the local transport and under QEMU.

``python -m bench.inside KERNEL INITRD ROUNDS`` prints one JSON object: seconds from process start
to the guest's user space, by program, a list each; ``null`` where a program did not get there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hvhost.guests.initramfs import READY_LINE

SECONDS = 120
MEMORY_MIB = 512
COMMAND_LINE = "console=ttyS0 quiet"
QEMU = ("qemu-system-x86_64",)


def hvhost_command(kernel: str, initrd: str, memory_mib: int) -> list[str]:
    """What people type to run a kernel in our machine, which is called ``bench``."""
    return [
        str(Path(sys.executable).with_name("hvhost")),
        *("run", "--kvm", "local", "--name", "bench"),
        *("--kernel", kernel, "--initrd", initrd, "--append", COMMAND_LINE),
        *("--memory", f"{memory_mib}M"),
    ]


def qemu_command(
    kernel: str, initrd: str, memory_mib: int, program: Sequence[str] = QEMU
) -> list[str]:
    """The same kernel with the same memory in QEMU's oldest machine, on its fastest processor."""
    return [
        *(*program, "-M", "pc", "-accel", "kvm", "-cpu", "host"),
        *("-m", str(memory_mib), "-display", "none", "-no-reboot"),
        *("-kernel", kernel, "-initrd", initrd, "-append", COMMAND_LINE),
    ]


def programs(kernel: str, initrd: str) -> dict[str, list[str]]:
    """Commands that boot the same kernel with the same memory, console on standard output."""
    return {
        "hvhost": hvhost_command(kernel, initrd, MEMORY_MIB),
        "qemu": [*qemu_command(kernel, initrd, MEMORY_MIB), "-serial", "stdio"],
    }


def seconds_to_line(command: list[str], line: bytes, limit: float) -> float | None:
    """Seconds from the start of *command* until it printed *line*, or None."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    seen = b""
    taken = None
    while time.perf_counter() - start < limit:
        data = process.stdout.read()
        if data:
            seen = (seen + data)[-65536:]
            if line in seen:
                taken = time.perf_counter() - start
                break
        elif process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return taken


def main() -> int:
    kernel, initrd, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    result: dict[str, list[float | None]] = {}
    for _ in range(rounds):
        for name, command in programs(kernel, initrd).items():
            taken = seconds_to_line(command, READY_LINE.encode(), SECONDS)
            result.setdefault(name, []).append(taken)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
