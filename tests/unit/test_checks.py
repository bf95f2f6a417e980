"""Of ``make checks``: what it takes for a check, and that it tells what no test notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from checks import exceptions
from checks.__main__ import default_modules
from checks.find import SEE, Check, rewrite
from checks.tree import PACKAGE

TESTS = Path(__file__).resolve().parents[1]
MADE_UP = '''
"""A module to be tried."""

from __future__ import annotations


def parse(data: bytes) -> int:
    if len(data) < 2:
        raise ValueError("short")
    if data[0] > 9 or data[1] > 9:
        raise ValueError("large")
    if data == b"xy":
        raise ValueError("never met")
    return data[0]


def rounds(step: int) -> int:
    left, done = 8, 0
    while left > 0:
        if step <= 0:
            raise ValueError("for ever")
        left, done = left - step, done + 1
    return done
'''
ITS_TESTS = """
import pytest
from hvhost.made.protocol import parse, rounds

LAST = []


@pytest.mark.parametrize("data", [b"", b"\\x0a\\x00", b"\\x0a\\x0a"])
def test_wrong(data):
    with pytest.raises(ValueError, match="short|large"):
        parse(data)


def test_right():
    assert parse(b"\\x01\\x02") == 1 and rounds(2) == 4


def test_for_ever():
    with pytest.raises(ValueError):
        rounds(0)


def test_fails_anyway():
    with pytest.raises(ValueError):
        parse(b"\\x01\\x0a")
    assert False


def test_needs_another_before_it():
    LAST.append(1)


def test_fails_alone():
    with pytest.raises(ValueError):
        parse(b"\\x01\\x0b")
    assert LAST
"""
REASONS = """
[[unnoticed]]
file = "made/protocol.py"
function = "parse"
condition = "data == b'xy'"
reason = "Made up."
"""


def found(source: str) -> list[Check]:
    text, checks = rewrite(dedent(source), "made/up.py")
    compile(text, "up.py", "exec")
    return checks


def parts(source: str) -> list[tuple[str, bool]]:
    return [(check.part, check.neutral) for check in found(source)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("if a: raise X", [("a", False)]),
        ("if a: return", [("a", False)]),
        ("if a: return Status.INVALID_HANDLE", [("a", False)]),
        ("if a: self.fault('why')", [("a", False)]),
        ("if a: pass\n    else: raise X", [("a", True)]),
        ("if a: pass\n    elif b: raise X", [("b", False)]),
        ("if a or b: raise X", [("a or b", False), ("a", False), ("b", False)]),
        ("if not (a and b): raise X", [("not (a and b)", False), ("a", True), ("b", True)]),
        (
            "if not 0 <= a < f(): raise X",
            [("not 0 <= a < f()", False), ("0 <= a", True), ("a < f()", True)],
        ),
        ("if a: b = 1", []),
        ("if a: return b + 1", []),
        ("assert a", []),
    ],
)
def test_what_a_check_is(body: str, expected: list[tuple[str, bool]]) -> None:
    assert parts(f"def f():\n    {body}\n") == expected


def test_what_a_predicate_returns_has_checks() -> None:
    assert parts("def f() -> bool:\n    return a and b\n") == [("a", True), ("b", True)]
    assert parts("def f() -> int:\n    return a and b\n") == []


def test_only_functions_have_checks_and_they_are_told_apart() -> None:
    assert not found("if a: raise X\n")
    source = """
        class C:
            def f(self):
                if a: raise X
                if a: raise X
        """
    assert [(check.function, check.line, check.twin) for check in found(source)] == [
        ("C.f", 4, 0),
        ("C.f", 5, 1),
    ]


def test_a_module_may_have_a_check_of_its_own() -> None:
    source = "def _check(a):\n    return a > 1\ndef f(a):\n    if not _check(a): raise ValueError\n"
    text, _ = rewrite(source, "made/up.py")
    text = text.replace(f"from hvhost.check_switch import see as {SEE}", "")
    names: dict[str, object] = {SEE: lambda number, neutral, value: value}
    exec(text, names)
    names["f"](2)  # type: ignore[operator]
    with pytest.raises(ValueError):
        names["f"](1)  # type: ignore[operator]


def test_a_chain_is_looked_at_once() -> None:
    """What is between two comparisons is worked out once, as it was."""
    text, _ = rewrite("def f(g):\n    if not 0 < g() < 3: raise ValueError\n", "made/up.py")
    text = text.replace(f"from hvhost.check_switch import see as {SEE}", "")
    names: dict[str, object] = {SEE: lambda number, neutral, value: value}
    exec(text, names)
    calls: list[int] = []

    def two() -> int:
        calls.append(1)
        return 2

    names["f"](two)  # type: ignore[operator]
    assert calls == [1]
    with pytest.raises(ValueError):
        names["f"](lambda: 3)  # type: ignore[operator]


def made_up(root: Path, reasons: str) -> None:
    for name, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["src"]\nmarkers = ["guest"]\n',
        "src/hvhost/__init__.py": "",
        "src/hvhost/made/protocol.py": MADE_UP,
        "tests/unit/test_made_up.py": ITS_TESTS,
        "tests/checks/exceptions.toml": reasons,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def try_checks(root: Path, *arguments: str) -> tuple[int, str]:
    code = (
        "import sys, checks.forks; from pathlib import Path; from checks.__main__ import main\n"
        "checks.forks.PROCESSOR_SECONDS = 2\n"
        f"sys.exit(main({list(arguments)!r}, Path({str(root)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_what_no_test_notices_is_told(tmp_path: Path) -> None:
    made_up(tmp_path, REASONS)
    status, output = try_checks(tmp_path, "--json", "out.json", *("--tests", "tests"))
    assert status == 1, output
    results = {each["part"]: each for each in json.loads((tmp_path / "out.json").read_text())}
    noticed = {part: bool(each["noticed"]) for part, each in results.items()}
    assert noticed == {
        "len(data) < 2": True,
        "data[0] > 9 or data[1] > 9": True,
        "data[0] > 9": True,
        "data[1] > 9": False,
        "data == b'xy'": False,
        "step <= 0": True,
    }
    assert results["step <= 0"]["hung"] and not results["len(data) < 2"]["hung"]
    told = [line for line in output.splitlines() if line.startswith("unnoticed (")]
    assert len(told) == 1
    assert "src/hvhost/made/protocol.py:10: parse: data[1] > 9  in  data[0] > 9 or" in told[0]
    assert "its place: tests/unit/test_made_up.py::test_fails_anyway" in output
    assert "6 checks, 1 unnoticed, 1 with a reason" in output
    assert (tmp_path / "src/hvhost/made/protocol.py").read_text() == MADE_UP


def test_an_exception_must_be_needed(tmp_path: Path) -> None:
    made_up(tmp_path, REASONS.replace("data == b'xy'", "len(data) < 2"))
    status, output = try_checks(tmp_path, "--tests", "tests")
    assert status == 1
    assert "needs no exception: made/protocol.py: parse: len(data) < 2" in output


def test_one_line_can_be_tried(tmp_path: Path) -> None:
    made_up(tmp_path, REASONS)
    status, output = try_checks(tmp_path, "made/protocol.py:8", "--tests", "tests")
    assert (status, "1 checks, 0 unnoticed" in output) == (0, True), output
    status, output = try_checks(tmp_path, "made/protocal.py")
    assert (status, "there is no made/protocal.py" in output) == (1, True)


def test_every_exception_names_a_check() -> None:
    checks = [
        check
        for file in default_modules()
        for check in rewrite((PACKAGE / file).read_text(), file)[1]
    ]
    assert len(checks) > 1000
    assert not exceptions.idle(exceptions.read(), [], checks)


def test_all_protocol_modules_are_tried() -> None:
    tried = set(default_modules())
    protocols = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*protocol.py")}
    assert len(protocols) > 8 and protocols <= tried
