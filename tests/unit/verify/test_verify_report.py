"""What a person sees: neither empty groups nor rows that nobody ran."""

from __future__ import annotations

import io

from rich.console import Console

from hvhost.verify.contract import Status, find_rows
from hvhost.verify.report import Reporter, render_table
from hvhost.verify.results import RowResult, VerifyReport


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_only_groups_with_rows_are_in_the_table() -> None:
    (row,) = find_rows(["kvp"], option="--rows")
    report = VerifyReport({}, {}, (RowResult(row, Status.WORKS, 1.0, ("it does",)),))
    console = a_console()
    console.print(render_table(report))
    assert row.group in shown(console) and "it does" in shown(console)
    assert "Storage" not in shown(console) and "Memory" not in shown(console)


def test_rows_that_are_missing_are_not_told_while_it_runs() -> None:
    first, second = find_rows(["smp", "dda"], option="--rows")
    console = a_console()
    reporter = Reporter(console)
    reporter.row_done(RowResult(second, Status.MISSING, evidence=("not in hvhost yet",)))
    assert shown(console) == ""
    reporter.row_done(RowResult(first, Status.FAILS, 1.0, ("it does not",)))
    assert "smp" in shown(console) and "it does not" in shown(console)
