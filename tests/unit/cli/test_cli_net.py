"""``hvhost net``: what can be said without a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost

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


def test_a_capture_of_no_switch_leaves_its_file_alone(
    hvhost: Hvhost, runtime: Path, tmp_path: Path
) -> None:
    kept, new = tmp_path / "kept.pcap", tmp_path / "new.pcap"
    kept.write_bytes(b"of yesterday")
    for path in (kept, new):
        said = hvhost.sentence("net", "capture", "nowhere", "-w", str(path))
        assert "hvhost net create nowhere" in said
    assert kept.read_bytes() == b"of yesterday" and not new.exists()
