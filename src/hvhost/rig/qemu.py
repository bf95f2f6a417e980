"""QEMU as the rig's processor: how it is found and started. It emulates, it never virtualizes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from hvhost.errors import HvHostError
from hvhost.guests import apt, deb
from hvhost.process import die_with
from hvhost.rig.repair import repaired

# XSAVE is inconsistent in a guest of a guest under TCG; without it the nested KVM offers none.
# Kernels that see ERMS or FSRM copy and clear by `rep movsb`, which TCG does byte by byte.
PROCESSOR = "max,+svm,+npt,-xsave,-xsaveopt,-xsavec,-avx,-avx2,-fma,-f16c,-pku,-la57,-erms,-fsrm"
KERNEL_OPTIONS = " ".join(
    (
        "tsc=reliable clocksource=tsc mitigations=off quiet panic=-1",
        # Measured for 3 s on every other processor, in vain; 2.5 GHz at 250 Hz, and only delays of
        # drivers that wait for real devices depend on it.
        "lpj=10000000",
        # What a kernel does to its text, its protection and itself before it serves: 3 s of 11.
        "noreplace-smp rodata=off nokaslr cryptomgr.notests lsm=",
    )
)
# One processor until the agent brings up the others: patching kernel text is the riskiest thing
# a booting kernel does under emulation, and it is simpler on one.
RIG_OPTIONS = "console=ttyS0 intel_iommu=on iommu=pt maxcpus=1"
# The rig's first processor runs no guest. Whenever another one loads floating-point state, QEMU 5.1
# to 11.1 clears a flag (IGNNE#) of the first by reading and writing a word that also tells whether
# that one runs a guest, by nested paging, with interrupts; an entry or exit in between is undone.
# Rigs died of it within minutes: a page walk of the rig's kernel by the guest's tables.
GUESTLESS_PROCESSORS = 1
MOST_GUEST_PROCESSORS = 4
DEVICE_ADDRESS = 3
COMMON_OPTIONS = ("-nodefaults", "-no-user-config", "-display", "none")

# Before 9.0 TCG loses a processor's flags now and then: 3 of 15 kernels crashed while they booted
# under 7.2, none of 24 under 10.0.
GOOD_VERSION = (9, 0)
PACKAGES = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Qemu:
    """An emulator and where its firmware lies."""

    program: str
    version: tuple[int, int]
    options: tuple[str, ...] = ()


def _version(program: str) -> tuple[int, int]:
    try:
        text = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except OSError:
        return (0, 0)
    match = re.search(r"version (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_qemu(progress: Callable[[str], None] = lambda text: None) -> Qemu:
    """The emulator to use: the system's if it is new enough, else the backports' own copy.

    :class:`HvHostError` names the package when there is none.
    """
    path = shutil.which("qemu-system-x86_64")
    system = Qemu(path, _version(path)) if path else None
    if system is not None and system.version >= GOOD_VERSION:
        return replace(system, program=str(repaired(Path(system.program))))
    if system is not None:  # whose libraries the newer one needs
        try:
            return _backported(progress)
        except HvHostError as error:
            log.warning("using QEMU %d.%d: %s", *system.version, error)
            return system
    raise HvHostError(
        "qemu-system-x86_64 is not installed, and the rig needs it on computers without "
        "hardware virtualization; run `apt-get install qemu-system-x86`."
    )


def _backported(progress: Callable[[str], None]) -> Qemu:
    root = deb.extract(apt.download("bookworm-backports", PACKAGES, progress=progress), progress)
    program = str(root / "usr/bin/qemu-system-x86_64")
    version = _version(program)
    if version < GOOD_VERSION:
        raise HvHostError(f"{program} does not run on this computer.")
    share = root / "usr/share"
    program = str(repaired(Path(program)))
    return Qemu(program, version, ("-L", str(share / "qemu"), "-L", str(share / "seabios")))


def start(
    arguments: Sequence[str], *, stdout: int | IO[bytes] = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start QEMU as a child that cannot outlive this process; its errors go to *stdout* too."""
    qemu = find_qemu()
    command = [qemu.program, *qemu.options, *COMMON_OPTIONS, *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with(os.getpid(), signal.SIGKILL),
    )


def processors() -> int:
    """How many the rig has: as this computer, but 2 to 4, and one more that runs no guest."""
    guest_processors = min(MOST_GUEST_PROCESSORS, max(2, len(os.sched_getaffinity(0))))
    return GUESTLESS_PROCESSORS + guest_processors


def machine_arguments(kernel: Path, initrd: Path, memory_mib: int, options: str) -> list[str]:
    """Arguments both kinds of rig share."""
    return [
        *("-machine", "q35"),
        *("-accel", "tcg,thread=multi"),
        *("-cpu", PROCESSOR),
        *("-smp", str(processors())),
        *("-m", str(memory_mib)),
        *("-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", f"{KERNEL_OPTIONS} {options}".strip()),
        "-no-reboot",
    ]


def rig_arguments(kernel: Path, initrd: Path, socket_path: Path) -> list[str]:
    """Arguments of the shared rig: the agent, and the ivshmem device it speaks through."""
    from hvhost.rig import layout

    return [
        *machine_arguments(kernel, initrd, 256, RIG_OPTIONS),
        *("-device", "intel-iommu"),
        *("-chardev", f"socket,id=shared,path={socket_path}"),
        *(
            "-device",
            f"ivshmem-doorbell,chardev=shared,vectors={layout.VECTORS},master=on,"
            f"addr={DEVICE_ADDRESS}",
        ),
        *("-serial", "stdio"),
    ]
