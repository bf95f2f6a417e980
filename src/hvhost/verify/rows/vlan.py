"""``vlan``: a switch, access and trunk ports, and three kernels to witness who reaches whom.

Each witness is a network namespace whose tap is plugged into a port of the switch. What is heard
with a tag, is heard by that kernel's AF_PACKET socket on a trunk port.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.network import switch_client
from hvhost.network.config import new_mac
from hvhost.network.namespace import Namespace, open_namespace
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.guest import HostLacks, Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session
from hvhost.verify.wire import Witness, find_interface

TEN, TWENTY, THIRTY = "10.10.0", "10.20.0", "10.30.0"
#: What the guest is told to give its frames of VLAN 20: IEEE 802.1p's class for video.
_PRIORITY = 5


@dataclass(frozen=True, slots=True)
class _Room:
    """The switch and the witnesses around it."""

    switch: str
    ten: Witness
    twenty: Witness
    trunk: Witness


@contextlib.contextmanager
def _room() -> Iterator[_Room]:
    name = f"verify-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        switch_client.start(SwitchConfig(name, None))
        stack.callback(switch_client.stop, name)

        def witness(hello: Hello, *addresses: str) -> Witness:
            try:
                namespace: Namespace = open_namespace([("tap0", "+".join(addresses))])
            except HvHostError as error:
                raise HostLacks(str(error)) from error
            stack.callback(namespace.close)
            switch_client.attach(name, hello, namespace.descriptors[0])
            return Witness(namespace.pid)

        yield _Room(
            name,
            witness(Hello("tap", "ten", vlan=10), f"{TEN}.1/24"),
            # In both networks: what keeps it out of the first can only be the switch.
            witness(Hello("tap", "twenty", vlan=20), f"{TWENTY}.1/24", f"{TEN}.9/24"),
            witness(Hello("tap", "trunk", trunk=(10, 20, 30)), f"{THIRTY}.1/24"),
        )


def _reaches(probe: Probe, address: str) -> bool:
    result = probe.run(["ping", "-q", "-c", "2", "-W", "2", address], 20.0)
    return result.status == 0


def _expect(probe: Probe, address: str, wanted: bool, what: str) -> None:
    if _reaches(probe, address) is not wanted:
        raise RowFailed(f"{what} {'does not reach' if wanted else 'reaches'} {address}")


@contextlib.contextmanager
def _plugged(session: Session, probe: Probe, nic: str) -> Iterator[tuple[str, str]]:
    """An adapter; the name of the guest's interface, which is up, and its address."""
    mac = new_mac()
    session.machine.network.add(f"{nic},mac={mac}", "verify0")
    try:
        interface = find_interface(session, probe, mac)
        run(probe, f"ip link set {interface} up")
        yield interface, mac
    finally:
        with contextlib.suppress(HvHostError):
            session.machine.network.remove("verify0")


def _access(session: Session, probe: Probe, room: _Room) -> Iterator[str]:
    session.step("an access port: the switch tags")
    with _plugged(session, probe, f"switch:{room.switch},vlan=10") as (interface, mac):
        run(
            probe,
            f"ip addr add {TEN}.2/24 dev {interface}; ip addr add {TWENTY}.2/24 dev {interface}",
        )
        watcher = room.trunk.begin("watch", interface="tap0", seconds=60, sender=mac)
        _expect(probe, f"{TEN}.1", True, "the guest on access VLAN 10")
        _expect(probe, f"{TEN}.9", False, "the guest on access VLAN 10")
        _expect(probe, f"{TWENTY}.1", False, "the guest on access VLAN 10")
        seen = watcher.result()
        if set(seen["tags"]) != {"10"}:
            raise RowFailed(f"on the trunk, the guest's frames have tags {seen['tags']}")
    yield (
        "access port, VLAN 10: reaches the peer of VLAN 10, not those of VLAN 20, of which one has "
        f"an address of the same network; on the trunk {seen['tags']['10']} of its frames were "
        "heard, all tagged 10"
    )


def _trunk(session: Session, probe: Probe, room: _Room) -> Iterator[str]:
    session.step("a trunk port: the guest tags")
    nic = f"switch:{room.switch},trunk=10+20,vlan=10"
    with _plugged(session, probe, f"switch:{room.switch},trunk=10+20+40") as (interface, mac):
        for vlan, net in ((10, TEN), (20, TWENTY), (30, THIRTY)):
            run(
                probe,
                f"modprobe -q 8021q; vconfig add {interface} {vlan} > /dev/null; "
                f"ip link set {interface}.{vlan} up; ip addr add {net}.2/24 dev {interface}.{vlan}",
            )
        _expect(probe, f"{TEN}.1", True, "VLAN interface 10 on the trunk")
        _expect(probe, f"{TEN}.9", False, "VLAN interface 10 on the trunk")
        _expect(probe, f"{TWENTY}.1", True, "VLAN interface 20 on the trunk")
        watcher = room.trunk.begin("watch", interface="tap0", seconds=60, sender=mac)
        run(
            probe,
            f"vconfig set_egress_map {interface}.20 0 {_PRIORITY} > /dev/null; "
            f"arping -q -c 2 -I {interface}.20 {TWENTY}.7 || true",
        )
        _expect(probe, f"{THIRTY}.1", False, "VLAN interface 30, which the port does not allow,")
        seen = watcher.result()
        if "20" not in seen["tags"] or "30" in seen["tags"]:
            raise RowFailed(f"on the other trunk port, tags {seen['tags']} were heard")
        if _PRIORITY not in seen["priorities"]["20"]:
            raise RowFailed(
                f"the guest gave its frames of VLAN 20 priority {_PRIORITY}, on the other trunk "
                f"port they had {seen['priorities']['20']}"
            )
        offload = run(probe, f"ethtool -k {interface} | grep vlan-offload")
        for vlan in (10, 20, 30):
            run(probe, f"vconfig rem {interface}.{vlan} > /dev/null")
    yield (
        "trunk port 10, 20: VLAN interfaces of the guest reach the peer of their own VLAN only; "
        f"the other trunk port heard tags {', '.join(seen['tags'])}, never 30, which is not in "
        f"the list, and in VLAN 20 priority {_PRIORITY} as the guest was told to give "
        f"({' '.join(offload.split())})"
    )
    with _plugged(session, probe, nic) as (interface, _):
        run(probe, f"ip addr add {TEN}.2/24 dev {interface}")
        _expect(probe, f"{TEN}.1", True, "untagged traffic of a trunk port with native VLAN 10")
    yield "native VLAN 10 of a trunk port: untagged, reaches the peer of VLAN 10"


def _isolated(session: Session, probe: Probe, room: _Room) -> Iterator[str]:
    session.step("isolated ports")
    with contextlib.ExitStack() as stack:
        namespace = open_namespace([("tap0", f"{TEN}.8/24")])
        stack.callback(namespace.close)
        hello = Hello("tap", "alone", vlan=10, isolated=True)
        switch_client.attach(room.switch, hello, namespace.descriptors[0])
        nic = f"switch:{room.switch},vlan=10,isolated"
        interface, _ = stack.enter_context(_plugged(session, probe, nic))
        run(probe, f"ip addr add {TEN}.2/24 dev {interface}")
        _expect(probe, f"{TEN}.1", True, "the guest on an isolated port")
        _expect(probe, f"{TEN}.8", False, "the guest on an isolated port")
    yield "isolated port: reaches the others of VLAN 10, not another isolated one"


def prove(session: Session) -> Iterator[str]:
    """Access, trunk, native and isolated ports: the guest reaches only peers of its VLAN."""
    probe = session.running()
    session.step("building a switch with three witnesses")
    with _room() as room:
        yield from _access(session, probe, room)
        yield from _trunk(session, probe, room)
        yield from _isolated(session, probe, room)
    yield "access and trunk ports, native VLAN, isolation: each reaches only its own VLAN"
