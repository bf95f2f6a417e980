"""What stands in README and docs is true: commands, links, code, tables."""

from __future__ import annotations

import html
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from hvhost.cli.app import app
from hvhost.guests.catalog import FULL_GUESTS, GUESTS
from hvhost.verify.contract import ROWS
from hvhost.verify.rows import PROOFS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WRITTEN = [page for page in PAGES if page.name != "cli.md"]


def code_blocks(page: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in blocks if language in languages]


def shell_commands(page: Path) -> list[list[str]]:
    """Words of each command in a page: in its blocks, and in single backticks."""
    text = page.read_text()
    lines = re.findall(r"`((?:hvhost|make) [^`\n]+)`", text)
    for block in code_blocks(page, "sh", "yaml"):
        lines += [re.sub(r"^\s*- run: ", "", line) for line in block.splitlines()]
    commands: list[list[str]] = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word.strip("|&;"):
                words.append(word)
            elif words:
                commands.append([words[0].rpartition("/")[2], *words[1:]])
                words = []
    return commands


def hvhost_commands(page: Path) -> list[list[str]]:
    return [words[1:] for words in shell_commands(page) if words[0] == "hvhost"]


@cache
def commands() -> Any:
    """The whole command line; made once, which takes its time."""
    return typer.main.get_command(app)


def check_command(words: list[str]) -> None:
    """*words* name a command of the CLI, and only options that it has."""
    command = commands()
    own = words[: words.index("--")] if "--" in words else words
    position = 0
    for position, word in enumerate(own):  # noqa: B007
        members = getattr(command, "commands", {})
        if not members:
            break
        if word.startswith("-"):
            continue
        takes_words = any(each.param_type_name == "argument" for each in command.params)
        assert word in members or takes_words, f"hvhost {' '.join(words)}: there is no {word}"
        command = members.get(word, command)
    else:
        position = len(own)
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in own[position:]:
        option = word.partition("=")[0]
        if option.startswith("--") and option != "--":
            assert option in known, f"hvhost {' '.join(words)}: there is no option {option}"
    for option, value in pairwise(own):
        if option == "--guest" and value.isascii() and value.islower():
            assert value in GUESTS or value in FULL_GUESTS, (
                f"hvhost {' '.join(words)}: there is no guest {value}"
            )
        if option == "--rows" and value.islower():
            assert set(value.split(",")) <= {row.id for row in ROWS}, words


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in hvhost_commands(page):
        check_command(words)
    for words in shell_commands(page):
        if words[0] == "make" and "linux" not in words:  # which has a Makefile of its own
            named = {word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)}
            assert named - {"hvhost"} <= targets, words


def test_the_check_of_commands_can_fail() -> None:
    for wrong in ("verfy", "verify --gest debian-12", "rig start", "verify --guest debian-7"):
        with pytest.raises(AssertionError, match="there is no"):
            check_command(wrong.split())
    readme = hvhost_commands(ROOT / "README.md")
    assert ["doctor"] in readme and any("--deb" in words for words in readme)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "#")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve()
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"


def test_every_page_of_the_docs_is_in_their_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def generated(expression: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", f"import generate; print({expression}, end='')"],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_generated_docs_are_up_to_date() -> None:
    assert (ROOT / "docs/cli.md").read_text() == generated("generate.cli_page()"), "run `make docs`"
    readme = (ROOT / "README.md").read_text()
    assert readme == generated("generate.with_rows(generate.README.read_text())"), "run `make docs`"


def test_the_readme_names_the_rows_that_work() -> None:
    readme = (ROOT / "README.md").read_text()
    named = re.findall(r"^\| `([a-z-]+)` \|", readme, re.MULTILINE)
    assert named == [row.id for row in ROWS if row.id in {proof.row_id for proof in PROOFS}]
    assert f"contract of {len(ROWS)} rows" in readme
    assert f"The other {len(ROWS) - len(PROOFS)} rows are `missing`" in readme


def test_the_readmes_picture_is_of_a_real_run() -> None:
    """Of all rows, in the contract's order, of which those work that the README says work."""
    readme = (ROOT / "README.md").read_text()
    (picture,) = re.findall(r"!\[The table that hvhost verify prints\]\((\S+)\)", readme)
    svg = html.unescape(re.sub(r"<[^>]+>", "\n", (ROOT / picture).read_text()))
    cells = [line.strip() for line in svg.splitlines()]
    assert re.search(r"^\s*Linux\s\d+\.\d+\S*\s\(Debian\s", svg, re.MULTILINE)
    rows = [row.id for row in ROWS]
    assert [cell for cell in cells if cell in rows] == rows
    statuses = [cell for cell in cells if cell[:1] in {*"✔✘○◌·"}]
    assert len(statuses) == len(rows)
    told = {word: sum(word in each for each in statuses) for word in ("works", "lacks", "missing")}
    assert sum(told.values()) == len(rows), "none fails"
    assert told["missing"] == len(ROWS) - len(PROOFS)


def test_the_device_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = ModuleType("device_guide")
    monkeypatch.setitem(sys.modules, guide.__name__, guide)
    for block in code_blocks(ROOT / "docs/adding-a-device.md", "python"):
        exec(compile(block, "adding-a-device.md", "exec", dont_inherit=True), guide.__dict__)
    tests = [value for name, value in vars(guide).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_python_in_the_docs_has_its_types_right(tmp_path: Path) -> None:
    files = []
    for page in WRITTEN:
        joined = page.name == "adding-a-device.md"  # one module, told in pieces
        blocks = code_blocks(page, "python")
        for number, block in enumerate(["\n\n".join(blocks)] if joined and blocks else blocks):
            file = tmp_path / f"{page.stem.replace('-', '_').lower()}_{number}.py"
            file.write_text(block)
            files.append(str(file))
    assert len(files) >= 3
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_installed_is_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for requirement in wanted:
        name = re.split(r"[<>=~!]", requirement)[0]
        assert name in pinned, f"constraints.txt does not pin {name}"


@pytest.mark.parametrize("words", [["bash", "-n", "scripts/setup"], ["bash", "-n", ".ci/run"]])
def test_scripts_are_bash(words: list[str]) -> None:
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == 0


def test_set_up_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        ["scripts/setup", "everything"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage: scripts/setup [dev]" in done.stderr


def test_every_room_is_in_the_table_of_rooms() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`(\w+)/`", "\n".join(re.findall(r"^\| `.*$", table, re.MULTILINE))))
    assert named == {each.parent.name for each in (ROOT / "src/hvhost").glob("*/__init__.py")}
