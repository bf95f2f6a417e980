"""How ``hvhost memory`` shows what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hvhost.cli import output
from hvhost.memory.report import MemoryInfo
from hvhost.units import GIB, MIB, format_size

LOOK_SECONDS = 1.0
_ROWS = 12
_MARGIN = 10
_COLUMNS_MIN = 10
_LEVELS = "▁▂▃▄▅▆▇█"


def show(info: MemoryInfo, *, json: bool) -> None:
    """One machine's memory, for people or for programs."""
    if json:
        output.print_json(info)
        return
    rows = output.table("MEMORY", "SIZE")
    for label, text in lines(info):
        rows.add_row(label, text)
    output.print_renderable(rows)


def lines(info: MemoryInfo) -> list[tuple[str, str]]:
    """What there is to say of *info*, in order."""
    parts = f"{_size(info.startup)} at start"
    if info.added:
        parts += f", {_size(info.added)} added"
    if info.ballooned:
        parts += f", {_size(info.ballooned)} given back"
    found = [
        ("assigned", f"{_size(info.assigned)} ({parts})"),
        ("resident", f"{_size(info.resident)} of this computer's memory"),
    ]
    if info.demand is not None and info.needed is not None:
        found += [
            ("demand", f"{_size(info.demand)} ({info.pressure} % of assigned)"),
            ("needed", f"{_size(info.needed)} with what the guest keeps free"),
        ]
    else:
        found.append(("demand", "not told yet"))
    limits = info.dynamic
    if limits is None:
        found.append(("limits", f"fixed; can be set up to {_size(info.ceiling)}"))
    else:
        found.append(
            (
                "limits",
                f"dynamic, {_size(limits.minimum)} to {_size(limits.maximum)}, "
                f"buffer {limits.buffer} %, weight {limits.weight}",
            )
        )
    driver = info.driver if info.version is None else f"{info.driver}, version {info.version}"
    if info.work != "idle":
        driver += f", {info.work} for {info.work_seconds:.0f} s"
    found.append(("driver", driver))
    if info.problem is not None:
        found.append(("problem", info.problem))
    return found


def _size(size: int) -> str:
    return format_size(size) if size % GIB == 0 else f"{size / MIB:.1f} MiB".replace(".0 ", " ")


def watch(name: str, look: Callable[[], MemoryInfo], *, json: bool = False) -> None:
    """Draw until interrupted; or with *json* print an object a line."""
    if json:
        while True:
            output.print_json_line(look())
            time.sleep(LOOK_SECONDS)
    console = Console()
    history: list[MemoryInfo] = []
    with Live(console=console, auto_refresh=False) as live:
        while True:
            columns = max(_COLUMNS_MIN, console.width - _MARGIN)
            history = [*history, look()][-columns:]
            live.update(Text(chart(name, history)), refresh=True)
            time.sleep(LOOK_SECONDS)


def chart(name: str, history: Sequence[MemoryInfo]) -> str:
    """Assigned memory as a shaded area, demand as dots in it, below it the pressure."""
    top = max(max(each.assigned, each.demand or 0) for each in history) or 1
    rows = []
    for row in range(_ROWS, 0, -1):
        label = f"{top * row / _ROWS / MIB:6.0f} M" if row in (_ROWS, _ROWS // 2) else " " * 8
        cells = []
        for each in history:
            demand_row = None if each.demand is None else max(1, -(-each.demand * _ROWS // top))
            filled = each.assigned * _ROWS >= top * (row - 0.5)
            cells.append("●" if demand_row == row else "░" if filled else " ")
        rows.append(f"{label} {''.join(cells)}")
    rows.append(f"pressure {''.join(_level(each.pressure) for each in history)}")
    last = history[-1]
    demand = "not told" if last.demand is None else f"{_size(last.demand)} ({last.pressure} %)"
    rows.append(
        f"{name}: ░ assigned {_size(last.assigned)}  ● demand {demand}  "
        f"resident {_size(last.resident)}  {last.work}"
    )
    return "\n".join(rows)


def _level(pressure: int | None) -> str:
    """How full a guest is whose demand is *pressure* percent of what it has; ``!`` beyond that."""
    if pressure is None:
        return " "
    if pressure > 100:
        return "!"
    return _LEVELS[min(pressure * len(_LEVELS) // 100, len(_LEVELS) - 1)]
