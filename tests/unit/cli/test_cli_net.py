"""``hvhost net``: what can be said without a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.errors import HvHostError

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
        assert hvhost(*words).out == ""
        assert json.loads(hvhost(*words, "--json").out) == []


def test_a_switch_is_not_plugged_into_another(hvhost: Hvhost, runtime: Path) -> None:
    wrong = hvhost("net", "create", "lan", "--uplink", "switch:other")
    assert wrong.status == 2 and "cannot be plugged into another" in wrong.err


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
