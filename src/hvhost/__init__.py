"""hvhost: a Hyper-V host for Linux guests, in Python.

``from hvhost import Machine`` is the API for programs; see :class:`hvhost.manager.machine.Machine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvhost.errors import HvHostError
    from hvhost.machine.model import HeartbeatStatus, MachineInfo
    from hvhost.manager.machine import Machine
    from hvhost.memory.settings import DynamicMemory

_HOMES = {
    "DynamicMemory": "hvhost.memory.settings",
    "HeartbeatStatus": "hvhost.machine.model",
    "HvHostError": "hvhost.errors",
    "Machine": "hvhost.manager.machine",
    "MachineInfo": "hvhost.machine.model",
}

__all__ = ["DynamicMemory", "HeartbeatStatus", "HvHostError", "Machine", "MachineInfo"]


def __getattr__(name: str) -> object:
    """Imported when first used: the workers and the command line need none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hvhost' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
