"""What a guest is told about an adapter's addresses: plain texts made into key-value settings.

The lists of ``hv_kvp_ipaddr_value`` (``uapi/linux/hyperv.h``): addresses and masks in the same
order. An IPv6 mask is the prefix's length: ``hv_kvp_daemon`` since Linux 6.8 reads it as a number
(a mask like ``ffff::`` would be 0 in its NetworkManager file), older ones hand on what they get.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.model import IpSettings

#: ``ADDR_FAMILY_IPV4`` and ``ADDR_FAMILY_IPV6``.
FAMILY: Final = {4: 1, 6: 2}
#: Entries of each list that the guest's daemon reads (``MAX_IP_ENTRIES``).
ENTRY_LIMIT: Final = 64


@dataclass(frozen=True, slots=True)
class Addresses:
    """An adapter's addresses with their prefix lengths, its gateways and name servers.

    Without any address the adapter asks for them by DHCP.
    """

    addresses: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    dns_servers: tuple[str, ...] = ()

    def settings(self, instance: str) -> IpSettings:
        """What the guest's daemon is sent for the adapter of this instance GUID.

        :class:`HvHostError` names the text that is no address, or does not belong to the others.
        """
        if not self.addresses:
            if self.gateways or self.dns_servers:
                raise HvHostError(
                    "gateways and name servers go with addresses; an adapter on DHCP is told them."
                )
            return IpSettings(f"{{{instance}}}", sum(FAMILY.values()), dhcp=True)
        addresses = [interface(text) for text in self.addresses]
        gateways = [_address(text, "gateway") for text in self.gateways]
        servers = [_address(text, "name server") for text in self.dns_servers]
        if max(len(addresses), len(gateways), len(servers)) > ENTRY_LIMIT:
            raise HvHostError(f"a guest takes at most {ENTRY_LIMIT} addresses of a kind.")
        for gateway in gateways:
            if not gateway.is_link_local and not any(
                gateway in each.network for each in addresses if each.version == gateway.version
            ):
                raise HvHostError(
                    f"the gateway {gateway} is in no network of {', '.join(self.addresses)}, so "
                    "the guest could not reach it; give one that is."
                )
        return IpSettings(
            f"{{{instance}}}",
            sum(FAMILY[version] for version in {each.version for each in addresses}),
            addresses=_list(each.ip for each in addresses),
            subnets=_list(map(_mask, addresses)),
            gateways=_list(gateways),
            dns_servers=_list(servers),
        )


def _list(items: Iterable[object]) -> str:
    return ";".join(map(str, items))


def _mask(interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> str:
    network = interface.network
    return str(network.prefixlen if network.version == 6 else network.netmask)


def interface(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    """An address with its prefix length that an adapter can have; :class:`HvHostError` if none."""
    address, slash, _ = text.partition("/")
    try:
        found = ipaddress.ip_interface(text)
    except ValueError:
        raise HvHostError(
            f"{text!r} is no address with prefix length, like 192.0.2.5/24 or 2001:db8::5/64."
        ) from None
    if not slash:
        raise HvHostError(f"{address} needs the length of its prefix; write {address}/24 or so.")
    own, network = found.ip, found.network
    if own.is_multicast or own.is_unspecified or own.is_loopback or "%" in address:
        raise HvHostError(f"{address} cannot be an adapter's own address; choose another.")
    if network.num_addresses > 2 and own == network.network_address:
        raise HvHostError(f"{address} is the address of the network {network} itself; add to it.")
    if own == ipaddress.IPv4Address("255.255.255.255") or (
        network.version == 4 and network.num_addresses > 2 and own == network.broadcast_address
    ):
        raise HvHostError(f"{address} is the broadcast address of {network}; choose another.")
    return found


def _address(text: str, what: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise HvHostError(f"{text!r} is no address of a {what}, like 192.0.2.1.") from None
    if found.is_multicast or found.is_unspecified or "%" in text:
        raise HvHostError(f"{text} cannot be the address of a {what}; choose another.")
    return found


def parse(
    addresses: Sequence[str], gateways: Sequence[str], dns_servers: Sequence[str]
) -> Addresses:
    """What people write: addresses with prefix length, or the one word ``dhcp``."""
    if list(addresses) == ["dhcp"]:
        addresses = ()
    elif not addresses:
        raise HvHostError("say which addresses the adapter gets, or dhcp.")
    return Addresses(tuple(addresses), tuple(gateways), tuple(dns_servers))
