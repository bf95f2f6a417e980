"""What this computer can do for hvhost, what is missing, and the command that fixes it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from hvhost import paths
from hvhost.errors import HvHostError
from hvhost.guests.apt import KEYRING_DIRECTORY, KEYRING_NAMES
from hvhost.kvm.constants import KVM_CHECK_EXTENSION
from hvhost.kvm.detect import NEEDED
from hvhost.units import GIB, format_size

_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12

KVM_CAPABILITIES: Mapping[str, int] = {f"KVM_CAP_{each.name}": each.value for each in NEEDED}
"""What hvhost needs of a kernel's KVM (``linux/kvm.h``), numbers of ``KVM_CHECK_EXTENSION``."""

_MINIMUM_MEMORY = 2 * GIB
_MINIMUM_DISK = 2 * GIB


class CheckStatus(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    """Something is slower or smaller than it could be, or not needed here."""
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; ``fix`` is a command to paste, or what else to do, or ``None``."""

    id: str
    status: CheckStatus
    finding: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings; ``transport`` is what would run virtual processors here, if anything."""

    usable: bool
    transport: str | None
    checks: list[Check]


def _make_network() -> None:
    """As a host-only network and the rows of the network do, and all of it gone again."""
    from hvhost.network.namespace import open_namespace

    namespace = open_namespace([("tap0", "")])
    for descriptor in namespace.descriptors:
        os.close(descriptor)
    namespace.close()


@dataclass(frozen=True, slots=True)
class Computer:
    """Where the examination looks; tests point it elsewhere."""

    kvm_device: Path = Path("/dev/kvm")
    cpuinfo: Path = Path("/proc/cpuinfo")
    meminfo: Path = Path("/proc/meminfo")
    keyrings: tuple[Path, ...] = tuple(KEYRING_DIRECTORY / name for name in KEYRING_NAMES)
    static_libraries: tuple[Path, ...] = (
        Path("/usr/lib/x86_64-linux-gnu/libc.a"),
        Path("/usr/lib64/libc.a"),
        Path("/usr/lib/libc.a"),
    )
    which: Callable[[str], str | None] = shutil.which
    free_disk: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    is_root: bool = os.geteuid() == 0
    make_network: Callable[[], None] = _make_network


def examine(computer: Computer | None = None) -> Diagnosis:
    """Look at everything; changes nothing, and never raises for what it finds."""
    computer = computer or Computer()
    kvm = [_check_device(computer), _check_virtualization(computer), _check_capabilities(computer)]
    local = all(check.status is CheckStatus.OK for check in kvm)
    device, virtualization, _ = kvm
    if not computer.kvm_device.exists() and virtualization.status is not CheckStatus.OK:
        kvm[0] = replace(device, fix="mend virtualization first")  # no module would load
    if not local:
        # The rig takes over, so nothing about /dev/kvm keeps hvhost from working.
        kvm = [_with_status(check, CheckStatus.WARNING) for check in kvm]
    programs = [
        _check_program(
            computer,
            "qemu",
            "qemu-system-x86_64",
            "qemu-system-x86",
            "runs the rig, the KVM host in software",
            needed=not local,
        ),
        # With KVM of one's own too: the probe in every guest of ours is built by them.
        _check_program(
            computer,
            "gcc",
            "gcc",
            "gcc libc6-dev",
            "builds the programs in guests (hvhost verify, run --guest) and in the rig",
            needed=True,
        ),
        _check_file(
            computer,
            "libc",
            computer.static_libraries,
            "libc6-dev",
            "is linked into those programs",
            needed=True,
        ),
    ]
    packages = [
        _check_program(
            computer, "apt", "apt-get", None, "downloads distributions' kernels", needed=False
        ),
        _check_file(
            computer,
            "keyring",
            computer.keyrings,
            "debian-archive-keyring",
            "proves that they are Debian's",
            needed=False,
        ),
    ]
    # What only some features need: without it they say so themselves.
    for identity, program, package, purpose in (
        ("passt", "passt", "passt", "takes machines to the network (hvhost run --nic nat)"),
        ("ip", "ip", "iproute2", "makes host-only networks"),
        ("mmdebstrap", "mmdebstrap", "mmdebstrap", "builds complete guests (debian-12-full)"),
        ("mke2fs", "mke2fs", "e2fsprogs", "makes their disks"),
    ):
        packages.append(_check_program(computer, identity, program, package, purpose, needed=False))
    packages.append(_check_network(computer))
    checks = [*kvm, *programs, *packages, _check_memory(computer), _check_disk(computer)]
    usable = all(check.status is not CheckStatus.MISSING for check in checks)
    transport = "local" if local else "rig" if usable else None
    return Diagnosis(usable, transport, checks)


def _check_network(computer: Computer) -> Check:
    try:
        computer.make_network()
    except (HvHostError, OSError) as error:
        return Check(
            "network",
            CheckStatus.WARNING,
            f"host-only networks and the rows of the network lack one: {error}",
            "in a container, the options of docs/ci.md; elsewhere, "
            + _as_root(computer, "sysctl user.max_net_namespaces=1000"),
        )
    return Check("network", CheckStatus.OK, "a network namespace with a tap device can be made")


def _with_status(check: Check, status: CheckStatus) -> Check:
    return (
        check
        if check.status is CheckStatus.OK
        else Check(check.id, status, check.finding, check.fix)
    )


def _as_root(computer: Computer, command: str) -> str:
    return command if computer.is_root else f"sudo {command}"


def _check_device(computer: Computer) -> Check:
    device = computer.kvm_device
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check(
            "kvm-device",
            CheckStatus.MISSING,
            f"{device} does not exist",
            _as_root(computer, "sh -c 'modprobe kvm_intel || modprobe kvm_amd'"),
        )
    except PermissionError:
        return Check(
            "kvm-device",
            CheckStatus.MISSING,
            f"{device} may not be opened by you",
            'sudo usermod -aG kvm "$USER"  # then log in again',
        )
    except OSError as error:
        return Check("kvm-device", CheckStatus.MISSING, f"{device}: {error.strerror}")
    os.close(descriptor)
    return Check("kvm-device", CheckStatus.OK, f"{device} opens")


def _check_virtualization(computer: Computer) -> Check:
    flags: set[str] = set()
    for line in computer.cpuinfo.read_text().splitlines():
        label, _, words = line.partition(":")
        if label.strip() == "flags":
            flags = set(words.split())
            break
    for flag, name in (("vmx", "Intel VT-x"), ("svm", "AMD SVM")):
        if flag in flags:
            return Check("virtualization", CheckStatus.OK, f"the processor has {name} ({flag})")
    if "hypervisor" in flags:
        return Check(
            "virtualization",
            CheckStatus.MISSING,
            "this computer is a virtual machine without nested virtualization"
            " (neither svm nor vmx in /proc/cpuinfo)",
            "switch nested virtualization on in its hypervisor; until then the rig takes over",
        )
    return Check(
        "virtualization",
        CheckStatus.MISSING,
        "the processor shows neither svm nor vmx in /proc/cpuinfo",
        "switch virtualization (VT-x, SVM) on in the computer's firmware settings",
    )


def _check_capabilities(computer: Computer) -> Check:
    try:
        lacking = _lacking_capabilities(computer.kvm_device)
    except OSError as error:
        return Check(
            "kvm-hyperv",
            CheckStatus.MISSING,
            f"{computer.kvm_device} cannot be asked for its Hyper-V abilities ({error.strerror})",
            "mend kvm-device first",
        )
    except HvHostError as error:
        return Check("kvm-hyperv", CheckStatus.MISSING, str(error))
    if lacking:
        return Check(
            "kvm-hyperv",
            CheckStatus.MISSING,
            f"KVM lacks {', '.join(lacking)}",
            "boot a distribution's kernel, 5.11 or newer, with kvm_intel or kvm_amd",
        )
    return Check(
        "kvm-hyperv", CheckStatus.OK, f"KVM has all {len(KVM_CAPABILITIES)} abilities needed"
    )


def _lacking_capabilities(device: Path) -> list[str]:
    """Names out of :data:`KVM_CAPABILITIES` that *device* does not have; ``OSError`` if no KVM."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        if version != _KVM_API_VERSION:
            raise HvHostError(f"{device} speaks KVM API {version} instead of {_KVM_API_VERSION}")
        return [
            name
            for name, number in KVM_CAPABILITIES.items()
            if fcntl.ioctl(descriptor, KVM_CHECK_EXTENSION, number) <= 0
        ]
    finally:
        os.close(descriptor)


def _check_program(
    computer: Computer,
    identity: str,
    program: str,
    packages: str | None,
    purpose: str,
    *,
    needed: bool,
) -> Check:
    found = computer.which(program)
    if found is not None:
        return Check(identity, CheckStatus.OK, f"{found} {purpose}")
    return Check(
        identity,
        CheckStatus.MISSING if needed else CheckStatus.WARNING,
        f"there is no {program}, which {purpose}",
        None
        if packages is None
        else _as_root(computer, f"apt-get install --no-install-recommends {packages}"),
    )


def _check_file(
    computer: Computer,
    identity: str,
    places: tuple[Path, ...],
    package: str,
    purpose: str,
    *,
    needed: bool,
) -> Check:
    for path in places:
        if path.exists():
            return Check(identity, CheckStatus.OK, f"{path} {purpose}")
    return Check(
        identity,
        CheckStatus.MISSING if needed else CheckStatus.WARNING,
        f"there is no {places[0]}, which {purpose}",
        _as_root(computer, f"apt-get install --no-install-recommends {package}"),
    )


def _check_memory(computer: Computer) -> Check:
    available = 0
    for line in computer.meminfo.read_text().splitlines():
        label, _, value = line.partition(":")
        if label == "MemAvailable":
            available = int(value.split()[0]) << 10
    finding = f"{format_size(available)} of memory available"
    if available >= _MINIMUM_MEMORY:
        return Check("memory", CheckStatus.OK, finding)
    return Check(
        "memory",
        CheckStatus.WARNING,
        f"{finding}; a guest and the rig together want {format_size(_MINIMUM_MEMORY)}",
        "end other programs, or give machines less with --memory",
    )


def _check_disk(computer: Computer) -> Check:
    try:
        cache = paths.cache_dir()
    except HvHostError as error:
        finding, _, remedy = str(error).rstrip(".").partition("; ")
        return Check("disk", CheckStatus.MISSING, finding, remedy)
    free = computer.free_disk(cache)
    finding = f"{format_size(free)} free for the cache in {cache}"
    if free >= _MINIMUM_DISK:
        return Check("disk", CheckStatus.OK, finding)
    return Check(
        "disk",
        CheckStatus.WARNING,
        f"{finding}; kernels and the rig want {format_size(_MINIMUM_DISK)}",
        "set HVHOST_CACHE_DIR to a directory with more room",
    )
