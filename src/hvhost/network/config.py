"""How an adapter is described: plain data for configurations, and its short form for people."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from hvhost.errors import HvHostError

#: The organisation whose addresses Hyper-V gives its adapters.
HYPERV_OUI: Final = "00:15:5d"
MAXIMUM_QUEUES: Final = 64
#: As many adapters as Hyper-V lets a machine have.
MAXIMUM_ADAPTERS: Final = 8
#: Bytes of a network device's name (``IFNAMSIZ`` of ``linux/if.h``, without its zero).
DEVICE_NAME_LIMIT: Final = 15
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Uplink(StrEnum):
    """What an adapter is plugged into.

    ``nat``: the network of this computer, through ``passt``, which needs no rights. ``host-only``:
    a network namespace of its own, in which this computer's kernel is the only other member.
    ``tap``: a tap device that exists. ``switch``: a virtual switch. ``none``: nothing.
    """

    NAT = "nat"
    HOST_ONLY = "host-only"
    TAP = "tap"
    SWITCH = "switch"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class PortForward:
    """A port of this computer that leads into the guest; ``udp`` instead of TCP."""

    host: int
    guest: int
    udp: bool = False


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """One network adapter.

    ``target`` names the tap device or the switch, ``address`` is the kernel's own in a host-only
    network, with its prefix length. ``queues`` is the number of channels, 0: as many as processors.
    ``spoofing`` lets the guest send from addresses other than ``mac``, and change it. ``vlan`` is
    the access VLAN of a switch port; with ``trunk`` the port carries those VLANs tagged, and
    ``vlan`` untagged. ``rate`` limits what a switch port sends, in Mbit/s. ``dhcp``: a
    host-only network gives out addresses and names.
    """

    name: str
    mac: str
    uplink: Uplink = Uplink.NAT
    target: str = ""
    address: str = ""
    queues: int = 0
    spoofing: bool = False
    vlan: int = 0
    trunk: tuple[int, ...] = ()
    isolated: bool = False
    rate: int = 0
    dhcp: bool = True
    forwards: tuple[PortForward, ...] = ()


def check_name(text: str) -> str:
    """*text*, if it can name a switch; :class:`HvHostError` otherwise."""
    if not _NAME.fullmatch(text):
        raise HvHostError(f"{text!r} is no name; use letters, digits, '.', '_', '-'.")
    return text


def new_mac() -> str:
    """A random address of Hyper-V's."""
    return ":".join([HYPERV_OUI, *(f"{byte:02x}" for byte in os.urandom(3))])


def parse_forward(text: str) -> PortForward:
    """``[tcp:|udp:]HOST:GUEST``, or one number for both."""
    kind, _, rest = text.partition(":")
    udp = kind == "udp"
    host, _, guest = (rest if kind in ("tcp", "udp") else text).partition(":")
    guest = guest or host
    if not (host.isdecimal() and guest.isdecimal()):
        raise HvHostError(f"{text!r} is no port forward; write one like 2222:22 or udp:5353:53.")
    ports = int(host), int(guest)
    if not all(0 < port < 65536 for port in ports):
        raise HvHostError(f"{text!r} names a port that does not exist; ports are 1 to 65535.")
    return PortForward(*ports, udp)


def parse_vlans(text: str) -> tuple[int, ...]:
    """``10+20-22``: the VLANs 10, 20, 21 and 22."""
    vlans: set[int] = set()
    for part in text.split("+"):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()):
            raise HvHostError(f"{text!r} is no list of VLANs; write one like 10+20-29.")
        if int(first) > int(last):
            raise HvHostError(f"{part!r} is no range of VLANs; write it {last}-{first}.")
        vlans.update(_vlan(first, number) for number in range(int(first), int(last) + 1))
    return tuple(sorted(vlans))


def _vlan(text: str, number: int) -> int:
    if not 0 < number < 4095:
        raise HvHostError(f"VLAN {text!r} does not exist; VLANs are 1 to 4094.")
    return number


def _number(key: str, text: str, limit: int) -> int:
    if not text.isdecimal() or not 0 < int(text) <= limit:
        raise HvHostError(f"{key}={text!r} is wrong; give a number from 1 to {limit}.")
    return int(text)


#: What an option goes with, of those that do not go with everything: an adapter's …
_ADAPTER_PLUGS: Final[dict[str, tuple[Uplink, ...]]] = {
    "address": (Uplink.HOST_ONLY,),
    "dhcp": (Uplink.HOST_ONLY,),
    "forward": (Uplink.NAT,),
    **dict.fromkeys(("vlan", "trunk", "isolated", "rate"), (Uplink.SWITCH,)),
}
#: … and those of a switch's uplink, which is a port like others. NAT knows no tags.
_UPLINK_PLUGS: Final[dict[str, tuple[Uplink, ...]]] = {
    "address": (Uplink.NAT, Uplink.HOST_ONLY),
    "dhcp": (Uplink.HOST_ONLY,),
    "forward": (Uplink.NAT,),
    "trunk": (Uplink.HOST_ONLY, Uplink.TAP),
    **dict.fromkeys(("vlan", "isolated", "rate"), (Uplink.NAT, Uplink.HOST_ONLY, Uplink.TAP)),
    **dict.fromkeys(("mac", "name", "queues", "spoofing"), ()),
}


def parse_adapter(text: str, *, name: str, forwards: tuple[PortForward, ...] = ()) -> AdapterConfig:
    """The adapter that ``UPLINK[:TARGET][,KEY=VALUE…]`` describes; it gets a MAC if it names none.

    :class:`HvHostError` for what it does not understand, and for what would have no effect.
    """
    uplink, target, values = _plug("--nic", text, tuple(Uplink), _ADAPTER_PLUGS)
    forwards += values.pop("forwards", ())
    named = {"name": name, "mac": new_mac(), "forwards": forwards, **values}
    return AdapterConfig(**named, uplink=uplink, target=target)


def parse_uplink(text: str) -> AdapterConfig | None:
    """What a switch is plugged into, described as an adapter is; ``None`` for nothing.

    ``vlan``, ``trunk``, ``isolated`` and ``rate`` are those of the switch's port there.
    """
    plugs = tuple(each for each in Uplink if each is not Uplink.SWITCH)
    uplink, target, values = _plug("--uplink", text, plugs, _UPLINK_PLUGS)
    if uplink is Uplink.NONE:
        return None
    return AdapterConfig(name="uplink", mac=new_mac(), uplink=uplink, target=target, **values)


def _plug(
    option: str, text: str, plugs: tuple[Uplink, ...], fitting: dict[str, tuple[Uplink, ...]]
) -> tuple[Uplink, str, dict[str, Any]]:
    """What is plugged into what, and the settings that the options are."""
    first, *options = text.split(",")
    word, _, target = first.partition(":")
    if word not in plugs:
        raise HvHostError(
            f"{word!r} is nothing for {option} to plug into; use one of {', '.join(plugs)}."
        )
    uplink = Uplink(word)
    if (uplink in (Uplink.TAP, Uplink.SWITCH)) != bool(target):
        wanted = "no name" if target else f"a name, like {word}:NAME"
        raise HvHostError(f"{option} {word} takes {wanted}.")
    if target and not _NAME.fullmatch(target):
        raise HvHostError(f"{target!r} cannot be the name of a {word}.")
    if uplink is Uplink.TAP and len(target) > DEVICE_NAME_LIMIT:
        raise HvHostError(
            f"{target!r} is too long for a tap device's name; it has at most {DEVICE_NAME_LIMIT} "
            "characters."
        )
    values: dict[str, Any] = {}
    for each in options:
        key, _, value = each.partition("=")
        found = _option(option, key, value)
        fits = fitting.get(key, plugs)
        if uplink not in fits:
            instead = f", or use {' or '.join(fits)}" if fits else ""
            raise HvHostError(f"{key} means nothing with {option} {word}; leave it out{instead}.")
        values.update(found)
    return uplink, target, values


def check_adapters(adapters: Iterable[AdapterConfig]) -> None:
    """Refuse adapters that one machine cannot have, each for itself or together."""
    names: set[str] = set()
    owners: dict[str, str] = {}
    for each in adapters:
        if each.name in names:
            raise HvHostError(f"there is a network adapter {each.name!r} already.")
        if each.mac in owners:
            raise HvHostError(f"{each.mac} is the address of {owners[each.mac]!r} already.")
        if len(names) == MAXIMUM_ADAPTERS:
            raise HvHostError(f"a machine has at most {MAXIMUM_ADAPTERS} network adapters.")
        if each.uplink is not Uplink.SWITCH and (
            each.vlan or each.trunk or each.isolated or each.rate
        ):
            raise HvHostError("vlan, trunk, isolated and rate are for ports of a switch.")
        names.add(each.name)
        owners[each.mac] = each.name


def parse_adapters(nics: Sequence[str], forwards: Sequence[str]) -> tuple[AdapterConfig, ...]:
    """The adapters of ``--nic`` and ``-p`` options, net0, net1…; ports lead to the first nat."""
    ports = tuple(parse_forward(text) for text in forwards)
    if ports and not any(text.startswith(Uplink.NAT) for text in nics):
        nics = [*nics, Uplink.NAT]
    adapters = []
    for number, text in enumerate(nics):
        mine = ports if text.startswith(Uplink.NAT) else ()
        adapters.append(parse_adapter(text, name=f"net{number}", forwards=mine))
        ports = () if mine else ports
    check_adapters(adapters)
    return tuple(adapters)


def _option(option: str, key: str, value: str) -> dict[str, Any]:
    if key == "mac":
        mac = value.lower().replace("-", ":")
        if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
            raise HvHostError(f"mac={value!r} is no address of an adapter, like 00:15:5d:01:02:03.")
        return {"mac": mac}
    if key == "name":
        return {"name": check_name(value)}
    if key == "address":
        from hvhost.network.addresses import interface

        for each in value.split("+"):
            interface(each)
        return {"address": value}
    if key == "queues":
        return {"queues": _number(key, value, MAXIMUM_QUEUES)}
    if key == "vlan":
        return {"vlan": _number(key, value, 4094)}
    if key == "trunk":
        return {"trunk": parse_vlans(value)}
    if key == "rate":
        return {"rate": _number(key, value, 1_000_000)}
    if key == "forward":
        return {"forwards": tuple(parse_forward(part) for part in value.split("+"))}
    if key in ("spoofing", "isolated", "dhcp") and value in ("", "on", "off"):
        return {key: value != "off"}
    raise HvHostError(
        f"{option} has no option {key!r}; there are mac, name, address, queues, forward, vlan, "
        "trunk, rate, dhcp, spoofing and isolated."
    )
