"""Where a machine's worker leaves its sockets, and who holds a machine's name.

``RUNTIME/machines/NAME/`` is mode 0700 and holds ``api.sock``, ``serial1.sock``, ``serial2.sock``,
``config.json``, ``worker.pid``, ``worker.log`` and ``lock``. Two locks tell the states apart:

- the worker holds ``flock`` on ``lock`` for as long as it lives, so a worker killed by signal 9
  frees its name;
- whoever starts a machine holds ``flock`` on the directory itself until the worker answers, so two
  starts of one name cannot mix, and so that nobody who only looks can make the worker's own
  ``flock`` fail.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from hvhost import paths
from hvhost.errors import HvHostError

MAXIMUM_SOCKET_PATH = 107
"""Bytes of a Unix socket's path: ``sun_path`` is 108 with its end."""

_POLL_SECONDS = 0.02
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class NameState(StrEnum):
    """What a machine's name is doing."""

    FREE = "free"
    STARTING = "starting"
    ALIVE = "alive"
    DEAD = "dead"
    """The worker is gone without having cleaned up after itself."""


def check_name(name: str) -> str:
    """*name* if it can be a machine's name; :class:`HvHostError` otherwise."""
    if _NAME.fullmatch(name) is None:
        raise HvHostError(
            f"{name!r} cannot be a machine's name; use up to 63 letters, digits, '_', '.' and '-',"
            " starting with a letter or a digit."
        )
    return name


@dataclass(frozen=True, slots=True)
class MachineDirectory:
    """The files of one machine; making one of these touches nothing on disk."""

    name: str
    path: Path

    @classmethod
    def of(cls, name: str) -> MachineDirectory:
        """The directory of machine *name*, which need not exist; checks the name."""
        return cls(check_name(name), paths.runtime_dir("machines") / name)

    @property
    def api_socket(self) -> Path:
        """HTTP API of the worker."""
        return self.path / "api.sock"

    def serial_socket(self, port: int) -> Path:
        """Raw bytes of serial port *port*; 1 is COM1, the console."""
        return self.path / f"serial{port}.sock"

    @property
    def config_file(self) -> Path:
        """JSON of :class:`hvhost.machine.model.MachineConfig`."""
        return self.path / "config.json"

    @property
    def lock_file(self) -> Path:
        """Held with ``flock`` by the live worker."""
        return self.path / "lock"

    @property
    def pid_file(self) -> Path:
        """Decimal process id of the worker."""
        return self.path / "worker.pid"

    @property
    def log_file(self) -> Path:
        """Standard output and error of the worker."""
        return self.path / "worker.log"

    def create(self) -> None:
        """Make the directory, only its owner's, and check that its sockets' paths can be bound."""
        if (length := len(os.fsencode(self.serial_socket(1)))) > MAXIMUM_SOCKET_PATH:
            raise HvHostError(
                f"{self.serial_socket(1)} is {length - MAXIMUM_SOCKET_PATH} bytes too long for a"
                " socket; take a shorter name, or set HVHOST_RUNTIME_DIR to a shorter path."
            )
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.path.chmod(0o700)

    def state(self) -> NameState:
        """Who holds the name now."""
        try:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return NameState.FREE
        try:
            if not _try_lock(directory, fcntl.LOCK_SH):
                return NameState.STARTING
            return self._worker_state()
        finally:
            os.close(directory)

    def _worker_state(self) -> NameState:
        """:meth:`state` for a caller that already holds the directory's lock."""
        try:
            lock = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return NameState.FREE
        try:
            if not _try_lock(lock, fcntl.LOCK_SH):
                return NameState.ALIVE
        finally:
            os.close(lock)
        return NameState.DEAD if self.pid_file.exists() else NameState.FREE

    def worker_pid(self) -> int | None:
        """Process id the worker wrote, dead or alive; ``None`` where there is none."""
        try:
            return int(self.pid_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    @contextmanager
    def claim(self, *, patience: float = 1.0) -> Iterator[None]:
        """Hold the name while a worker is being started; leaves no stale sockets behind it.

        Creates the directory. Raises :class:`HvHostError` when a worker or another start has the
        name; *patience* is the seconds granted to those who only look.
        """
        deadline = time.monotonic() + patience
        while (directory := self._locked()) is None:
            if time.monotonic() > deadline:
                raise HvHostError(
                    f"machine {self.name!r} is being started already; use another --name."
                )
            time.sleep(0.01)
        try:
            if self._worker_state() is NameState.ALIVE:
                raise HvHostError(
                    f"machine {self.name!r} is running already; stop it with"
                    f" `hvhost stop {self.name}` or use another --name."
                )
            for stale in self.path.iterdir():
                if stale.is_dir():
                    from shutil import rmtree

                    rmtree(stale)
                elif stale != self.lock_file:
                    stale.unlink()
            yield
        finally:
            os.close(directory)

    def _locked(self) -> int | None:
        """The directory, made if need be and locked; ``None`` if somebody else holds it."""
        self.create()
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _try_lock(directory, fcntl.LOCK_EX) and self._is_here(directory):
            return directory
        os.close(directory)
        return None

    def _is_here(self, directory: int) -> bool:
        """*directory* was not removed while its lock was waited for."""
        try:
            return os.path.samestat(os.fstat(directory), self.path.stat())
        except FileNotFoundError:
            return False

    def wait_gone(self, timeout: float) -> bool:
        """Whether the worker has ended, after waiting up to *timeout* seconds for that."""
        deadline = time.monotonic() + timeout
        while self.state() is NameState.ALIVE:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def remove(self, *, patience: float = 1.0) -> bool:
        """Delete what a machine that is not alive has left; whether there was something.

        A live or starting one keeps it all, which is false, too. *patience* as for :meth:`claim`.
        """
        try:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            deadline = time.monotonic() + patience
            while not _try_lock(directory, fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.01)
            # A start that comes now waits for the lock, and makes the directory anew.
            if self._worker_state() is NameState.ALIVE or not self._is_here(directory):
                return False
            from shutil import rmtree

            rmtree(self.path, ignore_errors=True)
            return True
        finally:
            os.close(directory)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def machine_directories() -> list[MachineDirectory]:
    """Directories of all machines that are or were, by name."""
    root = paths.runtime_dir("machines")
    return [
        MachineDirectory(entry.name, entry)
        for entry in sorted(root.iterdir())
        if entry.is_dir() and _NAME.fullmatch(entry.name)
    ]


def running_directory(name: str) -> MachineDirectory:
    """The directory of a machine with a live worker.

    Raises :class:`HvHostError` that tells a name nobody uses from a worker that died.
    """
    directory = MachineDirectory.of(name)
    match directory.state():
        case NameState.ALIVE | NameState.STARTING:
            return directory
        case NameState.DEAD:
            raise HvHostError(
                f"the worker of machine {name!r} (process {directory.worker_pid()}) has died;"
                f" {directory.log_file} has its last words, and `hvhost run --name {name}`"
                " starts it anew."
            )
        case NameState.FREE:
            raise HvHostError(
                f"there is no running machine {name!r}; `hvhost ps` lists those there are."
            )
