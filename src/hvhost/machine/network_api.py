"""Routes of a machine's network adapters."""

from __future__ import annotations

import msgspec

from hvhost.machine.endpoint import Endpoint
from hvhost.machine.model import LiveMachine
from hvhost.network.addresses import Addresses
from hvhost.network.config import parse_adapter
from hvhost.network.peripheral import NetworkPeripheral
from hvhost.network.report import AdapterInfo


class AdapterAddRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter as ``hvhost run --nic`` describes it, and its name."""

    nic: str
    name: str


class AdapterNameRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which adapter."""

    name: str


class AdapterLinkRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter, and whether its cable is plugged in."""

    name: str
    up: bool


class AdapterAddressesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter and its addresses with prefix lengths; without any, it asks by DHCP."""

    name: str
    addresses: list[str] = []
    gateways: list[str] = []
    dns_servers: list[str] = []


def _add(machine: LiveMachine, request: AdapterAddRequest) -> AdapterInfo:
    return machine.peripheral(NetworkPeripheral).add(parse_adapter(request.nic, name=request.name))


def _remove(machine: LiveMachine, request: AdapterNameRequest) -> list[AdapterInfo]:
    network = machine.peripheral(NetworkPeripheral)
    network.remove(request.name)
    return network.adapters()


def _set_ip(machine: LiveMachine, request: AdapterAddressesRequest) -> AdapterInfo:
    adapter = machine.peripheral(NetworkPeripheral).adapter(request.name)
    wanted = Addresses(
        tuple(request.addresses), tuple(request.gateways), tuple(request.dns_servers)
    )
    machine.set_ip(wanted.settings(adapter.instance))
    return adapter


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/machine/network",
        "network",
        "The network adapters",
        lambda machine, _: machine.peripheral(NetworkPeripheral).adapters(),
        result=list[AdapterInfo],
    ),
    Endpoint(
        "POST",
        "/v1/machine/network/add",
        "network_add",
        "Give the machine another network adapter",
        _add,
        AdapterAddRequest,
        AdapterInfo,
    ),
    Endpoint(
        "POST",
        "/v1/machine/network/remove",
        "network_remove",
        "Take a network adapter away",
        _remove,
        AdapterNameRequest,
        list[AdapterInfo],
    ),
    Endpoint(
        "POST",
        "/v1/machine/network/link",
        "network_link",
        "Pull a network adapter's cable, or plug it in",
        lambda machine, request: machine.peripheral(NetworkPeripheral).set_link(
            request.name, request.up
        ),
        AdapterLinkRequest,
        AdapterInfo,
    ),
    Endpoint(
        "POST",
        "/v1/machine/network/ip",
        "network_set_ip",
        "Have the guest's key-value daemon give a network adapter addresses, or DHCP",
        _set_ip,
        AdapterAddressesRequest,
        AdapterInfo,
    ),
)
