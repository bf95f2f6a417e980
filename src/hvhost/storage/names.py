"""What controllers are known by: on the bus, and on a fibre channel fabric."""

from __future__ import annotations

import hashlib
from uuid import NAMESPACE_OID, UUID, uuid5

from hvhost.machine.storage_model import FibreChannelConfig
from hvhost.storage.protocol import WorldWideNames

#: A name of Hyper-V's own kind: company 00-03-FF, NAA 0xC.
_FABRIC_PREFIX = "c003ff"


def default_names(machine: str, number: int) -> FibreChannelConfig:
    """World-wide names of a machine's adapter *number*, the same whenever it is defined."""
    digest = hashlib.sha256(f"{machine}/{number}".encode()).hexdigest()
    return FibreChannelConfig(_FABRIC_PREFIX + digest[:10], _FABRIC_PREFIX + digest[10:20])


def instance(name: str) -> UUID:
    """A controller's interface instance: the same in every boot and on every host."""
    return uuid5(NAMESPACE_OID, f"hvhost/{name}")


def wire_names(names: FibreChannelConfig | None) -> WorldWideNames | None:
    """The names of an adapter as the guest is told them; ``None`` of a SCSI controller."""
    if names is None:
        return None
    port, node = bytes.fromhex(names.port_name), bytes.fromhex(names.node_name)
    return WorldWideNames(1, 0, 0, port, node, port, node)
