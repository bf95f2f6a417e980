"""What the rows need of a guest and of the machine it runs in, and nothing more.

The real machine and the real probe are fitted to these in :mod:`hvhost.verify.live`; the unit
tests fit a scripted guest to them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.model import (
    CopyProgress,
    MachineConfig,
    MachineEvent,
    MachineInfo,
    ProcessorInfo,
    ShutdownAction,
)
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.network.addresses import Addresses
from hvhost.network.report import AdapterInfo
from hvhost.sockets.protocol import Service
from hvhost.verify.services import Drives, Services


class RowFailed(HvHostError):  # noqa: N818 — an outcome, not an accident
    """A row's proof did not come; the message is the sentence for the table.

    ``evidence`` are further lines that help to act on it.
    """

    def __init__(self, sentence: str, evidence: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.evidence = tuple(evidence)


class HostLacks(HvHostError):  # noqa: N818 — an outcome, not an accident
    """The host's hardware or kernel cannot do what a row needs; the message names it."""


class GuestLacks(HvHostError):  # noqa: N818 — an outcome, not an accident
    """The guest or its distribution does not have what a row needs; the message names it."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in the guest did; ``output`` is stdout and stderr together."""

    status: int
    output: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What a row needs of its machine beyond what the user chose; sizes in bytes."""

    memory: int | None = None
    dynamic_memory: DynamicMemory | None = None
    low_mmio: int | None = None
    high_mmio: int | None = None
    cpus: int | None = None

    def apply(self, config: MachineConfig) -> MachineConfig:
        """*config*, with what is set here in place of its own."""
        named = ("memory", "dynamic_memory", "low_mmio", "high_mmio", "cpus")
        given = {name: getattr(self, name) for name in named}
        return replace(config, **{key: each for key, each in given.items() if each is not None})


ANY_SHAPE = Shape()


class Carrier(StrEnum):
    """What carries the conversation with a probe."""

    SOCKET = "Hyper-V socket"
    SERIAL_LINE = "serial line"


class Probe(Protocol):
    """The program inside the guest. All methods raise :class:`HvHostError` when it is gone."""

    @property
    def carrier(self) -> Carrier:
        """How it is reached."""
        ...

    def read(self, path: str) -> str:
        """A file of the guest as text; :class:`HvHostError` with its error if unreadable."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """As :meth:`read`, for files that are not text."""
        ...

    def read_all(self, *patterns: str) -> dict[str, str]:
        """Every readable file that matches a shell pattern, by path, without its last newline."""
        ...

    def write(self, path: str, text: str) -> None:
        """Write *text* to a file of the guest in one write; :class:`HvHostError` if refused."""
        ...

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        """Run a program of the guest and wait for its end."""
        ...

    def fire(self, path: str, text: str) -> None:
        """Write *text* to a file of the guest without waiting for an answer."""
        ...

    def answers(self, timeout: float) -> bool:
        """Whether the probe answers within *timeout* seconds."""
        ...

    def close(self) -> None: ...


class MemoryControl(Protocol):
    """What :class:`hvhost.manager.memory.MemoryClient` does."""

    def info(self) -> MemoryInfo: ...

    def set(self, size: int, timeout: float = ...) -> MemoryInfo: ...


class NetworkControl(Protocol):
    """What :class:`hvhost.manager.network.NetworkClient` does."""

    def adapter(self, name: str) -> AdapterInfo | None: ...

    def add(self, nic: str, name: str) -> AdapterInfo: ...

    def remove(self, name: str) -> list[AdapterInfo]: ...

    def set_link(self, name: str, up: bool) -> AdapterInfo: ...

    def set_ip(self, name: str, wanted: Addresses) -> AdapterInfo: ...


class Machine(Protocol):
    """The machine's controls. All methods raise :class:`HvHostError` when its worker is gone."""

    def info(self) -> MachineInfo: ...

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        """Events with a sequence above *after*; waits up to *timeout* seconds for the first.

        :class:`HvHostError` when there are none and, the machine having ended, none will come.
        """
        ...

    def shut_down(self, action: ShutdownAction) -> None: ...

    def reset(self) -> None: ...

    def nmi(self) -> None: ...

    def pause(self) -> None:
        """Have every VP and the guest's clock stand still until :meth:`resume`."""
        ...

    def resume(self) -> None: ...

    def hang(self) -> list[ProcessorInfo]:
        """Leave every VP on a jump to itself with interrupts off; where they are then."""
        ...

    def processors(self) -> list[ProcessorInfo]:
        """Where every VP is just now."""
        ...

    def heartbeat_round_trips(self, count: int) -> list[float]: ...

    def connect(self, service: Service, timeout: float) -> socket.socket:
        """A socket connected to *service* of the guest, without a time-out of its own."""
        ...

    def listen(self, service: Service) -> socket.socket:
        """A socket that accepts what the guest connects to *service* of the host."""
        ...

    def copy(
        self,
        source: Path,
        destination: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        """Copy a file into the guest; :class:`HvHostError` if it is not whole there.

        Cancelled if *watch*, which sees the progress now and then, raises.
        """
        ...

    def back_up(self, options: BackupOptions) -> BackupInfo:
        """Back the disks up; :class:`HvHostError` if there is no backup in the end."""
        ...

    @property
    def services(self) -> Services:
        """Time and key-value pairs."""
        ...

    @property
    def drives(self) -> Drives:
        """Disks and DVD drives."""
        ...

    @property
    def network(self) -> NetworkControl:
        """Network adapters, which may come and go."""
        ...

    @property
    def memory(self) -> MemoryControl:
        """The machine's memory: see, set, change its limits."""
        ...

    def memory_held(self) -> int:
        """Bytes that the host's kernel says it holds for the guest's memory.

        In the rig, those of the file that the memory of all its machines lies in.
        """
        ...

    def vp_seconds(self) -> float | None:
        """CPU seconds the host spent on running VPs so far, as the host's kernel counts them.

        In the rig, that is all its emulator used. ``None`` where the host's kernel cannot tell.
        """
        ...

    def wait_stopped(self, timeout: float) -> bool:
        """Whether the machine stopped, its worker process ended, within *timeout* seconds."""
        ...

    def console(self) -> str:
        """All text of the guest's console since the machine started."""
        ...

    def connect_probe(self, timeout: float) -> Probe | None:
        """The probe, if it speaks within *timeout* seconds; a new conversation each time."""
        ...

    def keep_logs(self, directory: Path) -> None:
        """Write the worker's own log into *directory*; after the machine's end."""
        ...

    def kill(self) -> None:
        """End the machine at once, whatever state it is in; never raises for a dead one."""
        ...


class Modules(Protocol):
    """A kernel's module tree."""

    @property
    def release(self) -> str: ...

    def drivers_for(self, modalias: str) -> Sequence[str]:
        """Drivers, loadable or built in, whose aliases match; underscores in names."""
        ...

    def is_builtin(self, name: str) -> bool:
        """Whether ``modules.builtin`` lists it."""
        ...

    def option(self, name: str) -> bool | None:
        """Whether the kernel was built with it; ``None`` if its configuration is not at hand."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the kernel has it, built in or as a loadable module."""
        ...


class PreparedGuest(Protocol):
    """A kernel with its initramfs, ready to boot."""

    @property
    def os_name(self) -> str: ...

    @property
    def release(self) -> str:
        """The kernel's release (``uname -r``) as its file says."""
        ...

    @property
    def modules(self) -> Modules | None:
        """``None`` where the kernel's modules are not at hand, so nothing is known of them."""
        ...

    @property
    def daemons(self) -> frozenset[str]:
        """Hyper-V daemons that the distribution ships for this guest."""
        ...

    @property
    def daemons_of(self) -> str:
        """The known guest whose distribution they are from."""
        ...

    @property
    def is_64_bit(self) -> bool:
        """Whether the kernel runs in long mode."""
        ...

    def pae_sibling(self) -> PreparedGuest | None:
        """The same distribution with a 32-bit kernel, downloaded and built; itself if it is one.

        ``None`` if the distribution has none, or the kernel is nobody's.
        """
        ...

    def start(self, *, verbose: bool, shape: Shape = ANY_SHAPE) -> Machine:
        """Start a machine of it; :class:`HvHostError` when the host cannot.

        *verbose* puts the whole kernel log on the console, which costs time.
        """
        ...
