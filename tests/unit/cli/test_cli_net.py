"""``hvhost net``: what can be said without a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.errors import HvHostError
from hvhost.manager import client, definition
from hvhost.manager.network import NetworkClient
from hvhost.network import switch_client
from hvhost.network.report import AdapterInfo
from hvhost.network.switch_client import SwitchConfig

__all__ = ["hvhost"]


@pytest.mark.parametrize("words", [("set-ip", "demo"), ("demo", "set-ip")])
def test_addresses_are_set_in_either_order_of_words(
    hvhost: Hvhost, runtime: Path, words: tuple[str, str]
) -> None:
    said = hvhost.sentence("net", *words, "net0", "192.0.2.5/24", "--gateway", "192.0.2.1")
    assert "no running machine 'demo'" in said


def test_an_address_has_to_be_one_before_anybody_is_asked(hvhost: Hvhost, runtime: Path) -> None:
    assert "or dhcp" in hvhost("net", "set-ip", "--help").out
    assert hvhost("net", "set-ip", "demo", "net0").status == 2


def test_a_cable_is_in_or_out(hvhost: Hvhost, runtime: Path) -> None:
    wrong = hvhost("net", "link", "demo", "net0", "Up")
    assert wrong.status == 2 and "say up or down" in wrong.err
    for state in ("up", "down"):
        said = hvhost.sentence("net", "link", "demo", "net0", state)
        assert "no running machine 'demo'" in said


def test_what_there_is_not_is_json_too(
    hvhost: Hvhost, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvhost.manager.client.MachineClient", lambda name: name)
    monkeypatch.setattr("hvhost.manager.network.NetworkClient.adapters", lambda self: [])
    for words in (("net", "ls"), ("net", "adapters", "demo")):
        assert hvhost(*words).out.replace("─", "").isupper(), "a heading, as of `hvhost ps`"
        assert json.loads(hvhost(*words, "--json").out) == []


def test_a_switch_is_not_plugged_into_another(hvhost: Hvhost, runtime: Path) -> None:
    said = hvhost.sentence("net", "create", "lan", "--uplink", "switch:other")
    assert "'switch' is nothing for --uplink to plug into" in said


NO_PASST = "passt is not on this computer; install it."


@pytest.mark.parametrize(
    ("uplink", "error", "advised"),
    [
        ("nat", NO_PASST, True),
        ("nat,forward=2222:22", NO_PASST, False),
        ("tap:passt0", "there is no tap passt0.", False),
        ("nat", "switch 'lan' is there already.", False),
    ],
)
def test_a_switch_without_an_uplink_is_advised_only_where_it_would_do(
    hvhost: Hvhost,
    runtime: Path,
    monkeypatch: pytest.MonkeyPatch,
    uplink: str,
    error: str,
    advised: bool,
) -> None:
    def start(config: object) -> None:
        raise HvHostError(error)

    monkeypatch.setattr("hvhost.network.switch_client.start", start)
    said = hvhost.sentence("net", "create", "lan", "--uplink", uplink)
    assert said.startswith(error)
    assert ("`hvhost net create lan --uplink none`" in said) is advised


def test_a_capture_of_no_switch_leaves_its_file_alone(
    hvhost: Hvhost, runtime: Path, tmp_path: Path
) -> None:
    kept, new = tmp_path / "kept.pcap", tmp_path / "new.pcap"
    kept.write_bytes(b"of yesterday")
    for path in (kept, new):
        said = hvhost.sentence("net", "capture", "nowhere", "-w", str(path))
        assert "hvhost net create nowhere" in said
    assert kept.read_bytes() == b"of yesterday" and not new.exists()


LAN: dict[str, Any] = {
    "name": "lan",
    "uplink": "nat",
    "pid": 7,
    "leases": {"00:15:5d:00:00:01": "192.168.78.2"},
    "ports": [
        {
            "name": name,
            "vlan": vlan,
            "trunk": trunk,
            "isolated": isolated,
            "received": 5,
            "sent": 6,
            "dropped": 0,
            "addresses": addresses,
        }
        for name, vlan, trunk, isolated, addresses in (
            ("uplink", 0, [], False, []),
            ("vm/net0", 10, [20, 21], True, ["00:15:5d:00:00:01", "00:15:5d:00:00:02"]),
        )
    ],
}
ADAPTER = AdapterInfo(
    name="net1", mac="00:15:5d:00:00:01", current_mac="00:15:5d:00:00:01", instance="", plug="nat",
    link=True, open=False, version=None, mtu=1500, channels=1, merging=False, namespace_pid=0,
    transmitted=0, transmitted_bytes=0, received=0, received_bytes=0, transmit_errors=0,
    receive_errors=0, no_buffer=0, filtered=0, spoofed=0, merged=0, large_sends=0,
)  # fmt: skip


@pytest.fixture
def lan(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    """One switch, in words only."""
    monkeypatch.setattr(switch_client, "switch_names", lambda: ["lan"])
    monkeypatch.setattr(switch_client, "info", lambda name: LAN)


def test_the_list_has_its_heading_also_without_a_switch(hvhost: Hvhost, runtime: Path) -> None:
    assert hvhost("net", "ls").out.split()[:3] == ["SWITCH", "PORT", "VLAN"]
    assert json.loads(hvhost("net", "ls", "--json").out) == []


def test_the_list_has_a_line_for_each_port_and_address(hvhost: Hvhost, lan: None) -> None:
    lines = [" ".join(line.split()) for line in hvhost("net", "ls").out.splitlines()]
    assert "lan uplink (nat) all 5 6 0" in lines
    words = "lan vm/net0 10, trunk of 2, isolated 5 6 0 00:15:5d:00:00:01 = 192.168.78.2"
    assert lines[lines.index(words) + 1] == "00:15:5d:00:00:02"
    assert json.loads(hvhost("net", "ls", "--json").out) == [LAN]


def test_a_switch_that_says_nothing_hides_no_other(
    hvhost: Hvhost, lan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(name: str) -> dict[str, Any]:
        if name == "killed":
            raise HvHostError("there is no switch 'killed'.") from ConnectionRefusedError()
        if name == "deaf":
            raise HvHostError("the switch 'deaf' has not answered.") from TimeoutError()
        return LAN

    monkeypatch.setattr(switch_client, "info", info)
    monkeypatch.setattr(switch_client, "switch_names", lambda: ["deaf", "killed", "lan"])
    for words in (("net", "ls"), ("net", "ls", "--json")):
        said = hvhost(*words)
        assert said.status == 1 and said.err == "hvhost: the switch 'deaf' has not answered.\n"
        assert "uplink" in said.out
    monkeypatch.setattr(switch_client, "switch_names", lambda: ["killed", "lan"])
    assert (hvhost("net", "ls").status, hvhost("net", "ls").err) == (0, "")


def test_a_capture_of_no_port_leaves_its_file_alone(
    hvhost: Hvhost, lan: None, tmp_path: Path
) -> None:
    path = tmp_path / "new.pcap"
    said = hvhost.sentence("net", "capture", "lan", "-w", str(path), "--port", "net0")
    assert said == "the switch 'lan' has no port 'net0'; there are: uplink, vm/net0."
    assert not path.exists()


def test_a_file_that_takes_no_capture_is_named(
    hvhost: Hvhost, lan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(name: str, port: str, file: BinaryIO) -> int:
        file.write(bytes(100))
        file.flush()
        return 0

    monkeypatch.setattr(switch_client, "capture", capture)
    said = hvhost.sentence("net", "capture", "lan", "-w", "/dev/full")
    assert "'/dev/full': No space left on device; name another file" in said


def test_what_was_made_as_json(hvhost: Hvhost, lan: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[SwitchConfig] = []
    monkeypatch.setattr(switch_client, "start", started.append)
    assert json.loads(hvhost("net", "create", "lan", "--json").out) == LAN
    assert hvhost("net", "create", "lan", "--uplink", "none").out == ""
    assert [each.uplink is None for each in started] == [False, True]

    def answer(*_: object) -> AdapterInfo:
        return ADAPTER

    monkeypatch.setattr(client, "MachineClient", str)
    monkeypatch.setattr(NetworkClient, "adapters", lambda _: [])
    monkeypatch.setattr(NetworkClient, "add", answer)
    monkeypatch.setattr(NetworkClient, "set_link", answer)
    assert json.loads(hvhost("net", "add", "vm", "nat", "--json").out)["name"] == "net1"
    assert hvhost("net", "add", "vm", "nat").out == "net1\n"
    assert json.loads(hvhost("net", "link", "vm", "net1", "up", "--json").out)["link"] is True
    assert hvhost("net", "link", "vm", "net1", "up").out == ""


def test_the_adapters_of_a_machine_are_a_table(
    hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    found: list[AdapterInfo] = []
    monkeypatch.setattr(client, "MachineClient", str)
    monkeypatch.setattr(NetworkClient, "adapters", lambda _: found)
    assert hvhost("net", "adapters", "vm").out.split()[:2] == ["ADAPTER", "ADDRESS"]
    found.append(ADAPTER)
    lines = [" ".join(line.split()) for line in hvhost("net", "adapters", "vm").out.splitlines()]
    assert "net1 00:15:5d:00:00:01 nat up does not use it 1 1500 0 0" in lines


def test_a_wrong_adapter_is_said_before_a_guest_is_fetched(
    hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    def define_guest(*_: object, **__: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(definition, "define_guest", define_guest)
    said = hvhost.sentence("run", "--guest", "debian-12", "--nic", "nat,vlan=5")
    assert "vlan means nothing with --nic nat" in said
