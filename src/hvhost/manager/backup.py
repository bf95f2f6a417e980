"""Backups of running machines, for programs that wait: what the command line speaks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.manager.client import MachineClient

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_CANCEL_SECONDS = 120.0
_PATH = "/v1/machine/backup"


def back_up(
    machine: MachineClient,
    options: BackupOptions,
    watch: Callable[[BackupInfo], None] = lambda info: None,
) -> BackupInfo:
    """Back a machine up; given up if this is interrupted, also by *watch*.

    :class:`HvHostError` if there is no backup in the end.
    """
    options = replace(options, directory=str(Path(options.directory).absolute()))
    info = machine.ask("POST", _PATH, BackupInfo, asdict(options))
    try:
        while not info.over:
            watch(info)
            info = machine.ask("GET", f"{_PATH}?timeout={_LOOK_SECONDS}", BackupInfo)
    except BaseException:
        machine.ask("POST", f"{_PATH}/cancel", BackupInfo)
        wait = f"{_PATH}?timeout={_CANCEL_SECONDS}"
        logger.info("%s", machine.ask("GET", wait, BackupInfo, wait=_CANCEL_SECONDS).error)
        raise
    if info.error is not None:
        raise HvHostError(info.error)
    return info
