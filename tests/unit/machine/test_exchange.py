"""Key-value exchange for callers that wait, with a guest that answers in a thread of its own."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine import exchange as exchange_module
from hvhost.machine.exchange import KvpExchange
from hvhost.machine.host_items import host_items, machine_id
from hvhost.machine.model import IpSettings, KvpPool, KvpRecord
from hvhost.services.kvp import Kvp
from hvhost.services.kvp_protocol import KvpItem, set_message
from simulated.driver import SimulatedGuest
from simulated.kvp_daemon import Daemon

EXTERNAL, GUEST, AUTO = KvpPool.EXTERNAL, KvpPool.GUEST, KvpPool.AUTO


class Guest:
    def __init__(self) -> None:
        guest = self.simulated = SimulatedGuest()
        self.lock = threading.RLock()
        self.device = Kvp()
        guest.server.add_device(self.device)
        guest.connect()
        self.daemon = Daemon(guest.open(1), [(4, 0)])
        self.status = 0
        self.over = False
        self.exchange = KvpExchange(self.device, self.lock)
        self.thread = threading.Thread(target=self._answer)
        self.daemon.run()
        self.thread.start()

    def _answer(self) -> None:
        while not self.over:
            with self.lock:
                self.daemon.run(status=self.status)
            time.sleep(0.0005)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.over = True
    guest.thread.join()


def test_a_guest_that_goes_while_it_is_asked(guest: Guest) -> None:
    guest.over = True
    guest.thread.join()
    errors: list[HvHostError] = []

    def ask() -> None:
        with pytest.raises(HvHostError) as raised:
            guest.exchange.items(GUEST)
        errors.append(raised.value)

    asking = threading.Thread(target=ask)
    asking.start()
    while guest.device._current is None:
        time.sleep(0.001)
    with guest.lock:
        guest.simulated.close(1)
    asking.join(10)
    assert "ended before the answer came" in str(errors[0])


def test_pools_are_listed_one_or_all(guest: Guest) -> None:
    guest.daemon.pools[1] |= {"a": "1", "b": "2"}
    guest.daemon.pools[4]["c"] = "3"
    records = [KvpRecord(GUEST, "a", "1"), KvpRecord(GUEST, "b", "2")]
    assert guest.exchange.items(GUEST) == records
    assert guest.exchange.items(None) == [*records, KvpRecord(KvpPool.AUTO_INTERNAL, "c", "3")]


@pytest.mark.parametrize("forgets", [False, True])
def test_an_item_is_found_whatever_the_guest_forgets(guest: Guest, forgets: bool) -> None:
    guest.daemon.forgets_values = forgets
    guest.daemon.pools[1] |= {"a": "1", "b": "2", "empty": ""}
    guest.daemon.pools[2]["OSName"] = "Debian"
    assert guest.exchange.get(GUEST, "b") == KvpRecord(GUEST, "b", "2")
    assert guest.exchange.get(None, "b") == KvpRecord(GUEST, "b", "2")
    assert guest.exchange.get(GUEST, "empty") == KvpRecord(GUEST, "empty", "")
    assert guest.exchange.get(AUTO, "OSName").value == "Debian"
    with pytest.raises(HvHostError, match="no item 'b' in pool external"):
        guest.exchange.get(EXTERNAL, "b")
    with pytest.raises(HvHostError, match="no item 'x' in any pool"):
        guest.exchange.get(None, "x")


def test_items_of_the_hosts_pools_are_remembered(guest: Guest) -> None:
    guest.exchange.set(EXTERNAL, "role", "web")
    guest.exchange.set(GUEST, "other", "x")
    assert guest.daemon.pools[0] == {"role": "web"} and guest.daemon.pools[1] == {"other": "x"}
    assert guest.device.state.host_items == [(EXTERNAL, KvpItem("role", "web"))]
    guest.exchange.delete(EXTERNAL, "role")
    assert guest.daemon.pools[0] == {} and guest.device.state.host_items == []
    with pytest.raises(
        HvHostError, match="did not delete the item 'role' of pool external: it has"
    ):
        guest.exchange.delete(EXTERNAL, "role")


def test_what_a_guest_does_not_take_is_not_remembered(guest: Guest) -> None:
    guest.status = 0x80004005
    with pytest.raises(HvHostError, match="did not take the item 'a': its daemon failed"):
        guest.exchange.set(EXTERNAL, "a", "b")
    assert guest.device.state.host_items == []
    with pytest.raises(HvHostError, match="does not list its pool external"):
        guest.daemon.pools[0]["a"] = "b"
        guest.exchange.items(EXTERNAL)
    with pytest.raises(HvHostError, match="does not give the item 'a'"):
        guest.exchange.get(EXTERNAL, "a")


def test_what_the_daemon_finds_out_cannot_be_set(guest: Guest) -> None:
    with pytest.raises(HvHostError, match="takes no items"):
        guest.exchange.set(AUTO, "OSName", "x")


def test_an_enumeration_without_end_ends(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "MAXIMUM_ITEMS", 3)
    guest.daemon.pools[1] |= {"a": "1", "b": "2"}
    assert len(guest.exchange.items(GUEST)) == 2
    guest.daemon.pools[1]["c"] = "3"
    with pytest.raises(HvHostError, match="more than 3 items in pool guest"):
        guest.exchange.items(GUEST)


def test_an_unknown_adapter(guest: Guest) -> None:
    with pytest.raises(HvHostError, match=r"configure adapter .*: it has no such network"):
        guest.exchange.set_ip(IpSettings("{1}"))
    with pytest.raises(HvHostError, match="does not tell the addresses of 00:15:5D:00:00:01"):
        guest.exchange.ip_settings("00:15:5D:00:00:01")


def test_nobody_waits_for_ever(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "_WAIT_SECONDS", 0.05)
    guest.over = True
    guest.thread.join()
    with pytest.raises(HvHostError, match="too slow"):
        guest.exchange.set(EXTERNAL, "a", "b")


def test_the_host_tells_at_least_what_test_suites_want() -> None:
    items = host_items("web-1")
    assert {pool for pool, _ in items} == {KvpPool.AUTO_EXTERNAL} and len(items) >= 11
    told = {item.key: item.value for _, item in items}
    assert told["VirtualMachineName"] == "web-1" and told["HostName"] == told["PhysicalHostName"]
    assert uuid.UUID(told["VirtualMachineId"]) == machine_id("web-1")
    for pool, item in items:
        set_message(pool, item.key, item.value)


def test_a_machine_keeps_its_id_on_its_computer(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("0123456789abcdef0123456789abcdef\n")
    other.write_text("fedcba9876543210fedcba9876543210\n")
    ids = {machine_id("a", one), machine_id("b", one), machine_id("a", other)}
    ids.add(machine_id("a", tmp_path / "none"))
    assert len(ids) == 4
    assert machine_id("a", one) == machine_id("a", one)
    assert machine_id("a", tmp_path / "none") == machine_id("a", tmp_path / "none")
