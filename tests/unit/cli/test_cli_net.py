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
