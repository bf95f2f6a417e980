"""Locks on image files: one writer, or any number of readers.

The lock is flock(2): it belongs to the open file, ends with the process whatever happens, and
``/proc/locks`` names the process that took it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hvhost.errors import HvHostError


def lock(descriptor: int, name: str, *, writer: bool) -> None:
    """Lock the open file, or say who has it; :class:`HvHostError` then."""
    kind = fcntl.LOCK_EX if writer else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.fstat(descriptor))
        if holder is None:
            who = "another process uses it"
        elif holder == os.getpid():
            who = f"this process ({holder}) has it open already"
        else:
            who = f"process {holder} ({_process_name(holder)}) uses it"
        purpose = "written to" if writer else "read"
        raise HvHostError(
            f"{name} cannot be {purpose} now, because {who}; end that use first."
        ) from None


def holder_of(path: Path) -> int | None:
    """The process that has *path* locked, if there is one and the system tells."""
    return _holder(path.stat())


def _holder(status: os.stat_result) -> int | None:
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if len(words) >= 6 and words[1] == "FLOCK" and words[5] == place and words[4] != "0":
            return int(words[4])
    return None


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "of another namespace"
