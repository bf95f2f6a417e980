"""Routes of a machine's memory."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hvhost.machine.endpoint import Endpoint
from hvhost.machine.model import LiveMachine
from hvhost.memory.peripheral import MemoryPeripheral
from hvhost.memory.report import MemoryInfo

Size = Annotated[int, msgspec.Meta(ge=1, description="bytes")]


class MemorySetRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much memory a machine with fixed memory is to have; waits up to ``timeout`` seconds."""

    size: Size
    timeout: Annotated[float, msgspec.Meta(ge=0, le=600, description="seconds to wait")] = 60.0


class MemoryLimitsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """New limits of dynamic memory; what is left out stays."""

    minimum: Size | None = None
    maximum: Size | None = None
    buffer: Annotated[int, msgspec.Meta(description="percent")] | None = None
    weight: int | None = None


def _set(machine: LiveMachine, request: MemorySetRequest) -> MemoryInfo:
    return machine.peripheral(MemoryPeripheral).set(request.size, request.timeout)


def _change(machine: LiveMachine, request: MemoryLimitsRequest) -> MemoryInfo:
    return machine.peripheral(MemoryPeripheral).change(
        minimum=request.minimum,
        maximum=request.maximum,
        buffer=request.buffer,
        weight=request.weight,
    )


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/machine/memory",
        "memory",
        "What memory the guest has, needs, and is about to have",
        lambda machine, _: machine.peripheral(MemoryPeripheral).info(),
        result=MemoryInfo,
    ),
    Endpoint(
        "POST",
        "/v1/machine/memory/set",
        "memory_set",
        "Give a machine with fixed memory more or less of it",
        _set,
        MemorySetRequest,
        MemoryInfo,
    ),
    Endpoint(
        "POST",
        "/v1/machine/memory/limits",
        "memory_limits",
        "Lower the minimum or raise the maximum of dynamic memory",
        _change,
        MemoryLimitsRequest,
        MemoryInfo,
    ),
)
