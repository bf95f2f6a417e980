"""What a backup is asked for, and what is told of it: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BackupState(StrEnum):
    """Where a backup is."""

    FREEZING = "freezing"
    COPYING = "copying"
    DONE = "done"
    FAILED = "failed"


class Consistency(StrEnum):
    """What a backup holds: file systems as after a clean unmount, or as after a loss of power."""

    FILE_SYSTEM = "file-system"
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How to back a machine up: into a new directory in *directory*, an absolute path.

    ``crash_consistent``: do not ask the guest to freeze its file systems. ``allow_network`` and
    ``allow_same_volume`` allow what is refused otherwise: disks on network storage, and a
    destination on the volume of a disk. ``incremental``: store only what is different from the
    machine's newest backup in *directory*, if there is one.
    """

    directory: str
    crash_consistent: bool = False
    allow_network: bool = False
    allow_same_volume: bool = False
    incremental: bool = False


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """A backup under way or ended; sizes in bytes, times in seconds.

    ``path`` is its directory once it is whole. ``size`` is that of all disks, ``copied`` how far
    the copy is. ``frozen_seconds`` is how long the guest's file systems were frozen at most,
    ``pause_seconds`` the longest time for which commands to a disk were held. ``warning`` is
    something that the guest's administrator should look at. ``base`` is the backup that this one
    is the difference to, ``stored`` how much of the data had to be written.
    """

    state: BackupState
    path: str
    consistency: Consistency
    size: int = 0
    copied: int = 0
    seconds: float = 0.0
    frozen_seconds: float = 0.0
    pause_seconds: float = 0.0
    warning: str | None = None
    error: str | None = None
    base: str | None = None
    stored: int = 0

    @property
    def over(self) -> bool:
        return self.state in (BackupState.DONE, BackupState.FAILED)
