"""The plug between a machine and a family of devices (storage, network, memory, ...)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.services.vss import SnapshotService, Vss

if TYPE_CHECKING:
    from hvhost.machine.computer import Computer


class Peripheral(Protocol):
    """A family's devices in one machine; it outlives resets, as disks and cables do.

    All methods are called on the loop's thread.
    """

    def attach(self, computer: Computer) -> None:
        """A new boot whose guest has not got the bus yet: offer devices on ``computer.bus``.

        From now on whoever touches a device or its channel holds ``computer.lock``.
        """

    def detach(self) -> None:
        """The computer is over: its bus was reset, its memory must not be touched again."""

    def tick(self, now: float) -> None:
        """Every two seconds, with ``computer.lock`` held; *now* is monotonic seconds."""

    def close(self) -> None:
        """The machine is over; give back what the constructor took."""


@runtime_checkable
class PeripheralElsewhere(Peripheral, Protocol):
    """A family whose devices are in another process, and so is what people ask of them."""

    family: str

    def call(self, name: str, parameters: str) -> str:
        """Call the route *name* there: JSON of its parameters, JSON of its result."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a peripheral may use of its machine.

    ``directory`` is the machine's own, for sockets and the like; ``event`` records a
    :class:`hvhost.machine.model.MachineEvent`, kind and detail, from any thread;
    ``vss`` is the machine's snapshot service, to be used with the computer's lock held.
    """

    config: MachineConfig
    loop: Loop
    directory: Path
    event: Callable[[str, str], None]
    vss: SnapshotService = field(default_factory=Vss)


def build_peripherals(around: Surroundings) -> list[Peripheral]:
    """The peripherals that the machine's configuration asks for.

    A family's modules are imported only if the machine has such devices: a start costs no more
    than what it uses. :class:`hvhost.errors.HvHostError` when one cannot be had.
    """
    from hvhost.memory.host import Commons
    from hvhost.memory.peripheral import MemoryPeripheral
    from hvhost.network.peripheral import NetworkPeripheral
    from hvhost.paths import runtime_dir

    config = around.config
    commons = Commons(runtime_dir("memory"))
    disks: list[Peripheral]
    if config.storage_process:
        from hvhost.storage.elsewhere import StorageElsewhere

        disks = [StorageElsewhere(around)]
    else:
        from hvhost.storage.backup import Backup
        from hvhost.storage.controller import Storage

        storage = Storage(around)
        disks = [Backup(around, storage), storage]  # they are closed in this order
    return [
        MemoryPeripheral(config, commons, around.event),
        *disks,
        NetworkPeripheral(config.adapters, around.loop, around.directory),
    ]
