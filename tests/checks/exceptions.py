"""Checks that no test notices, with the reason why that is right: ``exceptions.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checks.find import Check

FILE = Path(__file__).with_name("exceptions.toml")


@dataclass(frozen=True, slots=True)
class Exempt:
    """A check by its text; *part* is the whole condition where only that is meant."""

    file: str
    function: str
    condition: str
    part: str
    reason: str

    def is_for(self, check: Check) -> bool:
        mine = (self.file, self.function, self.condition, self.part)
        return mine == (check.file, check.function, check.condition, check.part)

    def __str__(self) -> str:
        return f"{self.file}: {self.function}: {self.condition}  [{self.part}]"


def read(path: Path = FILE) -> list[Exempt]:
    """All of them; ``ValueError`` if one lacks something."""
    found = []
    for entry in tomllib.loads(path.read_text()).get("unnoticed", []):
        parts = entry.pop("parts", [entry.get("condition", "")])
        if set(entry) != {"file", "function", "condition", "reason"} or not entry["reason"]:
            raise ValueError(f"{path.name}: an entry has {', '.join(entry)}")
        found += [Exempt(part=part, **entry) for part in parts]
    return found


def idle(exempt: Iterable[Exempt], noticed: Iterable[Check], known: Iterable[Check]) -> list[str]:
    """Exceptions for what is noticed by now, or is no check any more."""
    noticed, known = list(noticed), list(known)
    return [
        str(each)
        for each in exempt
        if any(each.is_for(check) for check in noticed)
        or not any(each.is_for(check) for check in known)
    ]
