"""Which KVM this computer really has."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.kvm.constants import KVM_CHECK_EXTENSION, Capability
from hvhost.kvm.transport import Transport
from hvhost.machine.config import MachineConfig
from hvhost.machine.kinds import Transport as Choice

NEEDED = (
    Capability.HYPERV_SYNIC2,
    Capability.HYPERV_EVENTFD,
    Capability.HYPERV_SEND_IPI,
    Capability.SYS_HYPERV_CPUID,
    Capability.X86_USER_SPACE_MSR,
    Capability.X86_MSR_FILTER,
    Capability.IMMEDIATE_EXIT,
)


def why_not_local(device: str = "/dev/kvm") -> str | None:
    """None if the local KVM can run Hyper-V guests, otherwise what it lacks.

    That the device opens proves nothing: a KVM without hardware virtualization interprets the
    guest, and only its capabilities tell.
    """
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    if "svm" not in flags and "vmx" not in flags:
        return "the processor offers no hardware virtualization (neither svm nor vmx)"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} cannot be opened ({error.strerror})"
    try:
        for capability in NEEDED:
            if fcntl.ioctl(descriptor, KVM_CHECK_EXTENSION, int(capability)) <= 0:
                return f"{device} lacks KVM_CAP_{capability.name}"
    except OSError as error:
        return f"{device} does not answer as a KVM ({error.strerror})"
    finally:
        os.close(descriptor)
    return None


def connect(config: MachineConfig, progress: Callable[[str], None]) -> Transport:
    """The transport *config* asks for, or the best there is."""
    choice = config.transport
    if choice is not Choice.RIG:
        reason = why_not_local()
        if reason is None:
            from hvhost.kvm.local import LocalTransport

            return LocalTransport(config.backing, shared=config.storage_process)
        if choice is Choice.LOCAL:
            raise HvHostError(f"--kvm local is not possible: {reason}; use --kvm rig.")
    from hvhost.kvm.remote import RemoteTransport

    return RemoteTransport(config.backing, config.cpus, progress)
