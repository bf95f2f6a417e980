"""When a run passes: the rules, each as a property over any results."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.guests.catalog import FULL_GUESTS, GUESTS
from hvhost.verify.baseline import (
    exit_status,
    failures,
    parse_baseline,
    read_baseline,
    shipped_baseline,
)
from hvhost.verify.contract import ROWS, Status
from hvhost.verify.results import RowResult, VerifyReport

IDS = [row.id for row in ROWS]
some_results = st.lists(st.sampled_from(ROWS), unique=True, min_size=1).flatmap(
    lambda rows: st.tuples(
        *(st.builds(RowResult, st.just(row), st.sampled_from(Status)) for row in rows)
    )
)
some_ids = st.frozensets(st.sampled_from(IDS))


def status_of(
    results: tuple[RowResult, ...],
    allowed: frozenset[str] = frozenset(),
    *,
    named: bool = True,
    bus: bool | None = True,
) -> int:
    return exit_status(results, rows_named=named, allowed=allowed, bus_found=bus)


@given(some_results, some_ids, st.booleans())
def test_a_guest_without_a_bus_never_passes(
    results: tuple[RowResult, ...], allowed: frozenset[str], named: bool
) -> None:
    assert status_of(results, allowed, named=named, bus=False) == 1


@given(some_results, some_ids)
def test_named_rows_pass_only_working_or_allowed_to_lack(
    results: tuple[RowResult, ...], allowed: frozenset[str]
) -> None:
    good = all(
        result.status is Status.WORKS
        or (result.status in (Status.GUEST_LACKS, Status.HOST_LACKS) and result.row.id in allowed)
        for result in results
    )
    assert status_of(results, allowed) == (0 if good else 1)


@given(some_results, some_ids)
def test_missing_rows_count_only_when_named(
    results: tuple[RowResult, ...], allowed: frozenset[str]
) -> None:
    others = tuple(result for result in results if result.status is not Status.MISSING)
    assert status_of(results, allowed, named=False) == status_of(others, allowed, named=False)
    if len(others) < len(results):
        assert status_of(results, allowed, named=True) == 1


@given(some_results, some_ids, some_ids)
def test_allowing_more_never_makes_a_run_fail(
    results: tuple[RowResult, ...], allowed: frozenset[str], more: frozenset[str]
) -> None:
    assert status_of(results, allowed | more) <= status_of(results, allowed)


@given(some_results)
def test_a_fails_is_never_excused(results: tuple[RowResult, ...]) -> None:
    failed = failures(results, rows_named=False, allowed=frozenset(IDS))
    assert failed == tuple(result for result in results if result.status is Status.FAILS)


@given(some_results)
def test_the_baseline_of_a_run_is_what_it_had_lacking(results: tuple[RowResult, ...]) -> None:
    text = VerifyReport({}, {}, results).to_json()
    lacking = parse_baseline(text, name="x")
    assert lacking == {
        result.row.id
        for result in results
        if result.status in (Status.GUEST_LACKS, Status.HOST_LACKS)
    }
    # The same results again are excused exactly where nothing fails or is missing.
    assert status_of(results, lacking) == int(
        any(result.status in (Status.FAILS, Status.MISSING) for result in results)
    )


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2, "rows": []}',
        '{"rows": []}',
        '{"schema": 1, "rows": {}}',
        '{"schema": 1, "rows": [1]}',
        '{"schema": 1, "rows": [{"status": "works"}]}',
        '{"schema": 1, "rows": [{"id": "smp"}]}',
        '{"schema": 1, "rows": [{"id": ["smp"], "status": "works"}]}',
        '{"schema": 1, "rows": [{"id": "smp", "status": ["guest-lacks"]}]}',
    ],
)
def test_what_is_no_baseline_is_said(document: str) -> None:
    with pytest.raises(HvHostError, match="baseline here"):
        parse_baseline(document, name="here")


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["id"]), inner),
)


@settings(max_examples=50)
@given(st.lists(json_values, max_size=4))
def test_any_rows_are_read_or_refused(rows: list[Any]) -> None:
    try:
        parse_baseline(json.dumps({"schema": 1, "rows": rows}), name="x")
    except HvHostError:
        assert rows


def test_baseline_file(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for name, why in (
        ("absent.json", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("binary.json", "is not a text file"),
    ):
        with pytest.raises(HvHostError) as caught:
            read_baseline(tmp_path / name)
        assert str(caught.value) == (
            f"baseline {tmp_path / name} {why}; give the --json file of an earlier run."
        )
    good = tmp_path / "good.json"
    good.write_text('{"schema": 1, "rows": [{"id": "dda", "status": "host-lacks"}]}')
    assert read_baseline(good) == {"dda"}


def test_shipped_baselines_are_of_the_contract() -> None:
    directory = resources.files("hvhost.verify") / "baselines"
    for file in directory.iterdir() if directory.is_dir() else ():
        if file.name.endswith(".json"):
            assert shipped_baseline(file.name.removesuffix(".json")) <= set(IDS)
    assert shipped_baseline("no-such-guest") == frozenset()


@pytest.mark.parametrize("guest", GUESTS)
def test_every_known_guest_has_a_baseline(guest: str) -> None:
    """No distribution ships ``hv_set_ifconfig``, so none is empty."""
    assert "static-ip" in shipped_baseline(guest)
    # A 32-bit kernel lacks what no other may.
    assert ("hot-add" in shipped_baseline(guest)) is guest.endswith("-pae")


@pytest.mark.parametrize("guest", FULL_GUESTS)
def test_a_complete_guest_may_lack_nothing(guest: str) -> None:
    assert shipped_baseline(guest) == frozenset()
