"""What the host tells every guest of itself and of the machine, in key-value pool 3.

The keys are those a Hyper-V host fills the guest's ``Parameters`` with; the ones that only make
sense for Windows hosts have a value that says nothing false.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path

from hvhost.machine.model import KvpPool
from hvhost.services.kvp_protocol import KvpItem

_MACHINE_ID = Path("/etc/machine-id")
_PROCESSOR_ARCHITECTURE_AMD64 = 9


def machine_id(name: str, machine_id_file: Path = _MACHINE_ID) -> uuid.UUID:
    """The id of the machine *name*: the same at every start on this computer, and only there."""
    try:
        computer = uuid.UUID(machine_id_file.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        computer = uuid.uuid5(uuid.NAMESPACE_DNS, os.uname().nodename)
    return uuid.uuid5(computer, name)


def host_items(name: str) -> list[tuple[KvpPool, KvpItem]]:
    """The items for the guest of the machine *name*."""
    host = os.uname()
    major, minor, *_ = *re.findall(r"\d+", host.release), "0", "0"
    items = {
        "HostName": host.nodename,
        "HostingSystemEditionId": "0",
        "HostingSystemNestedLevel": "0",
        "HostingSystemOsMajor": major,
        "HostingSystemOsMinor": minor,
        "HostingSystemProcessorArchitecture": str(_PROCESSOR_ARCHITECTURE_AMD64),
        "HostingSystemProcessorIdleStateMax": "0",
        "HostingSystemProcessorThrottleMax": "100",
        "HostingSystemProcessorThrottleMin": "100",
        "HostingSystemSpMajor": "0",
        "HostingSystemSpMinor": "0",
        "PhysicalHostName": host.nodename,
        "PhysicalHostNameFullyQualified": host.nodename,
        "VirtualMachineDynamicMemoryBalancingEnabled": "0",
        "VirtualMachineId": str(machine_id(name)).upper(),
        "VirtualMachineName": name,
    }
    return [(KvpPool.AUTO_EXTERNAL, KvpItem(key, value)) for key, value in items.items()]
