"""What a person sees of a verification: progress while it runs, the table when it ends."""

from __future__ import annotations

import io
import re
import threading
from types import TracebackType
from typing import Self

from rich.box import HORIZONTALS
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hvhost.verify.contract import GROUPS, Row, Status
from hvhost.verify.results import RowResult, VerifyReport

SYMBOLS = {
    Status.WORKS: ("✔", "green"),
    Status.FAILS: ("✘", "bold red"),
    Status.GUEST_LACKS: ("○", "yellow"),
    Status.HOST_LACKS: ("◌", "magenta"),
    Status.MISSING: ("·", "dim"),
}


def _status(status: Status) -> Text:
    symbol, style = SYMBOLS[status]
    return Text(f"{symbol} {status.value}", style=style)


def _evidence(result: RowResult) -> Text:
    return Text(result.evidence[0] if result.evidence else "", style=_dimmed(result))


def _dimmed(result: RowResult) -> str:
    return "dim" if result.status is Status.MISSING else ""


def render_table(report: VerifyReport) -> Table:
    """The contract's table: rows under their groups, one line of evidence each."""
    kernel, system = report.guest.get("kernel", "?"), report.guest.get("os", "?")
    table = Table(title=f"Linux {kernel} ({system}) on Hyper-V", title_justify="left")
    table.add_column("row", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("evidence", overflow="fold")
    for group in GROUPS:
        members = [result for result in report.results if result.row.group == group]
        if not members:
            continue
        table.add_section()
        table.add_row(Text(group, style="bold"), "", "", "")
        for result in members:
            table.add_row(
                Text(f"  {result.row.id}", style=_dimmed(result)),
                _status(result.status),
                f"{result.seconds:.1f}" if result.seconds else "",
                _evidence(result),
            )
    return table


def render_report(report: VerifyReport, failed: tuple[RowResult, ...]) -> RenderableType:
    """The table, then what a maintainer needs to act on: findings and each failure's evidence."""
    parts: list[RenderableType] = [render_table(report)]
    if report.finding:
        parts.append(Panel(Text("\n".join(report.finding)), title="finding", border_style="red"))
    for result in failed:
        further = tuple(line for line in result.evidence[1:] if line not in report.finding)
        if further:
            text = Text("\n".join((result.evidence[0], *further)))
            parts.append(Panel(text, title=result.row.id, border_style="red"))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    counts = dict.fromkeys(Status, 0)
    for result in report.results:
        counts[result.status] += 1
    parts.append(
        Text(", ".join(f"{count} {status.value}" for status, count in counts.items() if count))
    )
    if failed:  # last, for whoever looks at the end of it only
        names = ", ".join(result.row.id for result in failed)
        parts.append(Text(f"FAILED: {names}", style="bold red"))
    return Group(*parts)


def render_svg(report: VerifyReport, *, width: int = 124) -> str:
    """The table as an SVG picture of a terminal, *width* columns wide."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    table = render_table(report)
    table.box = HORIZONTALS  # vertical lines would have gaps between the lines of text
    console.print(table)
    picture = console.export_svg(title="hvhost verify")
    # A picture that fetches no fonts looks the same everywhere.
    return re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)


class Reporter:
    """Says what happens: a live line where a person looks on, plain lines otherwise.

    Use as a context manager around the run.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._row: Row | None = None
        self._live: Live | None = None
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._total = self._progress.add_task("verify")
        self._current = self._progress.add_task("")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, text: str) -> None:
        """What is being done now."""
        with self._lock:
            line = f"{self._row.id}: {text}" if self._row else text
            if self._live is None:
                self._console.print(Text(line), soft_wrap=True)
            else:
                self._progress.reset(self._current, description=line)

    def row_started(self, row: Row) -> None:
        self._row = row
        self.step(row.title)

    def row_done(self, result: RowResult) -> None:
        self._row = None
        if result.status is Status.MISSING:
            return
        line = Text.assemble(_status(result.status), f"  {result.row.id}  {result.seconds:.1f} s  ")
        line.append_text(_evidence(result))
        with self._lock:
            self._console.print(line, soft_wrap=True)
