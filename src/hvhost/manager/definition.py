"""From what a person wrote to a :class:`MachineConfig`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig, Transport
from hvhost.manager.directory import check_name
from hvhost.units import parse_size

CONSOLE = "console=ttyS0"
"""Added to a command line that names no console, so that the guest can be heard."""


def define(
    *,
    kernel: str | Path,
    initrd: str | Path | None = None,
    command_line: str = "",
    cpus: int = 1,
    memory: str | int = "512M",
    name: str | None = None,
    transport: Transport | str = Transport.AUTO,
) -> MachineConfig:
    """A machine's configuration, its paths absolute, its memory in bytes.

    *memory* is a size like ``"512M"`` or a number of bytes. Without a *name* the machine gets one
    nobody uses. *command_line* gets ``console=ttyS0`` unless it names a console of its own.
    """
    try:
        transport = Transport(transport)
    except ValueError:
        raise HvHostError(
            f"{transport!r} is no way to run virtual processors; use auto, local or rig."
        ) from None
    if not any(word.startswith("console=") for word in command_line.split()):
        command_line = f"{CONSOLE} {command_line}".rstrip()
    return MachineConfig(
        name=f"vm-{os.urandom(4).hex()}" if name is None else check_name(name),
        kernel=str(Path(kernel).absolute()),
        initrd=None if initrd is None else str(Path(initrd).absolute()),
        command_line=command_line,
        cpus=cpus,
        memory=parse_size(memory, what="memory") if isinstance(memory, str) else memory,
        transport=transport,
    )


def define_guest(
    guest: str,
    *,
    command_line: str = "",
    cpus: int = 1,
    memory: str | int = "512M",
    name: str | None = None,
    transport: Transport | str = Transport.AUTO,
    progress: Callable[[str], None] = lambda _: None,
) -> MachineConfig:
    """:func:`define` for a distribution known by name, downloaded first if it is not cached.

    Its root is an initramfs with busybox and a shell. *progress* is told what takes time.
    """
    from hvhost.guests.build import prepare_guest

    images = prepare_guest(guest, progress=progress)
    return define(
        kernel=images.kernel,
        initrd=images.initrd,
        command_line=command_line,
        cpus=cpus,
        memory=memory,
        name=name,
        transport=transport,
    )
