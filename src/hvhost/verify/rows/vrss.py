"""``vrss``: received flows are spread over virtual processors as the guest's table and key say.

The guest's key and table are read by its own ethtool, the hash is computed here after Microsoft's
description, and what arrived where is the guest's count of frames by queue; the processor of each
queue is what its sysfs says of the channel. Flows are TCP's, of both families, each counted apart.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from hvhost.network.toeplitz import toeplitz
from hvhost.verify.contract import HV_NIC_GUID
from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session
from hvhost.verify.wire import GUEST4, GUEST6, HOST4, HOST6, Cable, cable

#: Ports that flows may come from, of each family.
FLOWS = 60
#: Frames that a queue may get besides: both families look for their neighbours meanwhile. A flow
#: in the wrong queue is missing in the right one, whatever the wrong one may get besides.
STRAYS = 4
_FAMILIES = (("IPv4", HOST4, GUEST4), ("IPv6", HOST6, GUEST6))
_OPEN_SECONDS = 10.0
_CHANNEL_FILES = ("cpu", "subchannel_id")
_FIRST_PORT, _CLOSED_PORT = 20_000, 9


def _scaling(wire: Cable) -> tuple[list[int], bytes]:
    """Table and key, as ``ethtool -x`` prints them."""
    text = wire.ethtool("-x")
    rows = re.findall(r"^\s*\d+:((?:\s+\d+)+)$", text, re.MULTILINE)
    table = [int(number) for row in rows for number in row.split()]
    keys = re.findall(r"^([0-9a-f]{2}(?::[0-9a-f]{2}){39})$", text, re.MULTILINE)
    if not table or not keys:
        raise RowFailed("ethtool -x shows no table or no key", text.splitlines())
    return table, bytes.fromhex(keys[0].replace(":", ""))


def _queue_of(source: str, target: str, port: int, table: list[int], key: bytes) -> int:
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    data = addresses + port.to_bytes(2, "big") + _CLOSED_PORT.to_bytes(2, "big")
    return table[toeplitz(key, data) & len(table) - 1]


def check(wire: Cable, first: int, what: str) -> Iterator[str]:
    """One frame from each of many ports; each queue must get just those that hash to it."""
    table, key = _scaling(wire)
    wire.await_ping()
    before = wire.queue_counters()
    counted = []
    for family, source, target in _FAMILIES:
        expected: Counter[int] = Counter()
        ports = []
        for port in range(first, first + FLOWS):
            queue = _queue_of(source, target, port, table, key)
            expected[queue] += 1
            # So many for one queue as for another would not tell the two apart.
            if expected[queue] % (len(before) - queue) == 0:
                ports.append(port)
        seen = wire.witness.do("knock", to=target, port=_CLOSED_PORT, ports=ports)
        if seen["refused"] != len(ports):
            raise RowFailed(
                f"of {len(ports)} connections over {family}, {seen['refused']} reached the guest"
            )
        now = wire.queue_counters()
        got = [new - old for new, old in zip(now, before, strict=True)]
        wanted = [expected[queue] // (len(before) - queue) for queue in range(len(before))]
        if any(not want <= have <= want + STRAYS for want, have in zip(wanted, got, strict=True)):
            raise RowFailed(
                f"{what}: over {family} queues got {got} frames, the hash says {wanted}"
            )
        counted.append(f"{family} {wanted} frames by Toeplitz, {got} counted by queue")
        before = now
    yield f"{what}: {'; '.join(counted)}"


@dataclass(frozen=True, slots=True)
class _Channels:
    """How many channels the driver says to have, and what the guest's sysfs shows of them.

    ``processors`` by the channels' order in the device; ``astray`` are directories elsewhere.
    """

    count: int
    processors: list[str]
    astray: list[str]

    @property
    def complete(self) -> bool:
        return self.count == len(self.processors) and len(set(self.processors)) > 1


def _await_channels(session: Session, wire: Cable) -> _Channels:
    """The channels, once there are all of them: the driver opens them one by one."""
    deadline = time.monotonic() + session.timing.patiently(_OPEN_SECONDS)
    while True:
        found = _channels(session, wire)
        if found.complete or time.monotonic() >= deadline:
            return found
        time.sleep(session.timing.poll)


def _channels(session: Session, wire: Cable) -> _Channels:
    """What the guest says now.

    Linux puts a channel that is offered early right below ``/sys``: the offer races with
    ``vmbus_device_register()``, which makes the device's directory of channels after the driver
    was bound. Which of those are this adapter's, the numbers of the host's channels tell.
    """
    count = int(wire.ethtool("-l").split("Combined:")[-1].split()[0])
    usual = f"/sys/class/net/{wire.interface}/device/channels"
    astray = [
        f"/sys/{channel.channel_id}"
        for channel in session.machine.info().channels
        if channel.interface_instance == wire.info.instance
    ]
    files = wire.probe.read_all(
        *(f"{path}/{name}" for path in (f"{usual}/*", *astray) for name in _CHANNEL_FILES)
    )
    channels: dict[str, dict[str, str]] = {}
    for path, text in files.items():
        directory, _, name = path.rpartition("/")
        channels.setdefault(directory, {})[name] = text.strip()
    whole = [(path, each) for path, each in channels.items() if len(each) == len(_CHANNEL_FILES)]
    ordered = sorted(whole, key=lambda item: int(item[1]["subchannel_id"]))
    return _Channels(
        count,
        [each["cpu"] for _, each in ordered],
        [path for path, _ in ordered if not path.startswith(usual)],
    )


def _seen_of_channels(session: Session, wire: Cable) -> list[str]:
    """Both sides' view of an adapter whose channels do not come, and where the guest waits."""
    guest = wire.guest(
        "ethtool -l $I; ls -d /sys/class/net/$I/device/channels/* /sys/[0-9]* 2> /dev/null; "
        "dmesg | tail -20; "
        "for each in /proc/[0-9]*; do "
        "grep -qE 'netvsc|rndis|vmbus|rtnl' $each/stack 2> /dev/null || continue; "
        "echo waits: $(cat $each/comm $each/stack); done"
    )
    host = [
        f"host: channel {channel.channel_id} {channel.name}: {channel.state}"
        for channel in session.machine.info().channels
        if channel.interface_type == HV_NIC_GUID
    ]
    return host + guest.splitlines()


def prove(session: Session) -> Iterator[str]:
    """A channel for each processor; flows land where table and key say, as ``ethtool -X`` sets."""
    if session.cpus < 2:
        raise RowFailed("the guest has one processor; run it with --cpus 2 or more")
    with cable(session) as wire:
        found = _await_channels(session, wire)
        channels, processors = found.count, ", ".join(found.processors)
        if not found.complete:
            raise RowFailed(
                f"{channels} channels on processors {processors}", _seen_of_channels(session, wire)
            )
        yield f"channels: {channels}, on processors {processors}"
        for path in found.astray:
            yield f"a channel's directory is {path}: the guest's kernel had not made its place yet"
        session.step("sending flows that hash to every queue")
        yield from check(wire, _FIRST_PORT, "the driver's own table and key")
        session.step("changing the key")
        key = ":".join(f"{number * 37 % 256:02x}" for number in range(1, 41))
        wire.guest(f"ethtool -X $I hkey {key}")
        yield from check(wire, _FIRST_PORT + FLOWS, "another key (ethtool -X hkey)")
        session.step("changing the table")
        weights = " ".join("1" if number == 1 else "0" for number in range(channels))
        wire.guest(f"ethtool -X $I weight {weights}")
        yield from check(wire, _FIRST_PORT + 2 * FLOWS, "all to queue 1 (ethtool -X weight)")
        session.step("changing the number of channels")
        wire.guest("ethtool -X $I default && ethtool -L $I combined 1")
        wire.await_ping()
        if len(wire.queue_counters()) != 1:
            raise RowFailed("ethtool -L combined 1 left more than one queue")
        wire.guest(f"ethtool -L $I combined {channels}")
        wire.await_ping()
        yield f"ethtool -L: 1 channel and {channels} again, with traffic after each"
    yield f"IPv4 and IPv6 flows spread over {channels} processors as Toeplitz, key and table say"
