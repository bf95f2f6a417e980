"""What an adapter lets out of a guest, and what it lets in: the spoofing guard, and filters.

At the other end is this computer's kernel, in a namespace whose tap is plugged into the same
switch: it is asked what came. In the guest, the kernel's own tracepoint tells of each frame that
its driver handed up; frames of one kind all have one length, which no others have.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from guest.helpers import Guest, hvhost, tell, wait_for
from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.network import switch_client
from hvhost.network.config import new_mac
from hvhost.network.namespace import open_namespace
from hvhost.network.report import AdapterInfo
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.wire import Witness, interface_of

NAME = "talker"
ADAPTER = "net0"
THERE4, HERE4 = "10.10.0.1", "10.10.0.2"
THERE6, HERE6 = "fd77::1", "fd77::12:3456"
EVERYBODY = "ff:ff:ff:ff:ff:ff"
SOMEBODY_ELSE = "00:15:5d:99:99:99"
#: The solicited-node group of the guest's address (RFC 4291, 2.7.1), and one that it is not in.
JOINED, NOT_JOINED = "33:33:ff:12:34:56", "33:33:ff:65:43:21"
FRAMES = 5
TRACE = "/tmp/tracing"
EVENT = f"{TRACE}/events/net/netif_receive_skb/enable"
#: An EtherType for experiments (IEEE 802, clause 9.2.4): no protocol of either kernel answers.
ETHERTYPE = "88b5"
_lengths = itertools.count(200)

pytestmark = [
    only_in_matrix("a guest to boot"),
    pytest.mark.timeout(900),
]


def made(to: str, source: str, length: int) -> str:
    """A frame in hexadecimal digits with *length* bytes behind its header."""
    return (to + source).replace(":", "") + ETHERTYPE + "00" * length


@dataclass(frozen=True, slots=True)
class Lan:
    """A switch, and somebody on it."""

    switch: str
    somebody: Witness


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    name = f"lan-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        switch_client.start(SwitchConfig(name, None))
        stack.callback(switch_client.stop, name)
        namespace = open_namespace([("tap0", f"{THERE4}/24+{THERE6}/64")])
        stack.callback(namespace.close)
        switch_client.attach(name, Hello("tap", "somebody"), namespace.descriptors[0])
        yield Lan(name, Witness(namespace.pid))


@pytest.fixture(scope="module")
def guest(images: GuestImages) -> Iterator[Guest]:
    started = Guest.start(images, name=NAME)
    try:
        started.run(f"mkdir -p {TRACE}; mount -t tracefs tracefs {TRACE}; echo 1 > {EVENT}")
        yield started
    finally:
        tell(started.machine)
        started.machine.kill()


class Nic:
    """An adapter of the guest on the switch."""

    def __init__(self, guest: Guest, lan: Lan, mac: str) -> None:
        self.guest, self.lan, self.mac = guest, lan, mac
        wait_for("the interface", lambda: interface_of(guest.probe, mac), 120.0)
        self.interface = interface_of(guest.probe, mac)
        self.run(f"ip link set $I up; ip address add {HERE4}/24 dev $I")
        self.await_ping()

    def run(self, script: str) -> str:
        return self.guest.run(f"I={self.interface}; {script}", 60.0)

    @property
    def address(self) -> str:
        """What the guest takes for its own."""
        return self.run("cat /sys/class/net/$I/address").strip()

    @property
    def sent(self) -> int:
        """Frames that the guest has sent, as it says."""
        return int(self.run("cat /sys/class/net/$I/statistics/tx_packets"))

    def info(self) -> AdapterInfo:
        """What people are told by the command line."""
        told = hvhost("net", "adapters", NAME, "--json", timeout=300.0)
        assert told.returncode == 0, told.stderr
        (found,) = json.loads(told.stdout)
        return AdapterInfo(**found)

    def answers(self, address: str = HERE4) -> bool:
        """Whether the guest answers somebody on the switch."""
        return bool(self.lan.somebody.do("ping", to=address, timeout=5.0)["answers"])

    def await_ping(self) -> None:
        wait_for("an answer", self.answers, 90.0)

    def send(self, source: str, to: str) -> int:
        """Frames from the guest, as if from *source*, that somebody on the switch hears."""
        watcher = self.lan.somebody.begin("watch", interface="tap0", seconds=90, sender=source)
        before = self.sent
        frame = made(to, source, 60)
        self.run(f"for i in $(seq {FRAMES}); do hvhost-frame $I {frame} || exit 1; done")
        self.await_ping()  # comes behind them
        assert self.sent - before >= FRAMES, "the guest has let go of them"
        heard: int = watcher.result()["frames"]
        return heard

    def inject(self, to: str) -> int:
        """Have somebody on the switch send frames to *to*; how many bytes each has inside."""
        length = next(_lengths)
        frame = made(to, "02:00:00:00:00:01", length)
        self.lan.somebody.do("inject", interface="tap0", frame=frame, count=FRAMES)
        return length

    def got(self, length: int) -> int:
        """Frames of so many bytes that the guest's kernel has got from its driver."""
        line = f"dev=$I .*len={length}\\( \\|$\\)"  # the newest kernels go on behind it
        return int(self.run(f'grep -c "{line}" {TRACE}/trace || true'))

    def gets(self, to: str) -> int:
        """How many of the frames that somebody sends to *to* get into the guest."""
        length = self.inject(to)
        self.await_ping()  # comes behind them
        return self.got(length)


@contextlib.contextmanager
def plugged(guest: Guest, lan: Lan, *options: str) -> Iterator[Nic]:
    mac = new_mac()
    guest.machine.network.add(",".join([f"switch:{lan.switch}", f"mac={mac}", *options]), ADAPTER)
    try:
        yield Nic(guest, lan, mac)
    finally:
        guest.machine.network.remove(ADAPTER)
        adapters = "/sys/class/net/eth*/address"
        wait_for("the adapter's end", lambda: not guest.probe.read_all(adapters), 60.0)


def change_address(nic: Nic, mac: str) -> str:
    """Have the guest take another address; what it says of it."""
    return nic.run(f"ip link set $I down; ip link set $I address {mac} 2>&1; ip link set $I up")


def test_a_guest_keeps_its_address_and_sends_from_no_other(guest: Guest, lan: Lan) -> None:
    other = new_mac()
    with plugged(guest, lan) as nic:
        assert "Input/output error" in change_address(nic, other)
        assert nic.address == nic.mac
        nic.await_ping()
        assert nic.info().spoofed == 0
        assert nic.send(nic.mac, EVERYBODY) >= FRAMES
        assert nic.send(other, EVERYBODY) == 0
        assert nic.info().spoofed == FRAMES
        ports = switch_client.info(lan.switch)["ports"]
        known = [mac for port in ports for mac in port["addresses"]]
        assert nic.mac in known and other not in known


def test_a_guest_that_may_spoof_changes_its_address_and_sends_from_any(
    guest: Guest, lan: Lan
) -> None:
    other, third = new_mac(), new_mac()
    with plugged(guest, lan, "spoofing") as nic:
        assert change_address(nic, other) == ""
        assert nic.address == other
        lan.somebody.command("ip", "neighbour", "flush", "dev", "tap0")
        nic.await_ping()
        heard = lan.somebody.command("ip", "neighbour", "show", HERE4)
        assert other in heard, "who is on the switch speaks to the new address"
        assert nic.send(other, EVERYBODY) >= FRAMES
        assert nic.send(third, EVERYBODY) == FRAMES
        assert (nic.gets(other), nic.gets(nic.mac)) == (FRAMES, 0), "the old one is nobody's"
        told = nic.info()
        assert (told.mac, told.current_mac, told.spoofed) == (nic.mac, other, 0)


def test_a_guest_gets_what_it_asks_for(guest: Guest, lan: Lan) -> None:
    """Linux asks for all groups as soon as it is in one (``rndis_set_multicast``)."""
    with plugged(guest, lan) as nic:
        assert nic.gets(nic.mac) == FRAMES
        assert nic.gets(EVERYBODY) == FRAMES
        filtered = nic.info().filtered
        assert nic.gets(SOMEBODY_ELSE) == 0
        assert nic.info().filtered - filtered >= FRAMES

        nic.run("echo 0 > /proc/sys/net/ipv6/conf/$I/accept_dad")
        nic.run(f"ip address add {HERE6}/64 dev $I")
        groups = nic.run("cat /proc/net/dev_mcast")
        assert JOINED.replace(":", "") in groups and NOT_JOINED.replace(":", "") not in groups
        counted = int(nic.run("cat /sys/class/net/$I/statistics/multicast"))
        assert nic.gets(JOINED) == FRAMES
        assert int(nic.run("cat /sys/class/net/$I/statistics/multicast")) - counted >= FRAMES
        assert nic.answers(HERE6), "a neighbour is asked for by its group"
        assert nic.gets(NOT_JOINED) == FRAMES
        assert nic.gets(SOMEBODY_ELSE) == 0

        # The driver tells the host from a work queue: it is not so at once.
        nic.run("ip link set $I promisc on")
        wait_for("everything", lambda: nic.gets(SOMEBODY_ELSE) == FRAMES, 60.0)
        assert [nic.gets(to) for to in (nic.mac, EVERYBODY, JOINED, NOT_JOINED)] == 4 * [FRAMES]
        nic.run("ip link set $I promisc off")
        wait_for("not everything", lambda: nic.gets(SOMEBODY_ELSE) == 0, 60.0)
        assert [nic.gets(to) for to in (nic.mac, EVERYBODY, JOINED)] == 3 * [FRAMES]


def test_what_came_while_nobody_listened_is_lost(guest: Guest, lan: Lan) -> None:
    with plugged(guest, lan) as nic:
        assert nic.gets(nic.mac) == FRAMES, "else the rest says nothing"
        nic.run("ip link set $I down")
        to_nobody = [nic.inject(nic.mac), nic.inject(EVERYBODY)]
        nic.run("ip link set $I up")
        nic.await_ping()
        assert [nic.got(length) for length in to_nobody] == [0, 0]
        guest.machine.network.set_link(ADAPTER, False)
        to_nobody = [nic.inject(nic.mac), nic.inject(EVERYBODY)]
        guest.machine.network.set_link(ADAPTER, True)
        nic.await_ping()
        assert [nic.got(length) for length in to_nobody] == [0, 0]
