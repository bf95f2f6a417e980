"""From what a person wrote to a :class:`MachineConfig`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError
from hvhost.machine.config import MachineConfig
from hvhost.machine.kinds import Transport
from hvhost.manager.directory import check_name
from hvhost.memory.settings import (
    BUFFER_DEFAULT,
    HIGH_MMIO_DEFAULT,
    LOW_MMIO_DEFAULT,
    WEIGHT_DEFAULT,
    DynamicMemory,
)
from hvhost.units import parse_size

if TYPE_CHECKING:
    from hvhost.guests.build import GuestImages
    from hvhost.guests.full import FullGuest
    from hvhost.machine.storage_model import DriveConfig

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
    dynamic_memory: DynamicMemory | None = None,
    mmio_low: str | int = LOW_MMIO_DEFAULT,
    mmio_high: str | int = HIGH_MMIO_DEFAULT,
) -> MachineConfig:
    """A machine's configuration, its paths absolute, its memory in bytes.

    *memory* is a size like ``"512M"`` or a number of bytes. Without a *name* the machine gets one
    nobody uses. *command_line* gets ``console=ttyS0`` unless it names a console of its own.
    *mmio_low* and *mmio_high* are the MMIO windows below and above 4 GiB.
    """
    try:
        transport = Transport(transport)
    except ValueError:
        raise HvHostError(
            f"{transport!r} is no way to run virtual processors; use auto, local or rig."
        ) from None
    if not any(word.startswith("console=") for word in command_line.split()):
        command_line = f"{CONSOLE} {command_line}".rstrip()
    startup = _bytes(memory, "memory")
    low, high = _bytes(mmio_low, "--mmio-low"), _bytes(mmio_high, "--mmio-high")
    return MachineConfig(
        name=f"vm-{os.urandom(4).hex()}" if name is None else check_name(name),
        kernel=str(Path(kernel).absolute()),
        initrd=None if initrd is None else str(Path(initrd).absolute()),
        command_line=command_line,
        cpus=cpus,
        memory=startup,
        transport=transport,
        dynamic_memory=dynamic_memory,
        low_mmio=low,
        high_mmio=high,
    )


def _bytes(size: str | int, what: str) -> int:
    return parse_size(size, what=what) if isinstance(size, str) else size


def dynamic_memory(
    memory: str | int,
    *,
    minimum: str | int | None = None,
    maximum: str | int | None = None,
    buffer: int | None = None,
    weight: int | None = None,
) -> DynamicMemory | None:
    """Limits for a machine that starts with *memory*; ``None``, fixed memory, if none is given.

    What is not given: the minimum and the maximum are *memory* itself, the buffer is 20 %, the
    weight 5,000.
    """
    if all(each is None for each in (minimum, maximum, buffer, weight)):
        return None
    startup = _bytes(memory, "memory")
    return DynamicMemory(
        startup if minimum is None else _bytes(minimum, "the memory minimum"),
        startup if maximum is None else _bytes(maximum, "the memory maximum"),
        BUFFER_DEFAULT if buffer is None else buffer,
        WEIGHT_DEFAULT if weight is None else weight,
    )


def define_guest(
    guest: str,
    *,
    command_line: str = "",
    cpus: int = 1,
    memory: str | int = "512M",
    name: str | None = None,
    transport: Transport | str = Transport.AUTO,
    dynamic_memory: DynamicMemory | None = None,
    mmio_low: str | int = LOW_MMIO_DEFAULT,
    mmio_high: str | int = HIGH_MMIO_DEFAULT,
    progress: Callable[[str], None] = lambda _: None,
) -> MachineConfig:
    """:func:`define` for a distribution known by name, downloaded first if it is not cached.

    Its root is an initramfs with busybox and a shell; of a complete system it is a disk, whose
    changes are gone when the machine ends. *progress* is told what takes time.
    """
    from hvhost.guests.build import prepare_guest
    from hvhost.guests.catalog import FULL_GUESTS

    drives: tuple[DriveConfig, ...] = ()
    images: FullGuest | GuestImages
    if guest in FULL_GUESTS:
        from hvhost.guests.full import prepare_full
        from hvhost.machine.storage_model import DriveConfig

        images = prepare_full(guest, progress=progress)
        drives = (DriveConfig(str(images.disk), temporary=True),)
    else:
        images = prepare_guest(guest, progress=progress)
    command_line = f"{images.command_line} {command_line}".strip()
    config = define(
        kernel=images.kernel,
        initrd=images.initrd,
        command_line=command_line,
        cpus=cpus,
        memory=memory,
        name=name,
        transport=transport,
        dynamic_memory=dynamic_memory,
        mmio_low=mmio_low,
        mmio_high=mmio_high,
    )
    return replace(config, drives=drives)
