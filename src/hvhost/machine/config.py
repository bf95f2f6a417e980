"""What a machine is told to be: plain data, apart from the model because every start needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvhost.machine.kinds import Transport
from hvhost.memory.settings import (
    HIGH_MMIO_DEFAULT,
    LOW_MMIO_DEFAULT,
    DynamicMemory,
    hot_add_bytes,
)

if TYPE_CHECKING:
    from hvhost.machine.storage_model import DriveConfig, FibreChannelConfig
    from hvhost.network.config import AdapterConfig


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """Everything a worker needs to start a machine; memory in bytes, paths absolute.

    ``serial_ports`` is the number of 16550 UARTs (COM1 is the console). ``reset_on_crash`` of
    ``False`` leaves a panicked guest to its own ``panic=`` setting. ``memory`` is what the machine
    starts with; without ``dynamic_memory`` it changes only when somebody sets it. ``low_mmio`` and
    ``high_mmio`` are the sizes of the MMIO windows, see :mod:`hvhost.firmware.layout`.
    ``storage_process``: the disks are served by a process of their own.
    """

    name: str
    kernel: str
    initrd: str | None = None
    command_line: str = "console=ttyS0"
    cpus: int = 1
    memory: int = 512 << 20
    transport: Transport = Transport.AUTO
    serial_ports: int = 2
    drives: tuple[DriveConfig, ...] = ()
    fibre_channel: tuple[FibreChannelConfig, ...] = ()
    dynamic_memory: DynamicMemory | None = None
    low_mmio: int = LOW_MMIO_DEFAULT
    high_mmio: int = HIGH_MMIO_DEFAULT
    adapters: tuple[AdapterConfig, ...] = ()
    storage_process: bool = False

    @property
    def backing(self) -> int:
        """Bytes of memory to be mapped, what is added while it runs included."""
        return self.memory + hot_add_bytes(self.memory, self.dynamic_memory)
