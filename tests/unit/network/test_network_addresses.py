"""Addresses as people write them, as the guest's key-value daemon is told them."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.network.addresses import ENTRY_LIMIT, Addresses, parse
from hvhost.services.kvp_protocol import KvpOperation, ip_message, parse_ip

INSTANCE = "2450ee40-33bf-4fbd-892e-9fb06e9214cf"


def test_both_families() -> None:
    wanted = parse(
        ["192.0.2.5/25", "2001:db8::5/64"], ["192.0.2.1", "fe80::1"], ["192.0.2.53", "2001:db8::53"]
    )
    settings = wanted.settings(INSTANCE)
    assert settings.adapter == f"{{{INSTANCE}}}"
    assert (settings.family, settings.dhcp) == (3, False)
    assert settings.addresses == "192.0.2.5;2001:db8::5"
    assert settings.subnets == "255.255.255.128;64"
    assert settings.gateways == "192.0.2.1;fe80::1"
    assert settings.dns_servers == "192.0.2.53;2001:db8::53"


@pytest.mark.parametrize(("address", "family"), [("192.0.2.5/24", 1), ("2001:db8::5/64", 2)])
def test_one_family(address: str, family: int) -> None:
    assert parse([address], [], []).settings(INSTANCE).family == family


@pytest.mark.parametrize(
    "address",
    # A link of two, an address alone, and IPv6, which has no broadcasts.
    ["192.0.2.0/31", "192.0.2.1/31", "192.0.2.0/32", "2001:db8::/127", "2001:db8::ffff/112"],
)
def test_the_edges_of_a_network_that_are_addresses(address: str) -> None:
    assert parse([address], [], []).settings(INSTANCE).addresses == address.partition("/")[0]


def test_dhcp() -> None:
    settings = parse(["dhcp"], [], []).settings(INSTANCE)
    assert settings.dhcp and not (settings.addresses or settings.subnets or settings.gateways)


@pytest.mark.parametrize(
    ("addresses", "gateways", "servers", "sentence"),
    [
        (["192.0.2.5"], [], [], "needs the length of its prefix"),
        (["2001:db8::5"], [], [], "needs the length of its prefix"),
        (["192.0.2.500/24"], [], [], "is no address with prefix length"),
        (["192.0.2.5/33"], [], [], "is no address with prefix length"),
        (["dhcp", "192.0.2.5/24"], [], [], "'dhcp' is no address"),
        (["224.0.0.1/24"], [], [], "own address"),
        (["0.0.0.0/24"], [], [], "own address"),
        (["fe80::1%eth0/64"], [], [], "own address"),
        (["127.0.0.1/8"], [], [], "own address"),
        (["::1/64"], [], [], "own address"),
        (["192.0.2.0/24"], [], [], "192.0.2.0 is the address of the network 192.0.2.0/24 itself"),
        (["2001:db8::/64"], [], [], "is the address of the network"),
        (["192.0.2.127/25"], [], [], "is the broadcast address of 192.0.2.0/25"),
        (["255.255.255.255/32"], [], [], "is the broadcast address"),
        (["192.0.2.5/24"], ["192.0.3.1"], [], "in no network of 192.0.2.5/24"),
        (["192.0.2.5/24"], ["2001:db8::1"], [], "in no network"),
        (["192.0.2.5/24"], ["router"], [], "no address of a gateway"),
        (["192.0.2.5/24"], ["0.0.0.0"], [], "cannot be the address of a gateway"),
        (["192.0.2.5/24"], [], ["ns.example"], "no address of a name server"),
        (["192.0.2.5/24"], [], ["192.0.2.53"] * (ENTRY_LIMIT + 1), "at most 64"),
        (["dhcp"], ["192.0.2.1"], [], "go with addresses"),
        ([], [], [], "or dhcp"),
    ],
)
def test_what_is_refused(
    addresses: list[str], gateways: list[str], servers: list[str], sentence: str
) -> None:
    with pytest.raises(HvHostError, match=sentence):
        parse(addresses, gateways, servers).settings(INSTANCE)


INTERFACES = (
    st.ip_addresses()
    .filter(lambda each: not (each.is_multicast or each.is_unspecified or each.is_loopback))
    .flatmap(lambda each: st.integers(1, each.max_prefixlen).map(lambda length: f"{each}/{length}"))
    .map(ipaddress.ip_interface)
    .filter(
        lambda each: (
            each.network.num_addresses <= 2
            or each.ip not in (each.network.network_address, each.network.broadcast_address)
        )
    )
    .filter(lambda each: str(each.ip) != "255.255.255.255")
    .map(str)
)


@given(st.lists(INTERFACES, min_size=1, max_size=10))
def test_every_list_is_a_message_and_as_long_as_its_masks(addresses: list[str]) -> None:
    settings = Addresses(tuple(addresses)).settings(INSTANCE)
    told = parse_ip(ip_message(KvpOperation.SET_IP_INFO, settings))
    assert told == settings
    assert len(told.addresses.split(";")) == len(told.subnets.split(";")) == len(addresses)
