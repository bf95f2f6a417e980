"""Write what the docs take from the program itself: ``make docs``.

That is docs/cli.md, made of the help pages, and the table of rows in README.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import typer

CLI_PAGE = Path(__file__).with_name("cli.md")
README = Path(__file__).parents[1] / "README.md"

PREFACE = """\
# Commands

Every command says this itself with `--help`. This page is made of those texts; `make docs` makes it
anew.
"""


@cache
def command_line() -> Any:
    """All commands; made once, which takes its time."""
    from hvhost.cli.app import app

    return typer.main.get_command(app)


def help_page(words: list[str]) -> str:
    """What ``hvhost WORDS --help`` prints, 80 columns wide."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        command_line()([*words, "--help"], prog_name="hvhost")
    return "\n".join(line.rstrip() for line in output.getvalue().strip().splitlines())


def command_words() -> list[list[str]]:
    """The words of every command, groups before their members.

    With the arguments of a group, such as NAME, before the member's own name.
    """
    found: list[list[str]] = [[]]

    def walk(command: Any, words: list[str]) -> None:
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        names = [each.metavar for each in arguments]
        for name, member in getattr(command, "commands", {}).items():
            found.append([*words, *names, name])
            walk(member, [*words, *names, name])

    walk(command_line(), [])
    return found


def cli_page() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "80"
    pages = [
        f"## {' '.join(['hvhost', *words])}\n\n```text\n{help_page(words)}\n```\n"
        for words in command_words()
    ]
    return "\n".join([PREFACE, *pages])


def rows_table() -> str:
    """The rows that this hvhost proves, in the contract's order, and how many it does not."""
    from hvhost.verify.contract import ROWS
    from hvhost.verify.rows import PROOFS

    proofs = {proof.row_id: proof for proof in PROOFS}
    lines = [
        "| row | what the user gets | what `hvhost verify` proves in the guest |",
        "|---|---|---|",
    ]
    for row in ROWS:
        if row.id in proofs:
            summary = (proofs[row.id].prove.__doc__ or "").strip().partition("\n\n")[0]
            summary = " ".join(summary.split()).removesuffix(".")
            lines.append(f"| `{row.id}` | {row.title} | {summary} |")
    return "\n".join([*lines, "", f"The other {len(ROWS) - len(PROOFS)} rows are `missing`.\n"])


def with_rows(readme: str) -> str:
    """*readme* with its table of rows made anew."""
    start, end = "<!-- rows: written by make docs -->\n", "<!-- end of rows -->"
    head, _, rest = readme.partition(start)
    return f"{head}{start}{rows_table()}{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    README.write_text(with_rows(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{CLI_PAGE} and the rows in {README} written", file=sys.stderr)
