"""A worker that is a fork of the process that starts it: no second interpreter, nothing twice."""

from __future__ import annotations

import os
import signal
import sys
import time

from hvhost.machine.config import MachineConfig
from hvhost.manager.directory import MachineDirectory
from hvhost.paths import python_environment
from hvhost.process import die_with

_POLL_SECONDS = 0.005


class ForkedWorker:
    """What is used of :class:`subprocess.Popen`, for the worker of *config* as a forked child.

    Like a program that was started it has a session of its own, nothing to read, a log for its
    words, and none of our descriptors.
    """

    def __init__(self, directory: MachineDirectory, config: MachineConfig) -> None:
        bind = die_with(os.getpid())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        log = os.open(directory.log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                bind()
                _detach(log)
                status = live(directory, config)
            except SystemExit as end:
                if isinstance(end.code, int):
                    status = end.code
                else:
                    print(end.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(status)  # what the parent has set up is not ours to clean up
        os.close(log)

    def poll(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None: it lives."""
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """:meth:`poll` at its end; ``TimeoutError`` when that is not within *timeout* seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._wait(0 if deadline is None else os.WNOHANG)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} has not ended.")
            time.sleep(_POLL_SECONDS)
        return status

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def terminate(self) -> None:
        """SIGTERM, if it lives."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, if it lives."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _detach(log: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, place)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    os.environ.update(python_environment())  # for processes that the worker starts
    # Whoever starts us may have put others in their place.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def live(directory: MachineDirectory, config: MachineConfig) -> int:
    """The child's life, and its exit status."""
    from hvhost.machine import worker

    return worker.live(directory.path, lambda: config)
