"""What row ``vrss`` makes of a guest's queues: flows that are spread otherwise fail it."""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hvhost.network.ndis import HASH_IPV4, HASH_IPV6, HASH_TCP_IPV4, HASH_TCP_IPV6, ReceiveScaling
from hvhost.network.toeplitz import FlowTable
from hvhost.verify.contract import HV_KVP_GUID, HV_NIC_GUID
from hvhost.verify.guest import RowFailed
from hvhost.verify.rows import vrss
from hvhost.verify.rows.vrss import FLOWS, STRAYS, check
from hvhost.verify.session import Session
from hvhost.verify.wire import GUEST4, GUEST6, HOST4, HOST6, Cable

KEY = bytes(number * 37 % 256 for number in range(1, 41))
TABLE = tuple(number % 2 for number in range(128))
LINUX = HASH_IPV4 | HASH_TCP_IPV4 | HASH_IPV6 | HASH_TCP_IPV6


def ethtool_x(table: tuple[int, ...], key: bytes) -> str:
    rows = [
        f"{start:5}:      " + " ".join(f"{number:5}" for number in table[start : start + 8])
        for start in range(0, len(table), 8)
    ]
    head = "RX flow hash indirection table for eth1 with 2 RX ring(s):"
    return "\n".join([head, *rows, "RSS hash key:", key.hex(":"), "RSS hash function:"])


def syn(to: str, port: int, closed: int) -> bytes:
    """The start of what a kernel sends to knock, as far as the adapter looks at it."""
    tcp = struct.pack("!HHIIBBHHH", port, closed, 1, 0, 0x50, 2, 1000, 0, 0)
    source = HOST6 if ":" in to else HOST4
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(to).packed
    if ":" in to:
        return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, 20, 6, 64) + addresses + tcp
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, 6, 0)
    return bytes(12) + b"\x08\x00" + ip + addresses + tcp


class SpreadingCable:
    """A guest with two queues, whose frames the adapter's own flow table spreads.

    *queue_of* may put one elsewhere; *strays* come to queue 0 with each family's flows.
    """

    def __init__(
        self,
        queue_of: Callable[[bytes, int], int] = lambda head, queue: queue,
        *,
        table: tuple[int, ...] = TABLE,
        hash_types: int = LINUX,
        unanswered: int = 0,
        strays: int = 0,
    ) -> None:
        self.witness = self
        self._said = ethtool_x(table, KEY)
        self._flows = FlowTable(ReceiveScaling(table, KEY, hash_types))
        self._queue_of, self._unanswered, self._strays = queue_of, unanswered, strays
        self._queues = [7, 5]

    def ethtool(self, option: str) -> str:
        assert option == "-x"
        return self._said

    def await_ping(self) -> None:
        self._queues[0] += 1

    def queue_counters(self) -> list[int]:
        return list(self._queues)

    def do(self, action: str, to: str, port: int, ports: list[int]) -> dict[str, Any]:
        assert action == "knock" and len(set(ports)) == len(ports) and to in (GUEST4, GUEST6)
        for number in ports:
            head = syn(to, number, port)
            self._queues[self._queue_of(head, self._flows.look_up(head)[0])] += 1
        self._queues[0] += self._strays
        return {"refused": len(ports) - self._unanswered}


def checked(cable: SpreadingCable) -> list[str]:
    return list(check(cast(Cable, cable), 20_000, "the table"))


def is_ipv6(head: bytes) -> bool:
    return head[12:14] == b"\x86\xdd"


@pytest.mark.parametrize("strays", [0, STRAYS])
def test_flows_of_both_families_that_go_where_they_hash(strays: int) -> None:
    (line,) = checked(SpreadingCable(strays=strays))
    assert line.startswith("the table: IPv4 [") and "; IPv6 [" in line
    (line,) = checked(SpreadingCable(table=(1,) * 128))
    assert line.count(f"[0, {FLOWS}] frames by Toeplitz, [0, {FLOWS}] counted") == 2


@pytest.mark.parametrize(
    ("cable", "family"),
    [
        (SpreadingCable(hash_types=LINUX & ~HASH_TCP_IPV6), "IPv6"),  # by addresses alone
        (SpreadingCable(hash_types=HASH_IPV4 | HASH_TCP_IPV4), "IPv6"),  # not at all
        (SpreadingCable(hash_types=LINUX & ~HASH_TCP_IPV4), "IPv4"),
        (SpreadingCable(lambda head, queue: queue ^ is_ipv6(head)), "IPv6"),
        (SpreadingCable(lambda head, queue: queue ^ (not is_ipv6(head))), "IPv4"),
        (SpreadingCable(lambda head, queue: queue & head[-19]), "IPv4"),  # of odd ports only
        (SpreadingCable(strays=STRAYS + 1), "IPv4"),
    ],
)
def test_flows_that_go_elsewhere(cable: SpreadingCable, family: str) -> None:
    with pytest.raises(RowFailed, match=rf"the table: over {family} queues got \[.*the hash says"):
        checked(cable)


def test_flows_that_do_not_arrive() -> None:
    with pytest.raises(RowFailed, match=r"of (\d+) connections over IPv4, \d+ reached the guest"):
        checked(SpreadingCable(unanswered=1))


def test_a_guest_that_shows_no_table() -> None:
    cable = SpreadingCable(table=())
    with pytest.raises(RowFailed, match="shows no table"):
        checked(cable)


NIC, OTHER = "11111111-0000-0000-0000-000000000000", "22222222-0000-0000-0000-000000000000"
PLACE = "/sys/class/net/eth1/device/channels"


class OpeningCable:
    """A guest that was promised two channels, with a sysfs of *directories*: processor, index."""

    interface = "eth1"
    info = SimpleNamespace(instance=NIC)

    def __init__(self, directories: dict[str, tuple[int, int]]) -> None:
        self._files = {
            f"{path}/{name}": f"{value}\n"
            for path, values in directories.items()
            for name, value in zip(("cpu", "subchannel_id"), values, strict=True)
        }
        self.probe = self

    def read_all(self, *patterns: str) -> dict[str, str]:
        return {
            path: text
            for path, text in self._files.items()
            if any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
        }

    def ethtool(self, option: str) -> str:
        assert option == "-l"
        return "Pre-set maximums:\nCombined:\t8\nCurrent hardware settings:\nCombined:\t2\n"

    def guest(self, script: str) -> str:
        return "10\nwaits: kworker/0:1 rndis_set_subchannel\n"


def begun(
    monkeypatch: pytest.MonkeyPatch, directories: dict[str, tuple[int, int]]
) -> Iterator[str]:
    @contextlib.contextmanager
    def cable(session: Session) -> Iterator[OpeningCable]:
        yield OpeningCable(directories)

    def channel(number: int, name: str, state: str, kind: str, instance: str) -> SimpleNamespace:
        return SimpleNamespace(
            channel_id=number,
            name=name,
            state=state,
            interface_type=kind,
            interface_instance=instance,
        )

    channels = [
        channel(10, "nic", "open", HV_NIC_GUID, NIC),
        channel(11, "nic, 1", "offered", HV_NIC_GUID, NIC),
        channel(3, "kvp", "open", HV_KVP_GUID, OTHER),
    ]
    session = SimpleNamespace(
        cpus=2,
        machine=SimpleNamespace(info=lambda: SimpleNamespace(channels=channels)),
        timing=SimpleNamespace(patiently=lambda seconds: 0.0, poll=0.0),
    )
    monkeypatch.setattr(vrss, "cable", cable)
    return vrss.prove(cast(Session, session))


@pytest.mark.parametrize(
    ("directories", "shown"),
    [
        ({}, ""),
        ({f"{PLACE}/10": (0, 0)}, "0"),
        ({f"{PLACE}/10": (0, 0), f"{PLACE}/11": (0, 1)}, "0, 0"),
        ({f"{PLACE}/10": (0, 0), "/sys/3": (1, 1), "/sys/12": (1, 1)}, "0"),  # not its own
        ({f"{PLACE}/1{each}": (each, each) for each in range(3)}, "0, 1, 2"),
    ],
)
def test_channels_that_do_not_come_are_told_of_by_both_sides(
    monkeypatch: pytest.MonkeyPatch, directories: dict[str, tuple[int, int]], shown: str
) -> None:
    with pytest.raises(RowFailed, match=f"2 channels on processors {shown}$") as failed:
        next(begun(monkeypatch, directories))
    assert list(failed.value.evidence) == [
        "host: channel 10 nic: open",
        "host: channel 11 nic, 1: offered",
        "10",
        "waits: kworker/0:1 rndis_set_subchannel",
    ]


def test_a_channel_that_the_guests_kernel_puts_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {f"{PLACE}/11": (0, 1), f"{PLACE}/10": (1, 0)}
    assert next(begun(monkeypatch, usual)) == "channels: 2, on processors 1, 0"
    lines = begun(monkeypatch, {f"{PLACE}/10": (1, 0), "/sys/11": (0, 1)})
    assert next(lines) == "channels: 2, on processors 1, 0"
    assert next(lines).startswith("a channel's directory is /sys/11:")
