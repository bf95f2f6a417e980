"""How far a kernel came that did not become a working guest, in words a maintainer can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hvhost.machine.model import MachineInfo
from hvhost.verify.contract import VMBUS
from hvhost.verify.guest import Modules
from hvhost.verify.requirements import has_driver
from hvhost.verify.sysfs import GuestDevice

CONSOLE_LINES = 12
_BANNER = re.compile(r"Linux version (\S+)")
_DETECTED = "Hypervisor detected: Microsoft Hyper-V"
_VERSION = re.compile(r"Vmbus version:(\d+\.\d+)", re.IGNORECASE)
_PANIC = re.compile(r"Kernel panic - not syncing: .*")
_USERSPACE = re.compile(r"Run \S+ as init process|hvhost-guest:")
_DRIVER_OFF = re.compile(
    r"(?:initcall_blacklist|module_blacklist|modprobe\.blacklist)=\S*(?:hv_|hyperv|vmbus)\S*"
)
_OUR_SHELL = "Please press Enter to activate this console."
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Sighting:
    """All that was seen of one boot.

    ``log`` is the guest's kernel log where user space could be asked for it, else empty;
    ``devices`` is ``None`` where the guest could not be asked.
    """

    console: str
    release: str
    modules: Modules | None
    probe_answered: bool
    seconds: float
    info: MachineInfo | None = None
    log: str = ""
    devices: tuple[GuestDevice, ...] | None = None
    worker_error: str | None = None

    @property
    def text(self) -> str:
        return self.console + "\n" + self.log


def console_tail(console: str, lines: int = CONSOLE_LINES) -> tuple[str, ...]:
    """The last lines of a console, without control characters and empty lines."""
    clean = (
        _CONTROL.sub("", line).replace(_OUR_SHELL, "").strip() for line in console.splitlines()
    )
    return tuple(line for line in clean if line)[-lines:]


def kernel_panic(text: str) -> str | None:
    """The panic line, if the text has one."""
    match = _PANIC.search(text)
    return match[0].strip() if match else None


def unbound_devices(devices: Sequence[GuestDevice], modules: Modules) -> tuple[str, ...]:
    """Sentences for the devices that no driver took although the kernel has one for them."""
    return tuple(
        f"{device.name}: {', '.join(drivers)} is in the kernel's tree but did not bind to "
        f"{{{device.interface_instance}}}"
        for device in devices
        if device.driver is None and (drivers := modules.drivers_for(device.modalias))
    )


def how_far(seen: Sighting) -> tuple[str, ...]:
    """The stages of a boot, each with what was seen of it."""
    banner = _BANNER.search(seen.text)
    identified = seen.info is not None and seen.info.guest_os_id != 0
    detected = _DETECTED in seen.text
    version = (seen.info.vmbus_version if seen.info else None) or (
        match[1] if (match := _VERSION.search(seen.text)) else None
    )
    userspace = seen.probe_answered or _USERSPACE.search(seen.console) is not None
    opened = (
        [channel.name for channel in seen.info.channels if channel.state == "open"]
        if seen.info
        else []
    )
    stages = [
        f"kernel started: {'yes, ' + banner[1] if banner else 'no banner on the console'}",
        "Hyper-V detected: "
        + ("yes" if detected else "its line was not seen")
        + (
            f"; guest wrote its OS id {seen.info.guest_os_id:#x}"
            if seen.info and identified
            else "; guest never wrote its OS id"
        ),
        f"VMBus version negotiated: {version or 'no; the guest never asked'}",
        f"channels opened: {', '.join(opened) or 'none'}",
        "user space: "
        + (
            "the probe answered"
            if seen.probe_answered
            else "reached, but the probe does not answer"
            if userspace
            else "not reached"
        )
        + f" ({seen.seconds:.0f} s after the start)",
    ]
    if seen.devices is not None:
        unbound = [device.name for device in seen.devices if device.driver is None]
        stages.append(
            f"devices on the guest's bus: {len(seen.devices)}"
            + (f", without a driver: {', '.join(unbound)}" if unbound else "")
        )
    return tuple(f"{number}. {stage}" for number, stage in enumerate(stages, 1))


def _why_no_bus(seen: Sighting) -> tuple[str, str]:
    """What stopped a guest that reached user space, and what to look at."""
    command_line = seen.info.command_line if seen.info else ""
    identified = _DETECTED in seen.text or (seen.info is not None and seen.info.guest_os_id != 0)
    if match := _DRIVER_OFF.search(command_line):
        return "no VMBus", f"the command line switches its driver off: {match[0]}"
    if not identified and "nopv" in command_line.split():
        return "no VMBus", "the command line switches the detection of hypervisors off: nopv"
    if seen.modules is None:
        return (
            "no VMBus",
            "look at CONFIG_HYPERV and, from Linux 6.18 on, CONFIG_HYPERV_VMBUS; give the "
            "kernel's modules with --modules to hear more and to have them loaded",
        )
    if not has_driver(VMBUS, seen.modules):
        hint = (
            "set CONFIG_HYPERV_VMBUS: Linux 6.18 split it out of CONFIG_HYPERV"
            if identified
            else "set CONFIG_HYPERV (and CONFIG_HYPERV_VMBUS from Linux 6.18 on)"
        )
        return (
            "no VMBus",
            f"{seen.release} does not have hv_vmbus, neither built in nor as a module; " + hint,
        )
    if not identified:
        return (
            "no VMBus",
            "the kernel did not see that it runs on Hyper-V; look at CONFIG_HYPERVISOR_GUEST and "
            "CONFIG_HYPERV, and for nopv on the command line",
        )
    if not seen.modules.is_builtin("hv_vmbus"):
        return (
            "no VMBus",
            "hv_vmbus is a module of this kernel and did not bind to the ACPI device VMBUS; see "
            "whether it is in the initramfs and loads (its errors are in the console log)",
        )
    return (
        "no VMBus",
        "hv_vmbus is built in and did not bind to the ACPI device VMBUS; look for its errors in "
        "the console log and at CONFIG_ACPI",
    )


def _why_no_userspace(seen: Sighting) -> tuple[str, str]:
    panic = kernel_panic(seen.console)
    if seen.worker_error:
        return "the machine's worker ended", seen.worker_error
    if panic and "unable to mount root" in panic.lower():
        return panic, "the initramfs was not unpacked; set CONFIG_BLK_DEV_INITRD and CONFIG_RD_GZIP"
    if panic and re.search(r"init(?: found)?\b", panic):
        return panic, "the initramfs's programs did not run; look at CONFIG_BINFMT_ELF and _SCRIPT"
    if panic:
        return panic, "the lines before it on the console say why"
    if not seen.console.strip():
        return (
            "the console stayed silent",
            "the kernel stopped before its console, or has none on ttyS0; look at "
            "CONFIG_SERIAL_8250_CONSOLE, or add earlyprintk=ttyS0 to see more",
        )
    if _USERSPACE.search(seen.console):
        return (
            "user space started but its probe does not answer",
            "the probe speaks on the second serial port; look at CONFIG_SERIAL_8250 and "
            "CONFIG_SERIAL_8250_RUNTIME_UARTS",
        )
    return "the kernel stopped before user space", "the last console lines show where"


def explain(seen: Sighting) -> tuple[str, ...]:
    """The whole finding: a headline, the stages, what did not bind, the console's last lines."""
    what, hint = _why_no_bus(seen) if seen.probe_answered else _why_no_userspace(seen)
    lines = [f"{what}: {hint}", *how_far(seen)]
    if seen.devices is not None and seen.modules is not None:
        lines += unbound_devices(seen.devices, seen.modules)
    tail = console_tail(seen.console)
    lines += [f"console: {line}" for line in tail] or ["console: (nothing)"]
    return tuple(lines)
