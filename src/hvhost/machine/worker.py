"""The worker: the process of one machine. ``python -m hvhost.machine.worker CONFIG.json``.

The guest runs as soon as its board is built. What it cannot reach before its kernel looks for the
bus (the bus, its devices, sockets, the API) is imported and built while it boots.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError
from hvhost.firmware.extract import open_for_boot
from hvhost.firmware.image import KernelImage
from hvhost.kvm.detect import connect
from hvhost.kvm.transport import Transport as KvmTransport
from hvhost.machine.config import MachineConfig
from hvhost.machine.loading import build_board

if TYPE_CHECKING:
    from hvhost.machine.board import Board

log = logging.getLogger(__name__)

#: How long an exit of the guest may wait for the interpreter while this thread imports; by default
#: it is ten times as long, and a kernel's start has hundreds of exits.
_IMPORT_SLICE_SECONDS = 0.0005


def _stopped_early(number: int, frame: object) -> None:
    # No HvHostError: whoever handles those by trying something else must not handle this.
    raise SystemExit("error: the machine was told to stop while it started; start it again.")


def _on_stop_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _allow_many_descriptors() -> None:
    """Every socket connection of the guest is one, and one more for its signals."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(config: MachineConfig, directory: Path) -> None:
    """Run the machine of *config* until it stops; :class:`HvHostError` on failure.

    *directory* gets its sockets. Once the machine runs, SIGTERM and SIGINT power it off.
    """
    kernel = open_for_boot(Path(config.kernel))

    def connect_kvm() -> KvmTransport:
        return connect(config, lambda text: log.info("%s", text))

    board = build_board(config, kernel, connect_kvm)
    try:
        patience = sys.getswitchinterval()
        sys.setswitchinterval(_IMPORT_SLICE_SECONDS)
        board.start()
        _attend(config, directory, kernel, connect_kvm, board, patience)
    finally:
        _on_stop_signals(lambda *_: None)  # we are leaving already
        board.stop()
        board.close()


def _attend(
    config: MachineConfig,
    directory: Path,
    kernel: KernelImage,
    connect_kvm: Callable[[], KvmTransport],
    board: Board,
    patience: float,
) -> None:
    """Put together what the guest on *board* will look for, and serve it.

    Threads wait for each other for *patience* seconds from then on.
    """
    from hvhost.machine.api import ApiServer
    from hvhost.machine.loop import Loop
    from hvhost.machine.machine import Machine
    from hvhost.machine.peripheral import Surroundings, build_peripherals
    from hvhost.machine.serial import CONSOLE_SCROLLBACK, SerialSocket
    from hvhost.sockets.bridge import SocketBridge

    loop = Loop()
    machines: list[Machine] = []
    serials = [
        SerialSocket(
            directory / f"serial{index + 1}.sock",
            lambda data, index=index: machines[0].serial_input(index, data),  # type: ignore[misc]
            CONSOLE_SCROLLBACK if index == 0 else 0,
        )
        for index in range(config.serial_ports)
    ]
    for serial in serials:
        serial.attach(loop)
    _allow_many_descriptors()
    sockets = SocketBridge(directory, loop)
    machine = Machine(
        config, kernel, connect_kvm, loop, [serial.write for serial in serials], sockets, board
    )
    machines.append(machine)
    api = ApiServer(machine, directory / "api.sock")
    try:
        around = Surroundings(config, loop, directory, machine.record, machine.vss)
        machine.plug(build_peripherals(around))
        machine.power_on()
        sockets.open()
        _on_stop_signals(lambda *_: machine.force_stop())
        api.start()
        sys.setswitchinterval(patience)
        loop.run()
    finally:
        _on_stop_signals(lambda *_: None)
        machine.close()
        api.close()
        sockets.close()
        for serial in serials:
            serial.close()
    if machine.error is not None:
        raise HvHostError(machine.error)


def live(directory: Path, load: Callable[[], MachineConfig]) -> int:
    """The process's life; its exit status is 0 only after a machine that ran and stopped.

    *load* gives the machine's configuration once *directory* is this process's own.
    """
    from hvhost.process import log_to_stderr

    _on_stop_signals(_stopped_early)
    log_to_stderr()
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pid_file = directory / "worker.pid"
        pid_file.write_text(f"{os.getpid()}\n")
        try:
            run(load(), directory)
        except (HvHostError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            with contextlib.suppress(FileNotFoundError):
                pid_file.unlink()
    return 0


def main() -> int:
    """The life of a worker that was started as a program."""
    from hvhost.machine.config_file import load_config

    config_file = Path(sys.argv[1])
    return live(config_file.parent, lambda: load_config(config_file.read_text()))


if __name__ == "__main__":
    sys.exit(main())
