"""``static-ip``: addresses set from the host, configured by the guest's own ``hv_kvp_daemon``.

Witnesses: the guest's ``ip`` and ``resolvectl``, the file that its daemon wrote for the script
``hv_set_ifconfig``, and the kernel at the other end of the cable, which reaches the guest at the
new addresses, through the gateway too, and no longer at those that were taken away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from hvhost.network.addresses import Addresses
from hvhost.verify.guest import RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session
from hvhost.verify.wire import GUEST4, GUEST6, HOST4, HOST6, Cable, cable

BEYOND4, BEYOND6 = "198.51.100.1", "2001:db8:77::1"
DNS = ("192.168.77.53", "fd77::53")
LEASE = "192.168.77.50"
OTHER4 = "192.168.77.130"
#: Where ``hv_kvp_daemon`` of Debian keeps what it was told, for the script.
WISH = "/var/lib/hyperv/ifcfg-"
#: The same for NetworkManager, beside it since Linux 6.8: the interface's name goes before.
KEYFILE = "/var/lib/hyperv/{}.nmconnection"
#: The name servers in use, as systemd-resolved lists them; /etc/resolv.conf may name itself alone.
RESOLVER = "/run/systemd/resolve/resolv.conf"
_SECONDS = 45.0
DHCP_SECONDS = 60.0
LINGER_SECONDS = 12.0
PING_SECONDS = 2.0


def _addresses(wire: Cable) -> set[str]:
    """Addresses with their prefix lengths, without those that every link has."""
    found: list[dict[str, Any]] = json.loads(wire.guest("ip -j addr show dev $I"))
    return {
        f"{each['local']}/{each['prefixlen']}"
        for each in found[0]["addr_info"]
        if each["scope"] == "global"
    }


def _gateways(wire: Cable) -> set[str]:
    routes: list[dict[str, Any]] = []
    for family in ("-4", "-6"):
        routes += json.loads(wire.guest(f"ip -j {family} route show default dev $I") or "[]")
    return {str(each["gateway"]) for each in routes if "gateway" in each}


def _servers(wire: Cable) -> set[str]:
    return set(wire.guest("resolvectl dns $I").partition(":")[2].split())


def _await(session: Session, what: str, seen: Callable[[], object], wanted: object) -> None:
    """Until *seen* gives *wanted*; :class:`RowFailed` says what it gave instead."""
    deadline = time.monotonic() + session.timing.patiently(_SECONDS)
    while (found := seen()) != wanted:
        if time.monotonic() > deadline:
            raise RowFailed(f"the guest's {what} are {found}, not {wanted}")
        time.sleep(session.timing.poll)


def _reached(wire: Cable, address: str) -> bool:
    return bool(wire.witness.do("ping", to=address, timeout=PING_SECONDS)["answers"])


def _await_reached(wire: Cable, address: str) -> None:
    # IPv6 looks first whether anybody else has the address.
    deadline = time.monotonic() + wire.session.timing.event
    while not _reached(wire, address):
        if time.monotonic() > deadline:
            raise RowFailed(
                f"the guest does not answer at {address}, which it was given",
                wire.guest("ip addr show; ip route show table all").splitlines(),
            )


def _await_daemon(session: Session) -> None:
    """Until the guest's daemon has registered, so that settings can be sent."""
    session.step("waiting for the guest's key-value daemon")
    probe = session.running()
    deadline = time.monotonic() + session.timing.boot
    while probe.run(["systemctl", "is-active", "--quiet", "hv-kvp-daemon"], 20.0).status:
        if time.monotonic() > deadline:
            raise RowFailed(
                "hv_kvp_daemon does not run in the guest",
                run(probe, "systemctl status hv-kvp-daemon || true").splitlines(),
            )
        time.sleep(1.0)


def _set(wire: Cable, wanted: Addresses) -> None:
    """Have the guest configured, and look in the guest whether it was."""
    session = wire.session
    session.machine.network.set_ip(wire.info.name, wanted)
    _await(session, "addresses", lambda: _addresses(wire), set(wanted.addresses))
    _await(session, "gateways", lambda: _gateways(wire), set(wanted.gateways))
    _await(session, "name servers", lambda: _servers(wire), set(wanted.dns_servers))


def _static(wire: Cable) -> Iterator[str]:
    session, witness = wire.session, wire.witness
    session.step("setting addresses of both families from the host")
    for address, length in ((BEYOND4, 32), (BEYOND6, 128)):
        witness.command("ip", "address", "add", f"{address}/{length}", "dev", "lo")
    _set(wire, Addresses((f"{GUEST4}/24", f"{GUEST6}/64"), (HOST4, HOST6), DNS))
    for address in (GUEST4, GUEST6):
        _await_reached(wire, address)
    for beyond in (BEYOND4, BEYOND6):
        way = wire.guest(f"ip route get {beyond}")
        if f"via {HOST6 if ':' in beyond else HOST4}" not in way:
            raise RowFailed(f"the guest reaches {beyond} not by its gateway: {way}")
        sink = witness.begin("sink", address=beyond, port=5003)
        wire.guest(f"bash -c 'echo across > /dev/tcp/{beyond}/5003'")
        if sink.result()["size"] != len("across\n"):
            raise RowFailed(f"what the guest sent to {beyond} did not arrive")
    resolver = wire.guest(f"cat {RESOLVER}")
    if missing := [each for each in DNS if f"nameserver {each}" not in resolver]:
        raise RowFailed(f"the guest's {RESOLVER} has no {missing}", resolver.splitlines())
    told = wire.guest(f"cat {WISH}$I")
    for line in (f"IPADDR0={GUEST4}", "NETMASK0=255.255.255.0", f"GATEWAY={HOST4}"):
        if line not in told:
            raise RowFailed(f"the daemon's file does not say {line}", told.splitlines())
    keyfile = wire.guest(f"cat {KEYFILE.format('$I')} 2>/dev/null || true")
    for entry in (f"={GUEST4}/24", f"={GUEST6}/64") if keyfile else ():
        if entry not in keyfile:
            raise RowFailed(f"the daemon's keyfile has no address{entry}", keyfile.splitlines())
    yield f"hv_kvp_daemon wrote for hv_set_ifconfig: {', '.join(told.split())}"
    if keyfile:
        yield f"and for NetworkManager: {', '.join(keyfile.split())}"
    yield (
        f"guest: {GUEST4}/24, {GUEST6}/64, gateways {HOST4} and {HOST6}, DNS {' and '.join(DNS)}; "
        "the host's kernel reaches both addresses, the guest what lies behind both gateways"
    )


def _changed(wire: Cable) -> Iterator[str]:
    """Another set in place of the first one: what was taken away is gone."""
    wire.session.step("setting other addresses")
    _set(wire, Addresses((f"{OTHER4}/25",)))
    wire.witness.command("ip", "neighbor", "flush", "dev", "tap0")
    # The guest's network is half of the cable's now: the host needs an address in that half.
    wire.witness.command("ip", "address", "add", "192.168.77.129/25", "dev", "tap0")
    _await_reached(wire, OTHER4)
    if _reached(wire, GUEST4):
        raise RowFailed(f"the guest still answers at {GUEST4}, which was taken away")
    yield f"changed to {OTHER4}/25 alone: it answers there, and no longer at {GUEST4}"


def _dhcp(wire: Cable) -> Iterator[str]:
    wire.session.step("setting it back to DHCP")
    # The script has systemd-networkd read its files anew, and then take up the interface anew.
    server = wire.witness.begin(
        "dhcp",
        interface="tap0",
        server=HOST4,
        offer=LEASE,
        timeout=DHCP_SECONDS,
        linger=LINGER_SECONDS,
    )
    wire.session.machine.network.set_ip(wire.info.name, Addresses())
    leased = server.result()
    if leased["client"] != wire.info.mac:
        raise RowFailed(f"the DHCP request came from {leased['client']}, not {wire.info.mac}")
    _await(wire.session, "addresses", lambda: _addresses(wire), {f"{LEASE}/24"})
    _await_reached(wire, LEASE)
    yield f"DHCP again: it leased {LEASE}, and has no other address left"


def prove(session: Session) -> Iterator[str]:
    """Static addresses of both families, others in their place, then DHCP again."""
    _await_daemon(session)
    with cable(session, configure=False) as wire:
        yield from _static(wire)
        yield from _changed(wire)
        yield from _dhcp(wire)
    yield (
        "IPv4 and IPv6 address, mask, gateway and DNS set from the host, by the guest's own "
        "hv_kvp_daemon; changed; then DHCP again"
    )
