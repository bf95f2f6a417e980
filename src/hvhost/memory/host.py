"""The host's memory, and what the machines of this user tell each other about their part of it.

Every worker writes what its machine has and needs into a record of a file that all of them share,
reads those of the others, and comes to the same shares: nobody has to be in charge. A record
belongs to who holds the lock on its bytes. It counts while it is fresh, and after that for as long
as its lock is held: a machine that stands still has what it has.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hvhost.memory.policy import Claim, Part, reserve, share_columns
from hvhost.units import KIB, parse_size

RESERVE_VARIABLE = "HVHOST_MEMORY_RESERVE"

#: So old a record is of a worker that is gone, or of a machine that stands still.
STALE_SECONDS = 15.0
# Nanoseconds of CLOCK_MONOTONIC when it was written; Part.kept, .needed, .wanted and .weight; what
# the host holds for the machine. All in bytes but for the weight, which is 0 where nobody is.
_RECORD = struct.Struct("<6Q")
_COLUMNS, _WEIGHT = 6, 4
# struct flock ([linux] fcntl.h): type, whence, start, length, process.
_LOCK = struct.Struct("hhqqi4x")


def _lock_on(place: int) -> bytes:
    return _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, _RECORD.size, 0)


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
    """The host's memory as one machine sees it; the file with all records lies in *directory*.

    *clock* gives nanoseconds and is the same for all machines.
    """

    def __init__(
        self,
        directory: Path,
        host: Callable[[], HostMemory] = read_host_memory,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._host = host
        self._clock = clock
        self._kept = kept_by_host(host().total)
        self._descriptor = os.open(
            directory / "shares", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        self._place = next(place for place in count(0, _RECORD.size) if self._take(place))

    def _take(self, place: int) -> bool:
        """Whether the record at *place* is this machine's from now on."""
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _lock_on(place))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _is_held(self, place: int) -> bool:
        """Whether the record at *place* is another machine's."""
        lock = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, _lock_on(place))
        return bool(_LOCK.unpack(lock)[0] != fcntl.F_UNLCK)

    def target(self, claim: Claim, resident: int) -> int:
        """What this machine should have; *resident* is what the host holds for it already."""
        self.tell(claim, resident)
        _, kept, needed, wanted, weights, held = self._records()
        capacity = self._host().available + sum(held) - self._kept
        shares = share_columns(kept, needed, wanted, weights, capacity)
        return shares[self._place // _RECORD.size]

    def tell(self, claim: Claim, resident: int) -> Part:
        """Write for the others what this machine claims; what of it counts."""
        part = claim.part
        record = (self._clock(), part.kept, part.needed, part.wanted, part.weight, resident)
        os.pwrite(self._descriptor, _RECORD.pack(*record), self._place)
        return part

    def room(self) -> int:
        """How much more a machine may be given now, in bytes."""
        host = self._host()
        return max(0, host.available - self._kept)

    def _records(self) -> list[array[int]]:
        """Columns of all records; what does not count is zero throughout."""
        size = os.fstat(self._descriptor).st_size // _RECORD.size * _RECORD.size
        words = array("Q", os.pread(self._descriptor, size, 0))
        columns = [words[column::_COLUMNS] for column in range(_COLUMNS)]
        written, weights = columns[0], columns[_WEIGHT]
        oldest = self._clock() - int(STALE_SECONDS * 1e9)
        if min(written) < oldest or not min(weights):
            for index, (moment, weight) in enumerate(zip(written, weights, strict=True)):
                if not weight or (moment < oldest and not self._is_held(index * _RECORD.size)):
                    for column in columns:
                        column[index] = 0
        return columns

    def close(self) -> None:
        """The machine is over."""
        os.pwrite(self._descriptor, bytes(_RECORD.size), self._place)
        os.close(self._descriptor)
