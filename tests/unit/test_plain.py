"""Dataclasses as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from uuid import UUID

import pytest

from hvhost.plain import build, dump


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    number: int
    name: UUID


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    maybe: Inner | None
    text: str | None = None


def test_round_trip() -> None:
    inner = Inner(7, UUID(int=9))
    for value in (Outer((inner, inner), None), Outer((), inner, "x")):
        assert build(Outer, json.loads(dump(value))) == value
    assert build(Colour, "red") is Colour.RED


def test_what_is_not_written() -> None:
    with pytest.raises(TypeError, match="Colour is not written"):
        dump(Outer((Inner(Colour.RED, UUID(int=1)),), None))  # type: ignore[arg-type] # that is it


def test_what_does_not_fit() -> None:
    with pytest.raises(KeyError, match="more"):
        build(Inner, {"number": 1, "name": str(UUID(int=1)), "more": 1})
    with pytest.raises(ValueError, match="badly formed"):
        build(Inner, {"number": 1, "name": "x"})
