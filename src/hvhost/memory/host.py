"""The host's memory, and what the machines of this user tell each other about their part of it.

Every worker writes what its machine has and needs into a file of its own, reads those of the
others, and comes to the same shares: nobody has to be in charge. A file counts while its worker
keeps it locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hvhost.memory.policy import Claim, reserve, share
from hvhost.units import KIB, parse_size

RESERVE_VARIABLE = "HVHOST_MEMORY_RESERVE"

_STALE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class HostMemory:
    """``MemTotal`` and ``MemAvailable`` of the host, in bytes."""

    total: int
    available: int


def read_host_memory(path: Path = Path("/proc/meminfo")) -> HostMemory:
    """The host's memory now."""
    values = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * KIB
    return HostMemory(values["MemTotal"], values["MemAvailable"])


def kept_by_host(total: int) -> int:
    """What of *total* bytes no machine is given: as the environment says, or a part of it.

    :class:`hvhost.errors.HvHostError` if what it says is no size.
    """
    said = os.environ.get(RESERVE_VARIABLE, "")
    return parse_size(said, what=RESERVE_VARIABLE) if said else reserve(total)


class Commons:
    """The host's memory as one machine, *name*, sees it; its notice lies in *directory*."""

    def __init__(
        self,
        directory: Path,
        name: str,
        host: Callable[[], HostMemory] = read_host_memory,
    ) -> None:
        self._directory = directory
        self._path = directory / f"{name}.json"
        self._host = host
        self._kept = kept_by_host(host().total)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def target(self, claim: Claim, resident: int) -> int:
        """What this machine should have; *resident* is what the host holds for it already."""
        notice = json.dumps({**asdict(claim), "resident": resident}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, notice, 0)
        others = self._others()
        host = self._host()
        held = resident + sum(each for _, each in others)
        capacity = host.available + held - self._kept
        return share([claim, *(each for each, _ in others)], capacity)[0]

    def room(self) -> int:
        """How much more a machine may be given now, in bytes."""
        host = self._host()
        return max(0, host.available - self._kept)

    def _others(self) -> list[tuple[Claim, int]]:
        found = []
        for path in sorted(self._directory.glob("*.json")):
            if path != self._path:
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    notice = _read_locked(path)
                    if notice is not None:
                        resident = notice.pop("resident")
                        found.append((Claim(**notice), resident))
        return found

    def close(self) -> None:
        """The machine is over."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._descriptor)


def _read_locked(path: Path) -> dict[str, int] | None:
    """What the file says; ``None`` when nobody holds it any more."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice: dict[str, int] = json.loads(file.read())
            return notice
        if time.time() - os.fstat(file.fileno()).st_mtime > _STALE_SECONDS:
            path.unlink(missing_ok=True)  # its worker was killed
        return None
