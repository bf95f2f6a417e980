"""A machine's memory without a guest: does at once what it is told."""

from __future__ import annotations

from dataclasses import replace

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.units import GIB, MIB


class FakeMemory:
    """Has used 300 MiB; refuses a size below 400 MiB."""

    def __init__(self, config: MachineConfig) -> None:
        self._info = MemoryInfo(
            assigned=config.memory,
            startup=config.memory,
            added=0,
            ballooned=0,
            ceiling=4 * GIB,
            dynamic=config.dynamic_memory,
            resident=200 * MIB,
            discarded=0,
            reported=0,
            driver="ready",
            version="2.0",
            demand=300 * MIB,
            needed=400 * MIB,
        )

    def info(self) -> MemoryInfo:
        return self._info

    def set(self, size: int, timeout: float) -> MemoryInfo:
        if size < 400 * MIB:
            raise HvHostError(f"{size >> 20} MiB is too little.")
        change = size - self._info.startup
        self._info = replace(
            self._info, assigned=size, added=max(0, change), ballooned=max(0, -change)
        )
        return self._info

    def change(
        self,
        *,
        minimum: int | None,
        maximum: int | None,
        buffer: int | None,
        weight: int | None,
    ) -> MemoryInfo:
        if buffer is not None:
            raise HvHostError("the memory buffer changes only while the machine is stopped.")
        limits = DynamicMemory(minimum or 256 * MIB, maximum or GIB)
        self._info = replace(self._info, dynamic=limits)
        return self._info
