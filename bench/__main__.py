"""``python -m bench [--only NAME,…] [--json FILE] [--rounds N]``: measures, prints, writes JSON.

Absolute figures are of this computer and its load; what can be compared is a ratio, to a peer or
to a limit measured in the same run. Where the peer did not run there is no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cases import CASES
from bench.measurement import Measurement
from hvhost.errors import HvHostError


def table(measurements: list[Measurement]) -> Table:
    """The figures as people read them."""
    result = Table(title="hvhost figures", title_justify="left")
    for heading in ("case", "figure", "value", "beside", "ratio"):
        result.add_column(heading, justify="right" if heading in ("value", "ratio") else "left")
    for m in measurements:
        beside = "" if m.beside is None else f"{m.beside_name}: {m.beside:.4g} {m.unit}"
        ratio = "" if m.ratio is None else f"{m.ratio:.2f}"
        result.add_row(m.case, m.figure, f"{m.value:.4g} {m.unit}", beside, ratio)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help=f"cases, of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, default=Path("bench-results.json"))
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of slow cases")
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name] or list(CASES)
    if unknown := set(chosen) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    try:
        options.json.open("a").close()  # not after an hour
    except OSError as error:
        parser.error(f"{options.json} cannot be written: {error.strerror}")
    console = Console(stderr=True)
    measurements: list[Measurement] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="hvhost-bench-") as directory:
        os.environ.setdefault("HVHOST_RUNTIME_DIR", directory)
        for name in chosen:
            console.print(f"measuring {name}…")
            try:
                for each in CASES[name](options.rounds):  # what came before an error counts
                    console.print(f"  {each.figure}: {each.value:.4g} {each.unit}")
                    measurements.append(each)
            except (HvHostError, OSError, subprocess.SubprocessError) as error:
                console.print(f"{name}: {error}", markup=False)
                failed = True
    Console().print(table(measurements))
    computer = {"machine": platform.machine(), "kernel": platform.release(), "cpus": os.cpu_count()}
    rows = [{**asdict(m), "ratio": m.ratio} for m in measurements]
    options.json.write_text(
        json.dumps({"schema": 1, "computer": computer, "figures": rows}, indent=1) + "\n"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
