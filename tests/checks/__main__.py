"""Take out one check after another, and see whether a test notices.

A MODULE is a file below src/hvhost, like vmbus/ring.py; vmbus/ring.py:120 is the checks of that
line. Without any, all modules are tried that read what a guest, or an image, wrote.
Tests run in forks, each check with those only that can notice, in a copy of the sources: nothing
is written here but build/checks.json, which keeps what tests touch. A check whose removal no test
notices is printed, and the exit status is 1, unless tests/checks/exceptions.toml tells the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from checks import exceptions
from checks.find import Check
from checks.notes import Notes
from checks.session import Proof, Verdict, location
from checks.tree import PACKAGE, ROOT, Tree

#: What reads bytes that guests or images wrote.
MODULES = (
    "*/protocol.py", "*/*_protocol.py", "wire.py",
    *(f"vmbus/{name}.py" for name in ("gpadl", "ring", "channel", "saved", "server")),
    *(f"partition/{name}.py" for name in ("hypercall", "memory", "synic", "processor", "crash")),
    *(f"chipset/{name}.py" for name in ("ports", "pm", "rtc", "uart")),
    "storage/*.py",
    *(f"network/{name}.py" for name in (
        "receive", "transmit", "control", "device", "buffers", "frame", "merge", "ndis", "rndis",
        "leases", "switch", "toeplitz", "wires",
    )),
    "services/*.py", "sockets/*.py",
    *(f"memory/{name}.py" for name in ("area", "device", "peripheral")),
    *(f"firmware/{name}.py" for name in ("content", "extract", "image", "linux", "pvh")),
    *(f"guests/{name}.py" for name in ("cpio", "deb", "elf", "modules")),
)  # fmt: skip


def default_modules(package: Path = PACKAGE) -> list[str]:
    """Files of :data:`MODULES`, from *package* on."""
    found = {path for pattern in MODULES for path in package.glob(pattern)}
    return sorted(str(path.relative_to(package)) for path in found)


def wanted(words: Sequence[str], package: Path = PACKAGE) -> dict[str, set[int]]:
    """Files and lines asked for; no lines stand for all."""
    result: dict[str, set[int]] = {}
    for word in words:
        name, _, line = word.partition(":")
        path = Path(name)
        file = os.path.relpath(path, package) if path.exists() else name
        if not (package / file).is_file() or (line and not line.isdigit()):
            raise SystemExit(
                f"checks: there is no {word} in src/hvhost; name it like vmbus/ring.py."
            )
        lines = result.setdefault(file, set())
        if line:
            lines.add(int(line))
    return result


def summary(verdicts: Sequence[Verdict], exempt: Sequence[exceptions.Exempt]) -> list[str]:
    """For each module, how many checks and how many of them unnoticed."""
    total = Counter(each.check.file for each in verdicts)
    without = [each.check for each in verdicts if not each.noticed]
    reasoned = Counter(c.file for c in without if any(e.is_for(c) for e in exempt))
    unnoticed = Counter(check.file for check in without) - reasoned
    lines = []
    for file, count in sorted(total.items()):
        line = f"{file:34}{count:5} checks, {unnoticed[file]} unnoticed"
        lines.append(line + (f", {reasoned[file]} with a reason" if reasoned[file] else ""))
    return lines


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        prog="make checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument(
        "--tests", nargs="+", default=["tests/unit", "tests/simulated"], metavar="PATH",
        help="tests to choose from (default: all but those on real guests)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--fresh", action="store_true", help="forget what tests touch")
    options = parser.parse_args(arguments)

    package = root / "src" / "hvhost"
    asked = wanted(options.modules, package)
    files = sorted({*default_modules(package), *asked})
    screen = os.fdopen(os.dup(1), "w", buffering=1)
    store = root / "build" / "checks.json"
    if options.fresh:
        store.unlink(missing_ok=True)

    def is_wanted(check: Check) -> bool:
        lines = asked.get(check.file)
        return not asked or (lines is not None and (not lines or check.line in lines))

    with tempfile.TemporaryDirectory(prefix="hvhost-checks-") as directory:
        tree = Tree.make(package, files, Path(directory))
        tree.use()
        proof = Proof(tree, root, Notes(store), is_wanted, lambda line: print(line, file=screen))
        status = pytest.main(
            [
                *("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler"),
                *("-m", "not guest", "--no-summary"),
                *tree.pytest_options(root),
                *options.tests,
            ],
            plugins=[proof],
        )
    if status != pytest.ExitCode.OK:
        print("checks: stopped; nothing here was changed.", file=sys.stderr)
        return 2
    exempt = exceptions.read(root / "tests" / "checks" / "exceptions.toml")
    return report(proof, asked, exempt, options.json)


def report(
    proof: Proof,
    asked: dict[str, set[int]],
    exempt: Sequence[exceptions.Exempt],
    path: Path | None,
) -> int:
    """Tell what came out; the exit status."""
    unnoticed = [
        each
        for each in proof.verdicts
        if not each.noticed and not any(e.is_for(each.check) for e in exempt)
    ]
    noticed = [each.check for each in proof.verdicts if each.noticed]
    whole = {each.check.file for each in proof.verdicts if not asked.get(each.check.file)}
    idle = exceptions.idle(
        [each for each in exempt if each.file in whole], noticed, proof.tree.checks
    )
    if path is not None:
        rows = [
            {**asdict(each.check), "noticed": each.noticed, "hung": each.hung, "tests": each.tests}
            for each in proof.verdicts
        ]
        path.write_text(json.dumps(rows, indent=1))
    for test in sorted(proof.unfit):
        print(f"not used, as it fails with every check in its place: {test}")
    print("\n".join(summary(proof.verdicts, exempt)))
    for each in unnoticed:
        tests = f"{each.tests} tests meet it" if each.tests else "no test meets it"
        print(f"unnoticed ({tests}): {location(proof.tree, each.check)}")
    for text in idle:
        print(f"exceptions.toml has what needs no exception: {text}")
    return 1 if unnoticed or idle else 0


if __name__ == "__main__":
    sys.exit(main())
