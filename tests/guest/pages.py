"""Commands that a page of the docs has people type, typed."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from guest.helpers import hvhost, wait_for

DOCS = Path(__file__).resolve().parents[2] / "docs"
BOOT_SECONDS = 240.0


def block(page: str, heading: str, language: str = "sh") -> str:
    """The first code block in *language* below *heading* of *page*."""
    below = re.split(rf"^#+ {re.escape(heading)}$", (DOCS / page).read_text(), flags=re.M)[1]
    part = below.partition("\n## ")[0]
    found = re.search(rf"^( *)```{language}\n(.*?)^ *```", part, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page} has no block of {language} below {heading}"
    return "".join(line.removeprefix(found[1]) for line in found[2].splitlines(keepends=True))


def commands(page: str, heading: str) -> list[list[str]]:
    """The words of each hvhost command in the first shell block below *heading* of *page*."""
    found = [shlex.split(line, comments=True) for line in block(page, heading).splitlines()]
    assert all(words[0] == "hvhost" for words in found)
    return [words[1:] for words in found]


def do(words: list[str], boot_seconds: float = BOOT_SECONDS) -> str:
    """Run a command of the page; a machine that is started is waited for."""
    result = hvhost(*words, timeout=200)
    assert result.returncode == 0, f"hvhost {' '.join(words)}: {result.stdout}{result.stderr}"
    if words[0] == "run":
        name = words[words.index("--name") + 1]
        ready = ["exec", name, "--", "test", "-e", "/run/hvhost-ready"]
        wait_for(f"the boot of {name}", lambda: not hvhost(*ready).returncode, boot_seconds)
    return result.stdout


def inside(name: str, script: str) -> str:
    """Standard output of a shell script in the guest of machine *name*; it must succeed."""
    return do(["exec", name, "--", "sh", "-c", script])


@contextlib.contextmanager
def ended(*machines: str, switch: str = "") -> Iterator[None]:
    """Afterwards there is none of these machines, and no such switch."""
    try:
        yield
    finally:
        for name in machines:
            hvhost("stop", "--force", name)
        if switch:
            hvhost("net", "delete", switch)
