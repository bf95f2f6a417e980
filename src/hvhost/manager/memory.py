"""A machine's memory for programs that wait: what the command line and ``verify`` speak."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.manager.client import MachineClient
from hvhost.memory.report import MemoryInfo

SET_SECONDS = 60.0
"""How long a change of size may take, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class MemoryClient:
    """The memory of a running machine; every method raises ``HvHostError`` with a sentence."""

    machine: MachineClient

    def info(self) -> MemoryInfo:
        """What memory the guest has, needs, and is about to have."""
        return self.machine.ask("GET", "/v1/machine/memory", MemoryInfo)

    def set(self, size: int, timeout: float = SET_SECONDS) -> MemoryInfo:
        """Give a machine with fixed memory *size* bytes; waits until the guest has done it."""
        body = {"size": size, "timeout": timeout}
        return self.machine.ask("POST", "/v1/machine/memory/set", MemoryInfo, body, timeout)

    def change(
        self,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
        buffer: int | None = None,
        weight: int | None = None,
    ) -> MemoryInfo:
        """New limits of dynamic memory, sizes in bytes; what is not given stays."""
        body = {"minimum": minimum, "maximum": maximum, "buffer": buffer, "weight": weight}
        return self.machine.ask("POST", "/v1/machine/memory/limits", MemoryInfo, body)
