"""What a check sees. Copied into the rewritten sources; nothing of ours is imported here.

Programs that a test starts learn from the environment which check is out, and where to note.
"""

from __future__ import annotations

import os
from contextlib import suppress

OUT = "HVHOST_CHECK_OUT"
NOTES = "HVHOST_CHECK_NOTES"

out = int(os.environ.get(OUT, "-1"))
notes = os.environ.get(NOTES, "")
_noted: set[tuple[int, str]] = set()


def see(number: int, neutral: bool, value: object) -> object:
    """The *value* of check *number*, or *neutral* while it is out."""
    if number == out:
        return neutral
    if notes and bool(value) is not neutral:
        _note(number)
    return value


def _note(number: int) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if (number, test) in _noted:
        return
    _noted.add((number, test))
    with suppress(OSError):  # a process that may not open files any more
        file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        os.write(file, f"{number} {test}\n".encode())
        os.close(file)
