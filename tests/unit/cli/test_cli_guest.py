"""``hvhost guest``."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.guests import full

__all__ = ["hvhost"]


def test_a_complete_guest_by_either_name(hvhost: Hvhost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def prepare(name: str, **_: object) -> full.FullGuest:
        asked.append(name)
        return full.FullGuest(name, name, Path("/k"), Path("/i"), Path("/d"), UUID(int=1))

    monkeypatch.setattr(full, "prepare_full", prepare)
    for words in (("debian-12-full",), ("debian-12", "--full"), ("debian-12-full", "--full")):
        answer = json.loads(hvhost("guest", "build", *words, "--json").out)
        assert answer["disk"] == "/d" and answer["append"].startswith("root=UUID=")
    assert asked == ["debian-12-full"] * 3


def test_a_complete_guest_that_does_not_exist(hvhost: Hvhost) -> None:
    told = hvhost.sentence("guest", "build", "debian-11", "--full")
    assert "no complete guest debian-11-full" in told and "debian-12-full" in told
