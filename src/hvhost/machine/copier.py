"""File copies for callers that wait: the file on the host, its progress, its end."""

from __future__ import annotations

import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.model import CopyProgress, CopyState
from hvhost.services.filecopy import Copy, FileCopy
from hvhost.services.filecopy_protocol import CopyFlags, parse_target

_AHEAD = 4 << 20  # bytes the kernel is asked to have read before they are wanted


class Copier:
    """One copy at a time through *device*; all methods on any thread but the loop's.

    *device* is called with the lock of the computer it is part of at the time.
    """

    def __init__(self, device: FileCopy) -> None:
        self._device = device
        self._progress: CopyProgress | None = None
        self._copy: Copy | None = None
        self._started = 0.0
        self._over = threading.Event()

    def start(
        self,
        lock: threading.RLock,
        source: str,
        destination: str,
        *,
        create_path: bool,
        overwrite: bool,
    ) -> CopyProgress:
        """Begin to copy the host's file *source*; :class:`HvHostError` if that cannot be."""
        path = Path(source)
        target = parse_target(destination, path.name)
        flags = CopyFlags(0)
        if create_path:
            flags |= CopyFlags.CREATE_PATH
        if overwrite:
            flags |= CopyFlags.OVER_WRITE
        try:
            # Not to wait for the writer of a named pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HvHostError(f"{source} cannot be read: {error.strerror}.") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise HvHostError(f"{source} is not a plain file; copy its files one by one.")
            over = threading.Event()

            def read(offset: int, size: int) -> bytes:
                if offset % _AHEAD < size:  # once in a while
                    os.posix_fadvise(descriptor, offset + _AHEAD, _AHEAD, os.POSIX_FADV_WILLNEED)
                return os.pread(descriptor, size, offset)

            def done(problem: HvHostError | None) -> None:
                os.close(descriptor)
                assert self._progress is not None
                self._progress = replace(
                    self._now(),
                    state=CopyState.DONE if problem is None else CopyState.FAILED,
                    error=None if problem is None else str(problem),
                )
                over.set()

            copy = Copy(target, flags, status.st_size, read, done)
            with lock:
                started, self._started = self._started, time.monotonic()
                progress, self._progress = (
                    self._progress,
                    CopyProgress(source, str(target), status.st_size),
                )
                previous, self._copy = self._copy, copy
                over_before, self._over = self._over, over
                try:
                    self._device.start(copy)
                except HvHostError:
                    self._started, self._progress = started, progress
                    self._copy, self._over = previous, over_before
                    raise
                return self._now()
        except BaseException:
            os.close(descriptor)
            raise

    def progress(self, timeout: float) -> CopyProgress:
        """How far the last copy is; waits up to *timeout* seconds for its end."""
        if self._progress is None:
            raise HvHostError("Nothing has been copied into this guest yet; copy a file first.")
        self._over.wait(timeout)
        return self._now()

    def cancel(self, lock: threading.RLock) -> None:
        """Give the copy under way up; :meth:`progress` tells when that is done."""
        with lock:
            self._device.cancel()

    def _now(self) -> CopyProgress:
        progress, copy = self._progress, self._copy
        assert progress is not None and copy is not None
        if progress.state is not CopyState.COPYING:
            return progress
        return replace(progress, copied=copy.copied, seconds=time.monotonic() - self._started)
