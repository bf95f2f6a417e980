"""A machine's network adapters for programs that wait: what the command line and verify speak."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.manager.client import KVP_SECONDS, MachineClient
from hvhost.network.addresses import Addresses
from hvhost.network.report import AdapterInfo


@dataclass(frozen=True, slots=True)
class NetworkClient:
    """The adapters of a running machine; every method raises ``HvHostError`` with a sentence."""

    machine: MachineClient

    def adapters(self) -> list[AdapterInfo]:
        """All of them."""
        return self.machine.ask("GET", "/v1/machine/network", list[AdapterInfo])

    def adapter(self, name: str) -> AdapterInfo | None:
        """The one of this name, if there is one."""
        return next((each for each in self.adapters() if each.name == name), None)

    def add(self, nic: str, name: str) -> AdapterInfo:
        """Another adapter, described as to ``hvhost run --nic``; the guest sees it come."""
        body = {"nic": nic, "name": name}
        return self.machine.ask("POST", "/v1/machine/network/add", AdapterInfo, body)

    def remove(self, name: str) -> list[AdapterInfo]:
        """Take an adapter away; the guest sees it go. The ones that are left."""
        body = {"name": name}
        return self.machine.ask("POST", "/v1/machine/network/remove", list[AdapterInfo], body)

    def set_link(self, name: str, up: bool) -> AdapterInfo:
        """Pull an adapter's cable, or plug it in."""
        body = {"name": name, "up": up}
        return self.machine.ask("POST", "/v1/machine/network/link", AdapterInfo, body)

    def set_ip(self, name: str, wanted: Addresses) -> AdapterInfo:
        """Have the guest's ``hv_kvp_daemon`` give an adapter these addresses, or DHCP."""
        body = {
            "name": name,
            "addresses": list(wanted.addresses),
            "gateways": list(wanted.gateways),
            "dns_servers": list(wanted.dns_servers),
        }
        path = "/v1/machine/network/ip"
        return self.machine.ask("POST", path, AdapterInfo, body, KVP_SECONDS)
