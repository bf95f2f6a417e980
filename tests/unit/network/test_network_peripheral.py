"""Adapters of a machine: they come and go, outlive resets, and lose their link with their wire."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import peripheral
from hvhost.network.config import MAXIMUM_ADAPTERS, AdapterConfig, Uplink, parse_adapter
from hvhost.network.device import NetworkAdapter
from hvhost.network.peripheral import QUIET_SECONDS, NetworkPeripheral
from hvhost.vmbus.channel import ChannelState
from hvhost.vmbus.protocol import RescindChannelOffer
from simulated.driver import SimulatedGuest

if TYPE_CHECKING:
    from hvhost.machine.computer import Computer


@dataclass
class Boot:
    """What the peripheral needs of a computer."""

    guest: SimulatedGuest = field(default_factory=SimulatedGuest)

    @property
    def computer(self) -> Computer:
        made = SimpleNamespace(
            lock=threading.RLock(),
            bus=self.guest.server,
            memory=self.guest.memory,
            config=SimpleNamespace(cpus=2),
        )
        return cast("Computer", made)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[NetworkPeripheral]:
    made = NetworkPeripheral((parse_adapter("none", name="net0"),), Loop(), tmp_path)
    yield made
    made.close()


def offered(guest: SimulatedGuest) -> list[str]:
    return [channel.offer.name for channel in guest.server.channels]


def test_adapters_come_and_go(network: NetworkPeripheral) -> None:
    boot = Boot()
    network.attach(boot.computer)
    boot.guest.connect()
    network.add(parse_adapter("none", name="net1"))
    assert offered(boot.guest) == ["network adapter net0", "network adapter net1"]
    network.remove("net0")
    messages = [message for _, message in boot.guest.port.messages]
    assert [m.child_relid for m in messages if isinstance(m, RescindChannelOffer)] == [1]
    assert [each.name for each in network.adapters()] == ["net1"]


def test_an_adapter_goes_once_its_guest_is_quiet(
    network: NetworkPeripheral, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot, counts = Boot(), [5, 7, 7, 9]
    network.attach(boot.computer)
    boot.guest.connect()
    channel = boot.guest.server.channels[0]
    slept: list[float] = []

    def quiesce(adapter: NetworkAdapter) -> int:
        assert channel.state is ChannelState.OFFERED, "it is still there"
        return counts.pop(0)

    monkeypatch.setattr(NetworkAdapter, "quiesce", quiesce)
    monkeypatch.setattr(NetworkAdapter, "is_open", True)
    monkeypatch.setattr(time, "sleep", slept.append)
    network.remove("net0")
    assert counts == [9] and slept == [QUIET_SECONDS] * 2
    assert channel.state is ChannelState.RESCINDED


def test_a_guest_that_will_not_be_quiet_loses_its_adapter(
    network: NetworkPeripheral, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot, numbers = Boot(), itertools.count()
    network.attach(boot.computer)
    boot.guest.connect()
    monkeypatch.setattr(NetworkAdapter, "quiesce", lambda adapter: next(numbers))
    monkeypatch.setattr(NetworkAdapter, "is_open", True)
    monkeypatch.setattr(peripheral, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(peripheral, "QUIET_LIMIT_SECONDS", 0.05)
    network.remove("net0")
    assert network.adapters() == [] and next(numbers) > 2


def test_every_boot_has_the_same_adapters(network: NetworkPeripheral) -> None:
    first, second = Boot(), Boot()
    network.attach(first.computer)
    network.set_link("net0", False)
    before = network.adapters()
    network.detach()
    assert network.adapters()[0].instance == ""
    network.attach(second.computer)
    assert offered(second.guest) == ["network adapter net0"]
    assert network.adapters() == before and not before[0].link


@pytest.mark.parametrize(
    ("nic", "name", "sentence"),
    [
        ("none", "net0", "'net0' already"),
        ("switch:nowhere", "net1", "there is no switch 'nowhere'"),
    ],
)
def test_what_cannot_be_added(
    network: NetworkPeripheral, nic: str, name: str, sentence: str
) -> None:
    with pytest.raises(HvHostError, match=sentence):
        network.add(parse_adapter(nic, name=name))
    assert [each.name for each in network.adapters()] == ["net0"]


def test_only_ports_of_a_switch_have_vlans(network: NetworkPeripheral) -> None:
    mac = "00:15:5d:00:00:01"
    for more in ({"vlan": 3}, {"trunk": (3,)}, {"isolated": True}, {"rate": 3}):
        config = AdapterConfig("net1", mac, Uplink.NONE, **more)
        with pytest.raises(HvHostError, match="for ports of a switch"):
            network.add(config)


def test_no_two_of_one_address_and_not_too_many(network: NetworkPeripheral) -> None:
    mac = network.adapters()[0].mac
    with pytest.raises(HvHostError, match=f"{mac} is the address of 'net0' already"):
        network.add(parse_adapter(f"none,mac={mac}", name="twin"))
    for number in range(1, MAXIMUM_ADAPTERS):
        network.add(parse_adapter("none", name=f"net{number}"))
    with pytest.raises(HvHostError, match="at most 8"):
        network.add(parse_adapter("none", name="one more"))


def test_there_is_no_such_adapter(network: NetworkPeripheral) -> None:
    with pytest.raises(HvHostError, match=r"no network adapter 'x'; there are: net0\."):
        network.set_link("x", True)
