"""Starting a machine: one worker process, and the sentence when it does not come up."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError
from hvhost.firmware.layout import memory_layout
from hvhost.machine.config import MachineConfig
from hvhost.manager.directory import MachineDirectory
from hvhost.memory.settings import check_dynamic
from hvhost.process import die_with
from hvhost.units import MIB, format_size

if TYPE_CHECKING:
    import subprocess

    from hvhost.machine.storage_model import DriveConfig
    from hvhost.manager.forked import ForkedWorker

logger = logging.getLogger(__name__)

# -P: a file named like a module in the user's directory must not become one of the worker's.
WORKER = (sys.executable, "-P", "-m", "hvhost.machine.worker")
"""The worker's command, to which the path of its ``config.json`` is added."""

START_SECONDS = 120.0
"""How long a worker may say nothing before its API is open; it may have to start the rig."""

MINIMUM_MEMORY = 32 * MIB
MAXIMUM_CPUS = 1024
"""``KVM_MAX_VCPUS`` of the kernels of today; KVM itself says so where it is less."""

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.005
_SLOW_POLL_SECONDS = 0.05
# Not compiled here: a machine is on its way before they are needed.
_STOPPED = r"(?m)^\S+ \S+ hvhost\.machine\.machine: stopped (.+)$"
_PROGRESS = r"(?m)^\S+ \S+ (?:__main__|hvhost\.machine\.worker): (.+)$"


class SeeLogError(HvHostError):
    """Its sentence sends a person to the machine's log, which therefore stays."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process this process started."""

    directory: MachineDirectory
    process: subprocess.Popen[bytes] | ForkedWorker

    def ended(self, seconds: float) -> bool:
        """Whether the process has ended, after waiting up to *seconds* for that."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def check_ended_well(self) -> None:
        """After the process's end: :class:`HvHostError` with its own sentence if it failed."""
        status = self.process.wait()
        if status != 0:
            raise _last_words(self.directory, status)

    def stop(self) -> None:
        """End the process, by SIGTERM and after ten seconds by SIGKILL; returns when it is gone."""
        self.process.terminate()
        if not self.ended(_STOP_SECONDS):
            logger.warning("the worker of %s ignored SIGTERM", self.directory.name)
            self.process.kill()
            self.process.wait()


def check(config: MachineConfig) -> None:
    """Refuse what a person got wrong, before anything is started."""
    for what, text in (("kernel", config.kernel), ("initrd", config.initrd)):
        if text is not None:
            _check_readable(what, Path(text))
    check_images(config.drives)
    check_shape(config)


def check_shape(config: MachineConfig) -> None:
    """The same of all but the files, which may not be there yet."""
    if config.cpus < 1:
        raise HvHostError(f"a machine needs at least one CPU, not {config.cpus}; use --cpus 1.")
    if config.cpus > MAXIMUM_CPUS:
        raise HvHostError(
            f"{config.cpus} CPUs are more than the {MAXIMUM_CPUS} that KVM can give a machine; use"
            " fewer --cpus."
        )
    if config.memory < MINIMUM_MEMORY:
        raise HvHostError(
            f"{format_size(config.memory)} of memory is too little for a Linux guest; give it at"
            f" least {format_size(MINIMUM_MEMORY)}, like --memory 512M."
        )
    if config.memory % MIB:
        raise HvHostError(
            f"{config.memory} bytes of memory is not a whole number of MiB; write it like 512M."
        )
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.memory > installed:
        raise HvHostError(
            f"{format_size(config.memory)} of memory is more than the {format_size(installed)} this"
            " computer has; give the machine less with --memory."
        )
    memory_layout(config.memory, low_mmio_bytes=config.low_mmio, high_mmio_bytes=config.high_mmio)
    if config.dynamic_memory is not None:
        check_dynamic(config.memory, config.dynamic_memory)
    if "\0" in config.command_line:
        raise HvHostError("a kernel's command line cannot hold a zero byte; remove it.")
    if config.adapters:
        from hvhost.network.uplinks import check_plugs

        check_plugs(config.adapters)


def check_images(drives: Sequence[DriveConfig]) -> None:
    """Refuse images that are not there, or that cannot be opened as the machine will."""
    for drive in drives:
        if drive.path is None:
            continue
        path = Path(drive.path)
        if not path.exists():
            raise HvHostError(f"there is no {drive.kind} {drive.path!r}; check the path.")
        if not (path.is_file() or path.is_block_device()):
            raise HvHostError(
                f"{drive.kind} {drive.path!r} is neither a file nor a block device; name the image "
                "itself."
            )
        if not os.access(path, os.R_OK):
            raise HvHostError(f"{drive.kind} {drive.path!r} is not readable by you.")
        only_read = drive.read_only or drive.temporary or drive.kind == "dvd"
        if not only_read and not os.access(path, os.W_OK):
            raise HvHostError(
                f"{drive.kind} {drive.path!r} may not be written by you; add ,readonly to use it "
                "as it is."
            )


def _check_readable(what: str, path: Path) -> None:
    if not path.exists():
        raise HvHostError(f"there is no {what} {str(path)!r}; check the path.")
    if not path.is_file():
        raise HvHostError(f"{what} {str(path)!r} is not a file; name the {what} file itself.")
    if not os.access(path, os.R_OK):
        raise HvHostError(f"{what} {str(path)!r} is not readable; run `chmod +r` on it.")


def launch(
    config: MachineConfig,
    *,
    detach: bool,
    timeout: float = START_SECONDS,
    progress: Callable[[str], None] = lambda _: None,
    program: Sequence[str] | None = None,
    abandoned: threading.Event | None = None,
) -> Worker:
    """Start the worker of *config* and wait until it can be spoken to.

    *progress* gets what the worker says meanwhile (it may have to download a kernel and start the
    rig); *timeout* is how many seconds it may say nothing. *abandoned*, set by another thread, ends
    the waiting and the worker.
    A worker that is not detached gets SIGTERM when the calling thread's process dies, however it
    dies. Raises :class:`HvHostError` for a bad configuration, a name in use, and with the
    worker's own words when it fails to start.
    """
    check(config)
    directory = MachineDirectory.of(config.name)
    with directory.claim():
        _write_config(directory, config)
        worker = Worker(directory, _spawn(directory, program or WORKER, detach=detach))
        door = directory.api_socket
        _wait_until_open(worker, door, timeout, progress, abandoned or threading.Event())
        if worker.process.poll() == 0:
            early = early_end(directory, "anybody could speak to it")
            raise HvHostError(f"{early}; {directory.log_file} has its log.")
    return worker


def launch_forked(
    config: MachineConfig, progress: Callable[[str], None] = lambda _: None
) -> Worker:
    """:func:`launch` of a worker that is not detached, as a fork of this process.

    That saves a second interpreter's start. Only for a process with one thread that does nothing
    else meanwhile. Returns as soon as there is a console, or when all is over already: a guest may
    be quicker than the API. What does not start leaves nothing but the log that its error names.
    """
    from hvhost.manager.forked import ForkedWorker

    check(config)
    directory = MachineDirectory.of(config.name)
    ours = False
    try:
        with directory.claim():
            ours = True
            worker = Worker(directory, ForkedWorker(directory, config))
            door = directory.serial_socket(1)
            _wait_until_open(worker, door, START_SECONDS, progress, threading.Event())
            _write_config(directory, config)  # for people; a busy start can do without
    except BaseException as error:
        if ours and not isinstance(error, SeeLogError):
            directory.remove()
        raise
    return worker


def _write_config(directory: MachineDirectory, config: MachineConfig) -> None:
    from hvhost.machine.config_file import dump_config

    directory.config_file.write_text(dump_config(config))


def _spawn(
    directory: MachineDirectory, program: Sequence[str], *, detach: bool
) -> subprocess.Popen[bytes]:
    import subprocess

    from hvhost.paths import python_environment

    with directory.log_file.open("wb") as log:
        return subprocess.Popen(
            [*program, str(directory.config_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=python_environment(),
            start_new_session=True,
            preexec_fn=None if detach else die_with(os.getpid()),
        )


def _wait_until_open(
    worker: Worker,
    door: Path,
    timeout: float,
    progress: Callable[[str], None],
    abandoned: threading.Event,
) -> None:
    """Return once the worker has opened *door*, or has ended well; otherwise end it and raise."""
    try:
        _await_door(worker, door, timeout, progress, abandoned)
    except BaseException:
        worker.stop()
        worker.directory.pid_file.unlink(missing_ok=True)  # the name is free, not a dead machine's
        raise


def _await_door(
    worker: Worker,
    door: Path,
    timeout: float,
    progress: Callable[[str], None],
    abandoned: threading.Event,
) -> None:
    """The worker gives its sockets their names once it accepts connections."""
    started = heard = time.monotonic()
    partial = ""
    with worker.directory.log_file.open(errors="replace") as log:
        while not door.exists():
            status = worker.process.poll()
            if status == 0:
                return
            if status is not None:
                raise _last_words(worker.directory, status)
            if abandoned.is_set():
                raise HvHostError(f"the start of machine {worker.directory.name!r} was given up.")
            now = time.monotonic()
            if news := log.read():
                heard = now
                whole, _, partial = (partial + news).rpartition("\n")
                for message in re.findall(_PROGRESS, whole):
                    progress(message)
            if now - heard > timeout:
                raise SeeLogError(
                    f"the worker of machine {worker.directory.name!r} did not come up and has said"
                    f" nothing for {timeout:g} seconds; {worker.directory.log_file} says how far"
                    " it got."
                )
            # Seen at most a twentieth later than it came, at little cost meanwhile.
            time.sleep(min(max(_POLL_SECONDS, (now - started) / 20), _SLOW_POLL_SECONDS))


def early_end(directory: MachineDirectory, before: str) -> str:
    """The sentence, without its full stop, about a machine that ended well *before* something."""
    try:
        log = directory.log_file.read_text(errors="replace")
    except FileNotFoundError:
        log = ""
    reasons = re.findall(_STOPPED, log)
    why = f": {reasons[-1]}" if reasons else ""
    return f"machine {directory.name!r} stopped before {before}{why}"


def _last_words(directory: MachineDirectory, status: int) -> HvHostError:
    """The worker's last ``error:`` line, or what is known without one."""
    try:
        log = directory.log_file.read_text(errors="replace")
    except FileNotFoundError:
        log = ""
    errors = re.findall(r"^error: *(.+)$", log, re.MULTILINE)
    if errors:
        return HvHostError(errors[-1])
    how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
    return SeeLogError(
        f"the worker of machine {directory.name!r} ended {how} without a word;"
        f" {directory.log_file} has its log."
    )
