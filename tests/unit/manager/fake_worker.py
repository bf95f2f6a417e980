"""A worker without a virtual machine: everything of its outside, and an echo for a guest.

Words on the command line choose what goes wrong: ``fail``, ``fail-silently``, ``fail-late``,
``never-open``, ``slow``, and those of :class:`fake_machine.FakeMachine`. Typing
``poweroff`` or ``die`` (at the console) ends it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "machine"))
from fake_machine import FakeMachine, SmallLoop

from hvhost.machine.api import ApiServer
from hvhost.machine.config_file import load_config
from hvhost.machine.model import MachineConfig
from hvhost.machine.serial import SerialSocket


def main() -> None:
    config_file = Path(sys.argv[1])
    directory = config_file.parent
    config = load_config(config_file.read_text())
    words = config.command_line.split()
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (directory / "worker.pid").write_text(f"{os.getpid()}\n")
        if "fail" in words:
            print("error: first\nnoise\nerror: no KVM here; buy one.\nmore noise", file=sys.stderr)
            sys.exit(1)
        if "fail-silently" in words:
            sys.exit(3)
        for number in range(15 if "slow" in words else 0):
            print("noise\n2026-01-02 03:04:05,678 __main__: step", end="", file=sys.stderr)
            sys.stderr.flush()
            time.sleep(0.3)
            print(f" {number}", file=sys.stderr, flush=True)
        if "never-open" in words:
            time.sleep(60)
        serve(config, directory, words)
        (directory / "worker.pid").unlink()


def serve(config: MachineConfig, directory: Path, words: list[str]) -> None:
    machine = FakeMachine(config)
    loop = SmallLoop()
    signal.signal(signal.SIGTERM, lambda *_: machine.end("signal"))
    typed = bytearray()

    def on_input(data: bytes) -> None:
        typed.extend(data)
        ports[0].write(data)
        if b"poweroff" in typed:
            machine.end("power-off")
        if b"die" in typed:
            print("error: the guest broke; mend it.", file=sys.stderr, flush=True)
            os._exit(1)

    ports = [
        SerialSocket(directory / "serial1.sock", on_input, 64 << 10),
        SerialSocket(directory / "serial2.sock", lambda data: ports[1].write(data)),
    ]
    for port in ports:
        port.attach(loop)
    api = ApiServer(machine, directory / "api.sock")
    api.start()
    ports[0].write(b"fake guest up\r\n")
    if "fail-late" in words:
        print("error: the guest never had a chance; give it one.", file=sys.stderr)
        sys.exit(1)
    while not machine.stopped.is_set():
        loop.run_once(0.01)
    ports[0].write(b"bye\r\n")
    for port in ports:
        port.close()
    api.close()


main()
