"""The feature contract: every row a Hyper-V host owes its guests, and what a guest needs for it.

Identifiers and groups are those of the contract; a row that this release cannot prove yet is
still here and is reported as ``missing``.
"""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hvhost.errors import HvHostError


class Status(StrEnum):
    """What verify found out about one row."""

    WORKS = "works"
    FAILS = "fails"
    GUEST_LACKS = "guest-lacks"
    HOST_LACKS = "host-lacks"
    MISSING = "missing"

    @property
    def lacking(self) -> bool:
        """Something outside this product is not there; ``missing`` is our own gap, not this."""
        return self in (Status.GUEST_LACKS, Status.HOST_LACKS)


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver of the guest kernel.

    ``modules`` are the names it goes by (any one suffices); ``alias`` is the device alias under
    which ``modules.alias`` must name one of them, ``None`` where the driver announces no device.
    """

    modules: tuple[str, ...]
    alias: str | None
    option: str

    def __str__(self) -> str:
        return f"{' or '.join(self.modules)} ({self.option})"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the contract.

    ``daemons`` are alternatives: a guest needs one of them where any is named. ``options`` are
    what the kernel must be built with beside its drivers. ``served`` says which daemon goes with
    which driver: the first of these drivers that the kernel has takes the device.
    """

    id: str
    group: str
    title: str
    drivers: tuple[Driver, ...]
    daemons: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    served: tuple[tuple[Driver, str], ...] = ()


def vmbus_alias(interface_type: str) -> str:
    """The module alias of a VMBus interface type (``drivers/hv/vmbus_drv.c``, modalias)."""
    return "vmbus:" + uuid.UUID(interface_type).bytes_le.hex()


# Interface types, by their names in linux/hyperv.h.
HV_SHUTDOWN_GUID = "0e0b6031-5213-4934-818b-38d90ced39db"
HV_TS_GUID = "9527e630-d0ae-497b-adce-e80ab0175caf"
HV_HEART_BEAT_GUID = "57164f39-9115-4e78-ab55-382f3bd5422d"
HV_KVP_GUID = "a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"
HV_VSS_GUID = "35fa2e29-ea23-4236-96ae-3a6ebacba440"
HV_FCOPY_GUID = "34d14be3-dee4-41c8-9ae7-6b174977c192"
HV_DM_GUID = "525074dc-8985-46e2-8057-a307dc18a502"
HV_MOUSE_GUID = "cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"
HV_KBD_GUID = "f912ad6d-2b17-48ea-bd65-f927a61c7684"
HV_SYNTHVID_GUID = "da0a7802-e377-4aac-8e77-0558eb1073f8"
HV_NIC_GUID = "f8615163-df3e-46c5-913f-f2d2f965ed0e"
HV_IDE_GUID = "32412632-86cb-44a2-9b5c-50d1417354f5"
HV_SCSI_GUID = "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"
HV_SYNTHFC_GUID = "2f9bcc4a-0069-4af3-b76b-6fd0be528cda"
HV_ND_GUID = "8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"
HV_PCIE_GUID = "44c4f61d-4444-4400-9d52-802e27ede19f"

INTERFACE_NAMES = {
    HV_SHUTDOWN_GUID: "shutdown",
    HV_TS_GUID: "time synchronization",
    HV_HEART_BEAT_GUID: "heartbeat",
    HV_KVP_GUID: "key-value pairs",
    HV_VSS_GUID: "volume shadow copy",
    HV_FCOPY_GUID: "file copy",
    HV_DM_GUID: "dynamic memory",
    HV_MOUSE_GUID: "mouse",
    HV_KBD_GUID: "keyboard",
    HV_SYNTHVID_GUID: "video",
    HV_NIC_GUID: "network adapter",
    HV_IDE_GUID: "IDE controller",
    HV_SCSI_GUID: "SCSI controller",
    HV_SYNTHFC_GUID: "fibre channel adapter",
    HV_ND_GUID: "RDMA adapter",
    HV_PCIE_GUID: "PCI pass-through",
}


def _vmbus_driver(option: str, interface_type: str, *modules: str) -> Driver:
    return Driver(modules, vmbus_alias(interface_type), option)


VMBUS = Driver(("hv_vmbus",), "acpi:VMBUS:", "CONFIG_HYPERV, from 6.18 on CONFIG_HYPERV_VMBUS")
_SHUTDOWN = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_SHUTDOWN_GUID, "hv_utils")
_TIME = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_TS_GUID, "hv_utils")
_HEARTBEAT = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_HEART_BEAT_GUID, "hv_utils")
_KVP = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_KVP_GUID, "hv_utils")
_VSS = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_VSS_GUID, "hv_utils")
_FCOPY = Driver(("uio_hv_generic", "hv_utils"), None, "CONFIG_UIO_HV_GENERIC, CONFIG_HYPERV_UTILS")
# Linux 6.10 took file copy out of hv_utils; a program does it since then, through UIO.
_FCOPY_KERNEL = _vmbus_driver("CONFIG_HYPERV_UTILS", HV_FCOPY_GUID, "hv_utils")
_FCOPY_UIO = Driver(("uio_hv_generic",), None, "CONFIG_UIO_HV_GENERIC")
_BALLOON = _vmbus_driver("CONFIG_HYPERV_BALLOON", HV_DM_GUID, "hv_balloon")
_MOUSE = _vmbus_driver("CONFIG_HID_HYPERV_MOUSE", HV_MOUSE_GUID, "hid_hyperv")
_NET = _vmbus_driver("CONFIG_HYPERV_NET", HV_NIC_GUID, "hv_netvsc")
_STORAGE = _vmbus_driver("CONFIG_HYPERV_STORAGE", HV_SCSI_GUID, "hv_storvsc")
_FC = _vmbus_driver("CONFIG_HYPERV_STORAGE", HV_SYNTHFC_GUID, "hv_storvsc")
_VIDEO = _vmbus_driver(
    "CONFIG_DRM_HYPERV, CONFIG_FB_HYPERV", HV_SYNTHVID_GUID, "hyperv_drm", "hyperv_fb"
)
_PCI = _vmbus_driver("CONFIG_PCI_HYPERV", HV_PCIE_GUID, "pci_hyperv")
_VSOCK = Driver(("hv_sock",), None, "CONFIG_HYPERV_VSOCKETS")

ROWS: tuple[Row, ...] = (
    Row("shutdown", "Core", "Clean shutdown and reboot from the host", (VMBUS, _SHUTDOWN)),
    Row("time-sync", "Core", "Guest clock follows the host's", (VMBUS, _TIME)),
    Row("accurate-time", "Core", "Clock within 1 ms of the host", (VMBUS, _TIME), ("chronyd",)),
    # Interrupt steering is proved on the heartbeat channel, the one every machine has.
    Row("smp", "Core", "Several virtual processors", (VMBUS, _HEARTBEAT)),
    Row("heartbeat", "Core", "Host notices a hang or a panic", (VMBUS, _HEARTBEAT)),
    Row("mouse", "Core", "Absolute pointer", (VMBUS, _MOUSE)),
    Row("storage", "Core", "SCSI disks and DVD, hot-added and removed", (VMBUS, _STORAGE)),
    Row("network", "Core", "Network adapter", (VMBUS, _NET)),
    Row("jumbo-frames", "Networking", "MTU of 9,000 and more", (VMBUS, _NET)),
    Row("vlan", "Networking", "VLAN access and trunk ports", (VMBUS, _NET)),
    Row("live-migration", "Networking", "A running guest moves to another host", (VMBUS, _NET)),
    Row(
        "static-ip",
        "Networking",
        "Static address injected after failover",
        (VMBUS, _NET, _KVP),
        ("hv_set_ifconfig",),
    ),
    Row("vrss", "Networking", "Receive load spread over processors", (VMBUS, _NET)),
    Row("offloads", "Networking", "Segmentation and checksum offload", (VMBUS, _NET)),
    Row("lro", "Networking", "Received segments merged", (VMBUS, _NET)),
    Row("sr-iov", "Networking", "A virtual function takes the data path", (VMBUS, _NET, _PCI)),
    Row("vhdx-resize", "Storage", "Disk grows and shrinks while attached", (VMBUS, _STORAGE)),
    Row("fibre-channel", "Storage", "Virtual fibre channel adapter", (VMBUS, _FC)),
    Row(
        "live-backup",
        "Storage",
        "Consistent backup of a running guest",
        (VMBUS, _STORAGE, _VSS),
        ("hv_vss_daemon",),
    ),
    Row("trim", "Storage", "Discard reaches the host's file", (VMBUS, _STORAGE)),
    Row("wwn", "Storage", "Stable SCSI identity", (VMBUS, _STORAGE)),
    Row("pae", "Memory", "32-bit kernel with more than 4 GiB", (VMBUS,)),
    Row("mmio-gap", "Memory", "MMIO windows set per machine", (VMBUS,)),
    Row(
        "hot-add",
        "Memory",
        "Memory grows while running",
        (VMBUS, _BALLOON),
        options=("CONFIG_MEMORY_HOTPLUG",),
    ),
    Row("ballooning", "Memory", "Unused memory goes back to the host", (VMBUS, _BALLOON)),
    Row("memory-resize", "Memory", "Fixed memory set up and down", (VMBUS, _BALLOON)),
    Row("video", "Video, others", "Synthetic display", (VMBUS, _VIDEO)),
    Row("kvp", "Video, others", "Key-value pairs both ways", (VMBUS, _KVP), ("hv_kvp_daemon",)),
    Row("nmi", "Video, others", "Non-maskable interrupt to a hung guest", (VMBUS,)),
    Row(
        "file-copy",
        "Video, others",
        "File copied in without a network",
        (VMBUS, _FCOPY),
        ("hv_fcopy_daemon", "hv_fcopy_uio_daemon"),
        served=((_FCOPY_KERNEL, "hv_fcopy_daemon"), (_FCOPY_UIO, "hv_fcopy_uio_daemon")),
    ),
    Row("lsvmbus", "Video, others", "The bus can be listed in the guest", (VMBUS,)),
    Row("hvsocket", "Video, others", "Stream sockets between host and guest", (VMBUS, _VSOCK)),
    Row("dda", "Video, others", "A PCI device of the host for the guest", (VMBUS, _PCI)),
    Row("uefi", "Generation 2", "Firmware boot from disk, DVD, network", (VMBUS, _STORAGE)),
    Row("secure-boot", "Generation 2", "Only signed code starts", (VMBUS, _STORAGE)),
)
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(row.group for row in ROWS))
_BY_ID = {row.id: row for row in ROWS}


def find_rows(ids: Iterable[str], *, option: str) -> tuple[Row, ...]:
    """The rows of these ids, each once, in the contract's order.

    :class:`HvHostError` for an id the contract does not have, naming *option* and near matches.
    """
    wanted = set(ids)
    for unknown in sorted(wanted - _BY_ID.keys()):
        near = difflib.get_close_matches(unknown, _BY_ID, n=3, cutoff=0.7)
        meant = f"did you mean {', '.join(near)}?" if near else f"rows are: {', '.join(_BY_ID)}."
        raise HvHostError(f"{option} names {unknown!r}, which is no row of the contract; {meant}")
    return tuple(row for row in ROWS if row.id in wanted)


def requested_rows(ids: Sequence[str]) -> tuple[Row, ...]:
    """What ``--rows`` asks for: those rows, or all when it names none."""
    return find_rows(ids, option="--rows") if ids else ROWS
