"""What a verification found, and its JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvhost.verify.contract import Row, Status

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class RowResult:
    """One row's outcome; ``evidence`` are sentences, the most telling one first."""

    row: Row
    status: Status
    seconds: float = 0.0
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A whole verification.

    ``bus_found`` is ``None`` where no requested row needed a boot; ``finding`` are the lines that
    tell a maintainer how far a guest without a bus came.
    """

    host: Mapping[str, Any]
    guest: Mapping[str, Any]
    results: tuple[RowResult, ...]
    bus_found: bool | None = None
    finding: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """The report as schema 1: host, guest and one object per row."""
        document = {
            "schema": SCHEMA,
            "host": dict(self.host),
            "guest": dict(self.guest),
            "rows": [
                {
                    "id": result.row.id,
                    "group": result.row.group,
                    "title": result.row.title,
                    "status": result.status.value,
                    "seconds": round(result.seconds, 3),
                    "evidence": list(result.evidence),
                }
                for result in self.results
            ],
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
