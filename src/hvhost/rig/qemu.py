"""QEMU as the rig's processor: how it is found and started. It emulates, it never virtualizes."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hvhost.errors import HvHostError

# XSAVE is inconsistent in a guest of a guest under TCG; without it the nested KVM offers none.
PROCESSOR = "max,+svm,+npt,-xsave,-xsaveopt,-xsavec,-avx,-avx2,-fma,-f16c,-pku,-la57"
KERNEL_OPTIONS = "tsc=reliable clocksource=tsc mitigations=off quiet panic=-1"
DEVICE_ADDRESS = 3
PR_SET_PDEATHSIG = 1


def find_qemu() -> str:
    """Path of ``qemu-system-x86_64``; :class:`HvHostError` names the package."""
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise HvHostError(
            "qemu-system-x86_64 is not installed, and the rig needs it on computers without "
            "hardware virtualization; run `apt-get install qemu-system-x86`."
        )
    return path


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(
    arguments: Sequence[str], *, stdout: int | IO[bytes] = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start QEMU as a child that cannot outlive this process; its errors go to *stdout* too."""
    command = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        preexec_fn=_die_with_parent,
    )


def machine_arguments(kernel: Path, initrd: Path, memory_mib: int, options: str) -> list[str]:
    """Arguments both kinds of rig share."""
    return [
        *("-machine", "q35"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", PROCESSOR),
        *("-smp", str(min(4, max(2, len(os.sched_getaffinity(0)))))),
        *("-m", str(memory_mib)),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", f"{KERNEL_OPTIONS} {options}".strip()),
        "-no-reboot",
    ]


def rig_arguments(kernel: Path, initrd: Path, socket_path: Path) -> list[str]:
    """Arguments of the shared rig: the agent, and the ivshmem device it speaks through."""
    from hvhost.rig import layout

    return [
        *machine_arguments(kernel, initrd, 256, "console=ttyS0 intel_iommu=on iommu=pt"),
        *("-device", "intel-iommu"),
        *("-chardev", f"socket,id=shared,path={socket_path}"),
        *(
            "-device",
            f"ivshmem-doorbell,chardev=shared,vectors={layout.VECTORS},master=on,"
            f"addr={DEVICE_ADDRESS}",
        ),
        *("-serial", "stdio"),
    ]
