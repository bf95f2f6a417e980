"""When a verification counts as passed.

A row that the guest or host lacks is a failure — a kernel that lost its network driver is what
its maintainer must hear of — unless it was lacking before, or somebody said that it may.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from importlib import resources
from pathlib import Path
from typing import Any

from hvhost.errors import HvHostError
from hvhost.guests.catalog import GUESTS, base_guest
from hvhost.verify.contract import Status
from hvhost.verify.results import SCHEMA, RowResult

_LACKING = frozenset(status.value for status in Status if status.lacking)


def parse_baseline(text: str, *, name: str) -> frozenset[str]:
    """The ids of the rows that were lacking in an earlier report.

    :class:`HvHostError` when *text* is no report of schema 1; *name* says whose text it is.
    """
    try:
        document: Any = json.loads(text)
    except ValueError as error:
        raise HvHostError(
            f"baseline {name} is not JSON ({error}); give the --json file of an earlier run."
        ) from None
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or document.get("schema") != SCHEMA:
        raise HvHostError(
            f"baseline {name} is no report of schema {SCHEMA}; give the --json file of an "
            "earlier run of this hvhost."
        )
    lacking = set()
    for row in rows:
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("id"), str)
            or not isinstance(row.get("status"), str)
        ):
            raise HvHostError(
                f"baseline {name} has a row without id or status; write it with --json again."
            )
        if row["status"] in _LACKING:
            lacking.add(row["id"])
    return frozenset(lacking)


def read_baseline(path: Path) -> frozenset[str]:
    """:func:`parse_baseline` of a file; :class:`HvHostError` when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise HvHostError(
            f"baseline {path} cannot be read: {error.strerror}; give the --json file of an earlier "
            "run."
        ) from None
    except UnicodeDecodeError:
        raise HvHostError(
            f"baseline {path} is not a text file; give the --json file of an earlier run."
        ) from None
    return parse_baseline(text, name=str(path))


def shipped_baseline(guest: str) -> frozenset[str]:
    """What the distribution *guest* is known to lack; empty where no baseline ships for it.

    A variant of a guest, like its full kernel, has that guest's: it may lack no more.
    """
    for name in (guest, base_guest(guest) if guest in GUESTS else guest):
        file = resources.files("hvhost.verify") / "baselines" / f"{name}.json"
        if file.is_file():
            return parse_baseline(file.read_text(encoding="utf-8"), name=name)
    return frozenset()


def _excused(result: RowResult, allowed: AbstractSet[str], *, asked_for: bool) -> bool:
    if result.status is Status.MISSING:
        return not asked_for
    return result.status.lacking and result.row.id in allowed


def failures(
    results: Iterable[RowResult], *, rows_named: bool, allowed: AbstractSet[str]
) -> tuple[RowResult, ...]:
    """The results that make the run fail.

    *rows_named* says that ``--rows`` asked for them by name; *allowed* are the rows that may be
    lacking.
    """
    return tuple(
        result
        for result in results
        if result.status is not Status.WORKS and not _excused(result, allowed, asked_for=rows_named)
    )


def exit_status(
    results: Sequence[RowResult],
    *,
    rows_named: bool,
    allowed: AbstractSet[str],
    bus_found: bool | None,
) -> int:
    """0 if no row failed and the guest was not one without a bus, else 1."""
    if bus_found is False:
        return 1
    return 1 if failures(results, rows_named=rows_named, allowed=allowed) else 0
