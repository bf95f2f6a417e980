"""Backups of a running machine's disks.

The guest's file systems are frozen, each disk is kept as it is while the commands of all of them
are held for a moment, and the guest is thawed; then the copy is made while the guest goes on.
Where the host's file system can, a second file with the same blocks keeps the disk
(``shared_copy.py``); elsewhere what the guest overwrites is copied before (``snapshot.py``). The
backup's directory gets its name when all of it is on stable storage: one that ends early leaves
nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions, BackupState, Consistency
from hvhost.machine.peripheral import Surroundings
from hvhost.services.vss import ANSWER_SECONDS, FREEZE_SECONDS, VssAnswer
from hvhost.services.vss_protocol import VssOperation

if TYPE_CHECKING:
    from hvhost.storage.backup_base import Base, Keeper
    from hvhost.storage.block import DiskUnit
    from hvhost.storage.controller import Drive, Storage
    from hvhost.storage.disk import Disk, ImageDisk
    from hvhost.storage.snapshot import Piece, Snapshot

log = logging.getLogger(__name__)

_WAIT_SECONDS = FREEZE_SECONDS + ANSWER_SECONDS
_LOOK_SECONDS = 0.5
_BLOCK_SIZE = 2 << 20
#: How long a disk may be held for the others, and how often that is tried.
_HOLD_SECONDS, _HOLD_ATTEMPTS = 1.0, 10


@dataclass(slots=True)
class Copy:
    """One disk being copied into *file*, by *keeper*; *base*: what it is the difference to.

    ``shared`` is the disk as it was, if a second file holds that; ``snapshot`` reads it then.
    """

    drive: Drive
    file: Path
    target: Disk
    keeper: Keeper
    base: Path | None = None
    snapshot: Snapshot | None = None
    shared: ImageDisk | None = None

    @property
    def unit(self) -> DiskUnit:
        return cast("DiskUnit", self.drive.unit)


@dataclass(slots=True)
class Job:
    """A backup under way."""

    options: BackupOptions
    path: Path
    info: BackupInfo
    started: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Guest(Protocol):
    """What a backup needs of the computer beside its disks."""

    @property
    def lock(self) -> threading.RLock: ...

    def require_running(self) -> None:
        """:class:`HvHostError` if it stands still."""


class Backup:
    """Implements :class:`hvhost.machine.peripheral.Peripheral`; one backup at a time.

    To be closed before *storage*. Methods for people may be called on any thread and raise
    :class:`HvHostError`.
    """

    def __init__(self, around: Surroundings, storage: Storage) -> None:
        self._config, self._event, self._vss = around.config, around.event, around.vss
        self._storage = storage
        self._computer: Guest | None = None
        self._starting = threading.Lock()
        self._job: Job | None = None

    # Peripheral.

    def attach(self, computer: Guest) -> None:
        self._computer = computer

    def detach(self) -> None:
        self._computer = None

    def tick(self, now: float) -> None:
        """Nothing of backups needs the time."""

    def close(self) -> None:
        job = self._job
        if job is not None and job.thread is not None:
            job.cancelled = True
            job.thread.join()

    # For people.

    def start(self, options: BackupOptions) -> BackupInfo:
        """Begin a backup; :class:`HvHostError` if that should not be, or one is under way."""
        from hvhost.storage.volumes import check_backup, volumes

        directory = Path(options.directory)
        if not directory.is_absolute():
            raise HvHostError(f"{directory} is not an absolute path; name the whole of it.")
        with self._starting:
            if self._job is not None and not self._job.info.over:
                raise HvHostError(
                    f"machine {self._config.name!r} is being backed up already; wait or cancel."
                )
            if self._computer is not None and not options.crash_consistent:
                self._computer.require_running()
            drives = self._storage.disks()
            if not drives:
                raise HvHostError(f"machine {self._config.name!r} has no disks to back up.")
            check_backup(
                [path for drive in drives for path in _files(cast("DiskUnit", drive.unit).disk)],
                directory,
                volumes(),
                allow_network=options.allow_network,
                allow_same_volume=options.allow_same_volume,
            )
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            path = directory / f"{self._config.name}-{stamp}"
            if path.exists():
                raise HvHostError(f"{path} exists already; wait a second.")
            consistency = Consistency.CRASH if options.crash_consistent else Consistency.FILE_SYSTEM
            job = Job(options, path, BackupInfo(BackupState.FREEZING, str(path), consistency))
            self._job = job
            job.thread = threading.Thread(target=self._run, args=(job,), name="backup", daemon=True)
            job.thread.start()
            return job.info

    def progress(self, timeout: float = 0.0) -> BackupInfo:
        """How far the last backup is; waits up to *timeout* seconds for its end."""
        job = self._job
        if job is None:
            raise HvHostError(
                f"machine {self._config.name!r} has not been backed up since it was started."
            )
        job.over.wait(timeout)
        info = job.info
        return info if info.over else replace(info, seconds=time.monotonic() - job.started)

    def cancel(self) -> BackupInfo:
        """Give the backup under way up; :meth:`progress` tells when that is done."""
        if self._job is not None:
            self._job.cancelled = True
        return self.progress()

    # The work, on a thread of its own.

    def _run(self, job: Job) -> None:
        error: str | None = None
        try:
            with self._storage.keeping() as drives:
                self._back_up(job, drives)
        except HvHostError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"The backup failed: {problem}."
        except Exception as problem:  # a bug of ours must not look like a backup under way
            log.exception("backup")
            error = f"The backup failed: {problem!r}; the worker's log has more."
        job.info = replace(
            job.info,
            state=BackupState.DONE if error is None else BackupState.FAILED,
            seconds=time.monotonic() - job.started,
            error=error,
        )
        self._event("backup", f"{job.path} is whole" if error is None else error)
        job.over.set()

    def _back_up(self, job: Job, drives: list[Drive]) -> None:
        from hvhost.storage.backup_base import MANIFEST, find_base

        unfinished = job.path.with_name(job.path.name + ".partial")
        unfinished.mkdir(parents=True)
        try:
            base: Base | None = None
            if job.options.incremental:
                base = find_base(job.path.parent, self._config.name, drives)
            with _targets(unfinished, drives, base.files if base else {}) as copies:
                job.info = replace(
                    job.info,
                    size=sum(each.unit.disk.size for each in copies),
                    base=str(base.path) if base else None,
                )
                try:
                    self._take_snapshots(job, copies)
                    job.info = replace(job.info, state=BackupState.COPYING)
                    for copy in copies:
                        _copy(job, copy)
                finally:
                    _let_go(copies)
                _check(job, copies)
                for copy in copies:
                    copy.target.flush()
                job.info = replace(job.info, stored=sum(each.keeper.stored for each in copies))
            (unfinished / MANIFEST).write_text(self._manifest(job, copies))
            _settle(unfinished)
            unfinished.rename(job.path)
            _settle(job.path.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _take_snapshots(self, job: Job, copies: list[Copy]) -> None:
        if job.options.crash_consistent:
            _snapshots(job, copies)
            return
        self._check_guest()
        computer, started = self._computer, time.monotonic()
        try:
            if not self._ask(VssOperation.FREEZE).ok:
                raise HvHostError(
                    "The guest could not freeze its file systems; its log (hv_vss_daemon's lines) "
                    "says which one. --crash-consistent backs up without that."
                )
            _snapshots(job, copies)
            if not self._still_frozen(computer):
                raise HvHostError(
                    "The guest's file systems did not stay frozen until its disks were held; try "
                    "again."
                )
        finally:
            warning = self._thaw()
            seconds = time.monotonic() - started
            job.info = replace(job.info, frozen_seconds=seconds, warning=warning)

    def _check_guest(self) -> None:
        """:class:`HvHostError` unless the guest can freeze its file systems."""
        if not self._ask(VssOperation.HOT_BACKUP).ok:
            raise HvHostError(
                "The guest cannot freeze its file systems: its hv_vss_daemon does not run; start "
                "it (package hyperv-daemons), or use --crash-consistent for a backup as after a "
                "loss of power."
            )

    def _still_frozen(self, computer: Guest | None) -> bool:
        """Nobody has thawed the guest, or reset it, since it was frozen."""
        if computer is None or self._computer is not computer:
            return False
        with computer.lock:
            return self._vss.still_frozen

    def _thaw(self) -> str | None:
        """Thaw the guest; what there is to say if that failed."""
        problem = "its hv_vss_daemon failed or ended"
        try:
            if self._ask(VssOperation.THAW).ok:
                return None
        except HvHostError as error:
            problem = str(error).rstrip(".")
        warning = (
            f"The guest's file systems may still be frozen ({problem}). It is asked to thaw them "
            "again and again: start its hv_vss_daemon, or use fsfreeze --unfreeze in it."
        )
        self._event("backup", warning)
        return warning

    def _ask(self, operation: VssOperation) -> VssAnswer:
        computer = self._computer
        if computer is None:
            raise HvHostError("The machine is being reset; try again.")
        answered = threading.Event()
        result: list[VssAnswer | HvHostError] = []

        def done(answer: VssAnswer | HvHostError) -> None:
            result.append(answer)
            answered.set()

        with computer.lock:
            self._vss.request(operation, done)
        deadline = time.monotonic() + _WAIT_SECONDS
        while not answered.wait(_LOOK_SECONDS):
            try:
                computer.require_running()
                if time.monotonic() > deadline:
                    raise HvHostError(
                        f"The guest did not answer {operation.name}; see whether it hangs."
                    )
            except HvHostError:
                with computer.lock:
                    self._vss.abandon(done)
                raise
        if isinstance(result[0], HvHostError):
            raise result[0]
        return result[0]

    def _manifest(self, job: Job, copies: list[Copy]) -> str:
        from hvhost.machine.config_file import dump_config

        content = {
            "backup": asdict(replace(job.info, state=BackupState.DONE)),
            "disks": [
                {
                    "address": copy.drive.address,
                    "file": copy.file.name,
                    "source": copy.drive.config.path,
                    "size": copy.unit.disk.size,
                    "sector_size": copy.unit.disk.logical_sector_size,
                    "identifier": str(copy.unit.disk.identifier),
                    "parent": _parent(copy),
                    "kept_by": "copy-before-write" if copy.shared is None else "reflink",
                }
                for copy in copies
            ],
            "machine": json.loads(dump_config(self._config)),
        }
        return json.dumps(content, indent=2) + "\n"


def hold(drives: Sequence[Drive], function: Callable[[], None]) -> float:
    """Run *function* between two commands of all disks at once; seconds they were held for.

    A disk that is held may keep somebody from giving back the bus's lock, which another disk needs
    before it can be held. So none waits for long: all are let go then, and it is tried again.
    """
    from concurrent.futures import ThreadPoolExecutor

    longest = 0.0
    for _ in range(_HOLD_ATTEMPTS):
        barrier, over = threading.Barrier(len(drives)), threading.Event()

        def wait(
            barrier: threading.Barrier = barrier, over: threading.Event = over
        ) -> tuple[float, bool]:
            started = time.monotonic()
            try:
                number = barrier.wait(_HOLD_SECONDS)
            except threading.BrokenBarrierError:
                return time.monotonic() - started, False
            if number:  # all are held, and the first of them does the work
                over.wait()
            else:
                try:
                    function()
                finally:
                    over.set()
            return time.monotonic() - started, True

        with ThreadPoolExecutor(len(drives)) as pool:
            results: list[tuple[float, bool]] = list(
                pool.map(lambda each: each.worker.call(wait), drives)
            )
        longest = max(longest, max(seconds for seconds, _ in results))
        if all(done for _, done in results):
            return longest
    raise HvHostError("The disks could not all be held at one moment; try again.")


def _files(disk: Disk) -> Iterator[Path]:
    """The files of a disk and all its parents."""
    from hvhost.storage.file import HostFile

    link: object = disk
    while link is not None:
        file = getattr(link, "file", None)
        if isinstance(file, HostFile):
            yield file.path
        link = getattr(link, "parent", None)


def _parent(copy: Copy) -> str | None:
    """The file a copy is the difference to, from the copy's directory."""
    return None if copy.base is None else f"../{copy.base.parent.name}/{copy.base.name}"


@contextlib.contextmanager
def _targets(directory: Path, drives: list[Drive], bases: dict[str, Path]) -> Iterator[list[Copy]]:
    """An empty VHDX for each disk, a child of its base if there is one; closed at the end."""
    from hvhost.storage.backup_base import Difference, Whole, open_base
    from hvhost.storage.images import create_disk, differencing_options
    from hvhost.storage.vhdx_create import VhdxOptions

    with contextlib.ExitStack() as stack:
        copies = []
        for drive in drives:
            disk = cast("DiskUnit", drive.unit).disk
            file = directory / f"{drive.address.replace(':', '-')}.vhdx"
            earlier = bases.get(drive.address)
            if earlier is not None:
                base = open_base(earlier)
                stack.callback(base.close)
                target = create_disk(file, differencing_options(file, earlier, same_disk=True))
                stack.callback(target.close)
                copies.append(Copy(drive, file, target, Difference(base, target), earlier))
                continue
            options = VhdxOptions(
                disk.size,
                block_size=_BLOCK_SIZE,
                logical_sector_size=disk.logical_sector_size,
                physical_sector_size=disk.physical_sector_size,
                identifier=disk.identifier,
            )
            target = create_disk(file, options)
            stack.callback(target.close)
            copies.append(Copy(drive, file, target, Whole(target)))
        yield copies


def _snapshots(job: Job, copies: list[Copy]) -> None:
    """From this moment on all disks are kept as they are now."""
    from hvhost.storage.shared_copy import SharedCopy
    from hvhost.storage.snapshot import Snapshot

    with contextlib.ExitStack() as stack:
        shared: list[SharedCopy | None] = []
        for copy in copies:  # what takes time, before the commands are held
            disk = cast("ImageDisk", copy.unit.disk)
            copy.snapshot = Snapshot(disk, copy.keeper)
            shared.append(copy.drive.worker.call(partial(SharedCopy.prepare, disk)))
            if (one := shared[-1]) is not None:
                stack.callback(one.close)
        taken: list[bool] = []

        def begin() -> None:
            for copy, one in zip(copies, shared, strict=True):
                taken.append(one is not None and one.take())
                if not taken[-1]:
                    assert copy.snapshot is not None
                    copy.unit.disk = copy.snapshot

        _paused(job, hold([copy.drive for copy in copies], begin))
        for copy, one, done in zip(copies, shared, taken, strict=True):
            if one is not None and done:
                copy.shared = one.open()
                copy.snapshot = Snapshot(copy.shared, copy.keeper)


def _let_go(copies: list[Copy]) -> None:
    """The guest uses its disks themselves again."""
    for copy in copies:
        snapshot, unit = copy.snapshot, copy.unit
        if copy.shared is not None:
            copy.shared.close()
        elif snapshot is not None and unit.disk is snapshot:
            copy.drive.worker.call(partial(setattr, unit, "disk", snapshot.disk))


def _paused(job: Job, seconds: float) -> None:
    job.info = replace(job.info, pause_seconds=max(job.info.pause_seconds, seconds))


def _check(job: Job, copies: list[Copy]) -> None:
    """:class:`HvHostError` if the backup was given up or cannot become whole."""
    if job.cancelled:
        raise HvHostError("The backup was cancelled; nothing of it is left.")
    for copy in copies:
        if copy.snapshot is not None and copy.snapshot.problem is not None:
            raise HvHostError(
                f"The backup of {copy.drive.address} failed, nothing of it is left: "
                f"{copy.snapshot.problem}."
            )


def _copy(job: Job, copy: Copy) -> None:
    from hvhost.storage.snapshot import CHUNK

    snapshot, before, chunk = copy.snapshot, job.info.copied, 0
    assert snapshot is not None
    while True:
        _check(job, [copy])

        def take(first: int = chunk) -> tuple[Piece | None, float]:
            started = time.monotonic()
            return snapshot.take(first), time.monotonic() - started

        if copy.shared is None:
            piece, seconds = copy.drive.worker.call(take)
            _paused(job, seconds)
        else:  # no command of the guest's is kept waiting
            piece, _ = take()
        if piece is None:
            break
        snapshot.put(piece)
        chunk = piece.following
        job.info = replace(job.info, copied=before + min(chunk * CHUNK, snapshot.size))
    job.info = replace(job.info, copied=before + snapshot.size)


def _settle(path: Path) -> None:
    """Have a directory and the manifest in it on stable storage."""
    from hvhost.storage.backup_base import MANIFEST

    for each in (*path.glob(MANIFEST), path):
        descriptor = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
