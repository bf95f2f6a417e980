"""The rewritten sources, in a temporary directory, and how Python is made to use them."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checks import switch
from checks.find import SWITCH, Check, rewrite

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "hvhost"


@dataclass(frozen=True, slots=True)
class Tree:
    """A copy of *package* below *directory* in which all *checks* have a switch."""

    package: Path
    directory: Path
    checks: list[Check]

    @classmethod
    def make(cls, package: Path, files: Iterable[str], directory: Path) -> Tree:
        """Copy *package* to *directory*, with the *files* named from it rewritten."""
        copy = directory / package.name
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        checks: list[Check] = []
        for file in files:
            text, found = rewrite((package / file).read_text(), file, len(checks))
            (copy / file).write_text(text)
            checks += found
        shutil.copy(switch.__file__, copy / f"{SWITCH.rpartition('.')[2]}.py")
        return cls(package, directory, checks)

    def use(self) -> None:
        """Have this process, and those it starts, import the copy."""
        sys.path.insert(0, str(self.directory))
        others = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.directory), others]))
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

    def pytest_options(self, root: Path) -> list[str]:
        """What makes pytest take the copy, where *root*'s pyproject names ``src``."""
        options = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["pytest"]
        folders = options["ini_options"]["pythonpath"]
        paths = [str(self.directory if each == "src" else root / each) for each in folders]
        return ["-o", f"pythonpath={shlex.join(paths)}", f"--basetemp={self.directory / 'pytest'}"]
