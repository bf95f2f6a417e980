"""How adapters are described, and what is no description of one."""

from __future__ import annotations

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.config_file import dump_config, load_config
from hvhost.machine.model import MachineConfig
from hvhost.network.config import (
    AdapterConfig,
    PortForward,
    Uplink,
    parse_adapter,
    parse_adapters,
    parse_forward,
    parse_vlans,
)


def test_a_description_with_everything() -> None:
    text = "switch:lan,mac=00-15-5D-01-02-03,queues=4,vlan=5,trunk=10+20-22,isolated,rate=100"
    assert parse_adapter(f"{text},spoofing=on", name="net0") == AdapterConfig(
        name="net0",
        mac="00:15:5d:01:02:03",
        uplink=Uplink.SWITCH,
        target="lan",
        queues=4,
        spoofing=True,
        vlan=5,
        trunk=(10, 20, 21, 22),
        isolated=True,
        rate=100,
    )


def test_addresses_are_made_and_differ() -> None:
    first, second = parse_adapters(["nat", "host-only"], [])
    assert first.mac != second.mac and first.mac.startswith("00:15:5d:")
    assert (first.name, second.name) == ("net0", "net1")


def test_ports_lead_to_the_first_nat_or_make_one() -> None:
    none, nat, other = parse_adapters(["none", "nat", "nat"], ["2222:22", "udp:53"])
    assert nat.forwards == (PortForward(2222, 22), PortForward(53, 53, udp=True))
    assert none.forwards == other.forwards == ()
    (made,) = parse_adapters([], ["80"])
    assert made.uplink is Uplink.NAT and made.forwards == (PortForward(80, 80),)


def test_the_configuration_survives_its_file() -> None:
    adapters = parse_adapters(["nat", "switch:lan,trunk=1+2"], ["1:2"])
    config = MachineConfig("vm", "/kernel", adapters=adapters)
    assert load_config(dump_config(config)) == config


def test_forwards_of_an_adapter_that_comes_later() -> None:
    made = parse_adapter("nat,forward=2222:22+udp:53", name="net0", forwards=(PortForward(80, 80),))
    assert made.forwards == (PortForward(80, 80), PortForward(2222, 22), PortForward(53, 53, True))
    with pytest.raises(HvHostError, match="through nat"):
        parse_adapter("host-only,forward=2222:22", name="net0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wifi", "'wifi' is nothing to plug"),
        ("switch", "takes a name"),
        ("nat:eth0", "takes no name"),
        ("tap:a/b", "cannot be the name"),
        ("nat,mac=01:00:00:00:00:00", "no address of an adapter"),
        ("nat,mac=nonsense", "no address of an adapter"),
        ("nat,queues=65", "number from 1 to 64"),
        ("switch:a,vlan=4095", "number from 1 to 4094"),
        ("switch:a,trunk=5-4095", "does not exist"),
        ("switch:a,trunk=x", "no list of VLANs"),
        ("switch:a,trunk=3-1", "'3-1' is no range of VLANs; write it 1-3"),
        ("switch:a,trunk=5+29-10", "'29-10' is no range of VLANs"),
        ("switch:a,trunk=", "no list of VLANs"),
        ("switch:a,trunk=5+", "no list of VLANs"),
        ("nat,colour=red", "no option 'colour'"),
        ("nat,name=../x", "is no name"),
    ],
)
def test_what_is_no_adapter(text: str, sentence: str) -> None:
    with pytest.raises(HvHostError, match=sentence):
        parse_adapter(text, name="net0")


@pytest.mark.parametrize("text", ["", "x", "0:1", "1:70000", "1:2:3", "udp:"])
def test_what_is_no_forward(text: str) -> None:
    with pytest.raises(HvHostError):
        parse_forward(text)


def test_vlans() -> None:
    assert parse_vlans("7") == (7,) and parse_vlans("3-5+4+1") == (1, 3, 4, 5)
