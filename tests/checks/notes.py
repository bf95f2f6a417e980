"""Which tests can notice the absence of which checks: noted once, kept for each file of tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True)
class FileNotes:
    """Of one file of tests: how long each takes, which fail anyway, what the others touch."""

    digest: str
    seconds: dict[str, float] = field(default_factory=dict)
    failing: list[str] = field(default_factory=list)
    touched: dict[str, list[str]] = field(default_factory=dict)  # tests by a check's key


def digest(parts: Iterable[Path], *texts: str) -> str:
    """A name for the contents of *parts* and *texts*."""
    value = hashlib.sha256("\0".join(texts).encode())
    for path in sorted(parts):
        value.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return value.hexdigest()[:32]


class Notes:
    """Notes of many files of tests, in one file *path*."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, FileNotes] = {}
        if path.exists():
            stored = json.loads(path.read_text())
            self._files = {name: FileNotes(**each) for name, each in stored.items()}

    def is_fresh(self, file: str, wanted: str) -> bool:
        """Whether *file* is noted as it is now."""
        return file in self._files and self._files[file].digest == wanted

    def put(self, file: str, notes: FileNotes) -> None:
        """Replace what is noted of *file*."""
        self._files[file] = notes

    def save(self) -> None:
        """Write them all; what was there is replaced in one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({name: asdict(each) for name, each in self._files.items()}))
        new.replace(self._path)

    def failing(self, files: Sequence[str]) -> list[str]:
        """Tests that fail though no check is out."""
        return [test for file in files for test in self._files[file].failing]

    def tests_of(self, key: str, files: Sequence[str]) -> list[tuple[float, str]]:
        """Tests of *files* that could notice, and their seconds; the quickest first."""
        found = []
        for each in (self._files[file] for file in files):
            found += [(each.seconds[test], test) for test in each.touched.get(key, ())]
        return sorted(found)
