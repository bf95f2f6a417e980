"""The worker: the process of one machine. ``python -m hvhost.machine.worker CONFIG.json``."""

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

from hvhost.errors import HvHostError
from hvhost.firmware.extract import open_for_boot
from hvhost.kvm.detect import connect
from hvhost.kvm.transport import Transport as KvmTransport
from hvhost.machine.api import ApiServer
from hvhost.machine.config_file import load_config
from hvhost.machine.loop import Loop
from hvhost.machine.machine import Machine
from hvhost.machine.peripheral import Surroundings, build_peripherals
from hvhost.machine.serial import CONSOLE_SCROLLBACK, SerialSocket
from hvhost.sockets.bridge import SocketBridge

log = logging.getLogger(__name__)


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


def run(config_file: Path) -> None:
    """Run the machine of *config_file* until it stops; :class:`HvHostError` on failure.

    Once the machine runs, SIGTERM and SIGINT power it off.
    """
    config = load_config(config_file.read_text())
    directory = config_file.parent
    kernel = open_for_boot(Path(config.kernel))
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

    def connect_kvm() -> KvmTransport:
        return connect(config, lambda text: log.info("%s", text))

    _allow_many_descriptors()
    sockets = SocketBridge(directory, loop)
    machine = Machine(
        config, kernel, connect_kvm, loop, [serial.write for serial in serials], sockets
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
        loop.run()
    finally:
        _on_stop_signals(lambda *_: None)  # we are leaving already
        machine.close()
        api.close()
        sockets.close()
        for serial in serials:
            serial.close()
    if machine.error is not None:
        raise HvHostError(machine.error)


def main() -> int:
    """The process's life; its exit status is 0 only after a machine that ran and stopped."""
    _on_stop_signals(_stopped_early)
    config_file = Path(sys.argv[1])
    directory = config_file.parent
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s"
    )
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pid_file = directory / "worker.pid"
        pid_file.write_text(f"{os.getpid()}\n")
        try:
            run(config_file)
        except (HvHostError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            with contextlib.suppress(FileNotFoundError):
                pid_file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
