"""Another program in a worker's place, whichever way the worker is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hvhost.machine.config_file import dump_config
from hvhost.machine.model import MachineConfig
from hvhost.manager.directory import MachineDirectory

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


def live_as(program: Sequence[str]) -> Callable[[MachineDirectory, MachineConfig], int]:
    """A forked worker's life as another program."""

    def live(directory: MachineDirectory, config: MachineConfig) -> int:
        directory.config_file.write_text(dump_config(config))
        os.execv(program[0], [*program, str(directory.config_file)])

    return live
