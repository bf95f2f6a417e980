"""Setting addresses over the machine's API: which adapter, and what its guest's daemon is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.machine.network_api import ENDPOINTS, AdapterAddressesRequest
from hvhost.network.config import parse_adapter
from hvhost.network.peripheral import NetworkPeripheral
from hvhost.network.report import AdapterInfo

if TYPE_CHECKING:
    from hvhost.machine.model import IpSettings, LiveMachine


def test_the_adapter_of_this_name_is_set(tmp_path: Path) -> None:
    network = NetworkPeripheral((parse_adapter("none", name="net0"),), Loop(), tmp_path)
    told: list[IpSettings] = []
    machine = cast(
        "LiveMachine", SimpleNamespace(peripheral=lambda kind: network, set_ip=told.append)
    )
    (endpoint,) = (each for each in ENDPOINTS if each.path == "/v1/machine/network/ip")
    request = AdapterAddressesRequest("net0", ["192.0.2.5/24"], ["192.0.2.1"], ["192.0.2.53"])
    answer = endpoint.call(machine, request)
    assert isinstance(answer, AdapterInfo) and answer.name == "net0"
    endpoint.call(machine, AdapterAddressesRequest("net0"))
    static, dhcp = told
    assert (static.addresses, static.subnets) == ("192.0.2.5", "255.255.255.0")
    assert (static.gateways, static.dns_servers, static.dhcp) == ("192.0.2.1", "192.0.2.53", False)
    assert dhcp.dhcp and not dhcp.addresses
    with pytest.raises(HvHostError, match="no network adapter 'net7'"):
        endpoint.call(machine, AdapterAddressesRequest("net7"))
    with pytest.raises(HvHostError, match="prefix length"):
        endpoint.call(machine, AdapterAddressesRequest("net0", ["nonsense"]))
    assert len(told) == 2
    network.close()
