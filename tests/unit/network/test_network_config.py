"""How adapters are described, and what is no description of one."""

from __future__ import annotations

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.config_file import dump_config, load_config
from hvhost.machine.model import MachineConfig
from hvhost.network.config import (
    DEVICE_NAME_LIMIT,
    MAXIMUM_ADAPTERS,
    AdapterConfig,
    PortForward,
    Uplink,
    parse_adapter,
    parse_adapters,
    parse_forward,
    parse_uplink,
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
    with pytest.raises(HvHostError, match="forward means nothing with --nic host-only"):
        parse_adapter("host-only,forward=2222:22", name="net0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wifi", "'wifi' is nothing for --nic to plug into"),
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
        ("nat,vlan=3", "vlan means nothing with --nic nat; leave it out, or use switch"),
        ("tap:a,trunk=3", "trunk means nothing with --nic tap"),
        ("host-only,isolated", "isolated means nothing with --nic host-only"),
        ("none,rate=3", "rate means nothing with --nic none"),
        ("switch:a,address=10.0.0.1/24", "address means nothing with --nic switch"),
        ("nat,address=10.0.0.1/24", "leave it out, or use host-only"),
        ("switch:a,dhcp=off", "dhcp means nothing with --nic switch"),
        ("tap:" + "a" * (DEVICE_NAME_LIMIT + 1), "too long for a tap device's name"),
        ("host-only,address=10.0.0.1/33", "no address with prefix length"),
        ("host-only,address=10.0.0.1", "needs the length of its prefix"),
        ("host-only,address=10.0.0.1/24+10.0.1.0/24", "10.0.1.0 is the address of the network"),
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


def test_what_goes_with_its_plug() -> None:
    assert parse_adapter("host-only,address=10.0.0.1/24+fd00::1/64,dhcp=off", name="a").address
    name = "a" * DEVICE_NAME_LIMIT
    assert parse_adapter(f"tap:{name}", name="a").target == name


@pytest.mark.parametrize(
    ("nics", "sentence"),
    [
        (["none,name=net1", "none"], "'net1' already"),
        (
            ["none,mac=00:15:5d:00:00:01", "none,mac=00-15-5D-00-00-01"],
            "00:15:5d:00:00:01 is the address of 'net0' already",
        ),
        (["none"] * (MAXIMUM_ADAPTERS + 1), "at most 8"),
    ],
)
def test_what_no_machine_can_have(nics: list[str], sentence: str) -> None:
    with pytest.raises(HvHostError, match=sentence):
        parse_adapters(nics, [])
    assert len(parse_adapters(["none"] * MAXIMUM_ADAPTERS, [])) == MAXIMUM_ADAPTERS


def test_an_uplink_is_a_port() -> None:
    uplink = parse_uplink("tap:tap0,vlan=5,trunk=10+20,isolated,rate=100")
    assert uplink is not None
    assert (uplink.uplink, uplink.target, uplink.name) == (Uplink.TAP, "tap0", "uplink")
    assert (uplink.vlan, uplink.trunk, uplink.isolated, uplink.rate) == (5, (10, 20), True, 100)
    nat = parse_uplink("nat,vlan=7,address=10.9.8.1/24,forward=2222:22")
    assert nat is not None and (nat.vlan, nat.address) == (7, "10.9.8.1/24")
    assert nat.forwards == (PortForward(2222, 22),)
    assert parse_uplink("none") is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "switch:other",
            "'switch' is nothing for --uplink to plug into; use one of nat, host-only",
        ),
        ("tap", "--uplink tap takes a name"),
        ("none,vlan=4", "vlan means nothing with --uplink none; leave it out, or use nat or"),
        ("none,address=10.0.0.1/24", "address means nothing with --uplink none"),
        ("nat,trunk=4", "trunk means nothing with --uplink nat"),
        ("nat,dhcp=off", "dhcp means nothing with --uplink nat"),
        ("tap:a,address=10.0.0.1/24", "address means nothing with --uplink tap"),
        ("tap:a,forward=22", "forward means nothing with --uplink tap"),
        ("tap:a,mac=00:15:5d:00:00:01", r"mac means nothing with --uplink tap; leave it out\.$"),
        ("nat,queues=2", "queues means nothing"),
        ("nat,spoofing", "spoofing means nothing"),
        ("nat,name=x", "name means nothing"),
        ("nat,colour=red", "--uplink has no option 'colour'"),
        ("nat,address=10.9.8.0/24", "is the address of the network"),
    ],
)
def test_what_is_no_uplink(text: str, sentence: str) -> None:
    with pytest.raises(HvHostError, match=sentence):
        parse_uplink(text)
