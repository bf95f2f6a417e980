"""What the guest's own kernel shows of the bus (``drivers/hv/vmbus_drv.c``) and of its uptime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.sockets.protocol import SRV_ID_TEMPLATE
from hvhost.verify.contract import INTERFACE_NAMES
from hvhost.verify.guest import Probe

_SOCKET_TAIL = str(SRV_ID_TEMPLATE)[8:]
DEVICES = "/sys/bus/vmbus/devices"


@dataclass(frozen=True, slots=True)
class GuestDevice:
    """One device of the guest's bus; GUIDs in lower case without braces.

    ``channels`` maps the id of each channel to the CPU it interrupts; ``driver`` is the bound one.
    """

    interface_type: str
    interface_instance: str
    driver: str | None
    modalias: str
    channels: Mapping[int, int]

    @property
    def name(self) -> str:
        return interface_name(self.interface_type)


@dataclass(frozen=True, slots=True)
class ChannelCounters:
    """A channel's own counters: interrupts taken, and signals sent to the host."""

    interrupts: int
    events: int


def interface_name(interface_type: str) -> str:
    """A readable name for an interface type, or the GUID itself."""
    known = INTERFACE_NAMES.get(interface_type)
    if known is None and interface_type.endswith(_SOCKET_TAIL):
        return f"socket, port {int(interface_type[:8], 16)}"
    return known or interface_type


def _guid(text: str) -> str:
    return text.strip().strip("{}").lower()


def _uevent(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, separator, value in pairs if separator}


def read_devices(probe: Probe) -> tuple[GuestDevice, ...]:
    """Every device on the guest's bus, by its sysfs tree; empty when there is no bus."""
    files = probe.read_all(
        *(
            f"{DEVICES}/*/{name}"
            for name in ("class_id", "device_id", "uevent", "channel_vp_mapping")
        )
    )
    devices = []
    for path, interface_type in sorted(files.items()):
        directory, _, name = path.rpartition("/")
        if name != "class_id":
            continue
        uevent = _uevent(files.get(f"{directory}/uevent", ""))
        mapping = (
            pair.split(":") for pair in files.get(f"{directory}/channel_vp_mapping", "").split()
        )
        devices.append(
            GuestDevice(
                interface_type=_guid(interface_type),
                interface_instance=_guid(files.get(f"{directory}/device_id", "")),
                driver=uevent.get("DRIVER"),
                modalias=uevent.get("MODALIAS", ""),
                channels={int(channel): int(cpu) for channel, cpu in mapping},
            )
        )
    return tuple(devices)


def read_uptime(probe: Probe) -> float:
    """Seconds since the guest booted, by its own count (``/proc/uptime``)."""
    return float(probe.read("/proc/uptime").split()[0])


def read_counters(probe: Probe) -> dict[int, ChannelCounters]:
    """The counters of every channel in the guest, by channel id."""
    pattern = f"{DEVICES}/*/channels/*/"
    files = probe.read_all(pattern + "interrupts", pattern + "events")
    counters = {}
    for path, interrupts in files.items():
        directory, _, name = path.rpartition("/")
        if name == "interrupts":
            events = files.get(f"{directory}/events", "0")
            counters[int(directory.rpartition("/")[2])] = ChannelCounters(
                int(interrupts), int(events)
            )
    return counters


def callback_interrupts(text: str) -> tuple[int, ...]:
    """Hypervisor callback interrupts per CPU, from the ``HYP`` line of ``/proc/interrupts``.

    :class:`HvHostError` where there is no such line: the kernel never set its callback vector.
    """
    lines = text.splitlines()
    cpus = len(lines[0].split()) if lines else 0
    for line in lines:
        label, _, counts = line.strip().partition(":")
        if label == "HYP":
            return tuple(int(count) for count in counts.split()[:cpus])
    raise HvHostError(
        "/proc/interrupts in the guest has no HYP line, so the kernel never set up the "
        "hypervisor's callback interrupt; see whether it detected Hyper-V."
    )


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers of a kernel list such as ``0-2,4``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)
