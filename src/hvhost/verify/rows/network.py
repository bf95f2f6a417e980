"""``network`` and ``jumbo-frames``: an adapter comes, works, loses its link, and goes.

The other end of the cable is this computer's kernel in a network namespace of its own: its ping,
its TCP, its neighbour table and its counters are what the guest's are held against.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import statistics
import time
from collections.abc import Iterator

from hvhost.errors import HvHostError
from hvhost.network.config import new_mac
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session
from hvhost.verify.wire import (
    GUEST4,
    GUEST6,
    HOST4,
    HOST6,
    Cable,
    cable,
    find_interface,
    interface_of,
)

TRANSFER = 8 << 20
PINGS = 20
JUMBO_MTUS = (9000, 16000)
#: Of ``netvsc_stats`` in the driver's source, what no healthy adapter counts.
_ERRORS = ("tx_too_big", "rx_no_memory", "vlan_error")
_LEASE = "192.168.77.50"
_DHCP_SCRIPT = (
    "printf '#!/bin/sh\\n[ \"$1\" = bound ] && ip addr add $ip/24 dev $interface\\ntrue\\n' "
    "> /tmp/dhcp.sh; chmod 755 /tmp/dhcp.sh"
)


def _rate(result: dict[str, float]) -> str:
    return f"{result['size'] / result['seconds'] / (1 << 20):.1f} MiB/s"


def _dhcp(wire: Cable) -> Iterator[str]:
    wire.session.step("asking for an address by DHCP")
    server = wire.witness.begin("dhcp", interface="tap0", server=HOST4, offer=_LEASE)
    wire.guest(f"ip link set $I up; {_DHCP_SCRIPT}")
    wire.guest("udhcpc -i $I -n -q -t 10 -T 1 -s /tmp/dhcp.sh")
    leased = server.result()
    if leased["client"] != wire.info.mac:
        raise RowFailed(f"the DHCP request came from {leased['client']}, not {wire.info.mac}")
    answers = wire.witness.do("ping", to=_LEASE)["answers"]
    if not answers:
        raise RowFailed(f"the guest leased {_LEASE} and does not answer there")
    yield f"DHCP: {leased['client']} leased {_LEASE}, and answers the host's kernel there"


def _pings(wire: Cable) -> Iterator[str]:
    wire.session.step("pinging, both families")
    times = []
    for address in (GUEST4, GUEST6):
        result = wire.witness.do("ping", to=address, count=PINGS)
        if result["answers"] != PINGS:
            raise RowFailed(f"of {PINGS} pings to {address}, {result['answers']} were answered")
        times.append(f"{statistics.median(result['seconds']) * 1e6:.0f} us")
    wire.guest(f"ping -q -c 3 {HOST4}; ping -q -c 3 {HOST6}")
    yield (
        f"ping: host to guest {PINGS} of {PINGS}, IPv4 median {times[0]}, IPv6 {times[1]}; and "
        "from the guest"
    )


def _tcp(wire: Cable) -> Iterator[str]:
    wire.session.step("moving data, both ways and both families")
    figures = []
    for ipv6 in (False, True):
        out = wire.transfer_out(TRANSFER, ipv6=ipv6)
        back = wire.transfer_in(TRANSFER, ipv6=ipv6)
        figures.append(f"IPv{6 if ipv6 else 4} {_rate(out)} out, {_rate(back)} in")
    yield f"TCP: {TRANSFER >> 20} MiB each way whole by sha256; {'; '.join(figures)}"


def _statistics(wire: Cable) -> Iterator[str]:
    """The guest's counters and those of the kernel at the other end of the cable."""
    wire.session.step("comparing counters")
    guest = wire.probe.read_all(f"/sys/class/net/{wire.interface}/statistics/*_bytes")
    ours = {path.rpartition("/")[2]: int(text) for path, text in guest.items()}
    sent, received = wire.witness.counter("tx_bytes"), wire.witness.counter("rx_bytes")
    for name, mine, theirs in (
        ("received", ours["rx_bytes"], sent),
        ("sent", ours["tx_bytes"], received),
    ):
        if abs(mine - theirs) > max(mine, theirs) // 50:
            raise RowFailed(f"the guest {name} {mine} bytes, the other end says {theirs}")
    yield (
        f"counters: guest received {ours['rx_bytes']} bytes of {sent} the host's kernel sent, "
        f"sent {ours['tx_bytes']} of {received} it received"
    )
    queues = check_queues(wire.ethtool("-S"), ours["rx_bytes"], ours["tx_bytes"])
    yield f"ethtool -S: the same bytes in {queues} queues, and none of the driver's errors"


def check_queues(text: str, received: int, sent: int) -> int:
    """Whether ``ethtool -S`` adds up to the interface's bytes, shortly after; how many queues."""
    counters = {name: int(value) for name, value in re.findall(r"^\s*(\w+): (\d+)$", text, re.M)}
    for direction, whole in (("rx", received), ("tx", sent)):
        queues = [
            value
            for name, value in counters.items()
            if re.fullmatch(rf"{direction}_queue_\d+_bytes", name)
        ]
        if not queues:
            raise RowFailed(f"ethtool -S names no {direction} queue", text.splitlines())
        if abs(sum(queues) - whole) > max(whole, sum(queues)) // 50:
            raise RowFailed(
                f"the guest's {direction} queues have {sum(queues)} bytes, its interface {whole}",
                text.splitlines(),
            )
    if errors := {name: counters[name] for name in _ERRORS if counters.get(name)}:
        raise RowFailed(f"ethtool -S counts errors: {errors}", text.splitlines())
    return len(queues)


def _carrier(wire: Cable, wanted: str) -> None:
    deadline = time.monotonic() + wire.session.timing.event
    while wire.probe.read(f"/sys/class/net/{wire.interface}/carrier").strip() != wanted:
        if time.monotonic() > deadline:
            raise RowFailed(f"the guest's carrier did not become {wanted}")
        time.sleep(wire.session.timing.poll)


def _link(wire: Cable) -> Iterator[str]:
    wire.session.await_ticks(wire.probe)
    wire.session.step("pulling the cable")
    network = wire.session.machine.network
    network.set_link("verify0", False)
    _carrier(wire, "0")
    if wire.witness.do("ping", to=GUEST4, timeout=1.0)["answers"]:
        raise RowFailed("the guest answers although its cable is pulled")
    network.set_link("verify0", True)
    _carrier(wire, "1")
    wire.await_ping()
    yield "link: carrier 0 and silence with the cable pulled, carrier 1 and answers again"


def _mac(wire: Cable) -> Iterator[str]:
    wire.session.step("changing the address of the adapter")
    mac = new_mac()
    wire.guest(f"ip link set $I down; ip link set $I address {mac}; ip link set $I up")
    wire.guest(f"ip addr add {GUEST6}/64 dev $I 2>/dev/null || true")
    wire.witness.command("ip", "neighbor", "flush", "dev", "tap0")
    wire.await_ping()
    heard = wire.witness.command("ip", "neighbor", "show", GUEST4)
    if mac not in heard:
        raise RowFailed(f"the guest's address is {mac}, the host's kernel knows {heard.strip()}")
    yield f"MAC: changed in the guest to {mac}, which is what the host's kernel talks to"


def _nat(session: Session) -> Iterator[str]:
    if shutil.which("passt") is None:
        yield "nat: not tried, this computer has no passt"
        return
    session.step("reaching the guest through nat")
    probe, network, mac = session.running(), session.machine.network, new_mac()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        network.add(f"nat,mac={mac},forward={port}:22", "verify1")
    except HvHostError as error:
        yield f"nat: not tried, {error}"
        return
    try:
        interface = find_interface(session, probe, mac)
        run(probe, f"ip link set {interface} up; {_DHCP_SCRIPT}")
        run(probe, f"udhcpc -i {interface} -n -q -t 10 -T 1 -s /tmp/dhcp.sh")
        address = run(probe, f"ip -o -4 addr show {interface}").split()[3]
        _forwarded(session, probe, port)
    finally:
        network.remove("verify1")
    yield (
        f"nat: passt leased {address} to the guest; port {port} of this computer leads to its port "
        "22, both ways"
    )


def _forwarded(session: Session, probe: Probe, port: int) -> None:
    """A connection to a port of this computer is one to the guest's."""
    run(
        probe,
        "rm -f /tmp/in /tmp/done; (echo from the guest | nc -l -p 22 > /tmp/in; touch /tmp/done) "
        "> /dev/null 2>&1 &",
    )
    answer = b""
    deadline = time.monotonic() + session.timing.event
    while not answer:  # passt takes the connection before the guest listens
        if time.monotonic() > deadline:
            raise RowFailed(f"nobody in the guest answers at port {port} of this computer")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.settimeout(5)
            sock.sendall(b"from the host\n")
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(100):
                answer += data
    got = run(
        probe,
        "for i in $(seq 100); do [ -e /tmp/done ] && break; usleep 50000; done; cat /tmp/in",
    )
    if (answer, got) != (b"from the guest\n", "from the host"):
        raise RowFailed(f"through the forwarded port came {answer!r}, and {got!r} to the guest")


def prove(session: Session) -> Iterator[str]:
    """Hot-added; DHCP, ping and TCP, IPv4 and IPv6, both ways; link, MAC, counters; removed."""
    probe = session.running()
    with cable(session, ["spoofing"], configure=False) as wire:
        yield from _dhcp(wire)
        wire.configure()
        yield from _pings(wire)
        yield from _tcp(wire)
        yield from _statistics(wire)
        yield from _link(wire)
        yield from _mac(wire)
        mac = probe.read(f"/sys/class/net/{wire.interface}/address").strip()
    deadline = time.monotonic() + session.timing.event
    while (left := interface_of(probe, mac)) is not None:
        if time.monotonic() > deadline:
            raise RowFailed(f"the adapter was taken away, the guest still has {left}")
        time.sleep(session.timing.poll)
    yield "removed: the interface is gone from the guest"
    yield from _nat(session)
    yield "hot-added, DHCP, ping and TCP both ways and both families, link, MAC, hot-removed"


def prove_jumbo(session: Session) -> Iterator[str]:
    """Echoes of 9,000 and 16,000 byte packets both ways, which nobody fragmented."""
    with cable(session) as wire:
        for mtu in JUMBO_MTUS:
            session.step(f"setting the MTU to {mtu}")
            wire.guest(f"ip link set $I mtu {mtu}")
            wire.witness.command("ip", "link", "set", "tap0", "mtu", str(mtu))
            wire.await_ping()
            size = mtu - 28
            watcher = wire.witness.begin("watch", interface="tap0", seconds=60)
            result = wire.witness.do("ping", to=GUEST4, size=size, count=5)
            wire.guest(f"ping -c 5 -s {size} {HOST4}")
            seen = watcher.result()
            if result["answers"] != 5:
                raise RowFailed(f"of 5 pings of {size} bytes, {result['answers']} were answered")
            if seen["largest"] != mtu or seen["fragments"]:
                raise RowFailed(
                    f"with an MTU of {mtu}, the host's kernel saw packets of {seen['largest']} "
                    f"bytes at most, and {seen['fragments']} fragments"
                )
            six = wire.witness.do("ping", to=GUEST6, size=mtu - 48)
            if not six["answers"]:
                raise RowFailed(f"an IPv6 ping of {mtu} bytes was not answered")
            yield (
                f"MTU {mtu}: 5 of 5 each way with {size} bytes; the host's kernel saw packets of "
                f"{seen['largest']} bytes from the guest, {seen['fragments']} fragments; IPv6 too"
            )
    yield f"unfragmented pings of {' and '.join(map(str, JUMBO_MTUS))} bytes both ways"
