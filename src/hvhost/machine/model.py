"""What a machine is told to be, and what it says of itself: plain data for worker and API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from hvhost.errors import HvHostError
from hvhost.machine.config import MachineConfig as MachineConfig
from hvhost.machine.kinds import KvpPool as KvpPool
from hvhost.machine.kinds import Transport as Transport

Family = TypeVar("Family")


class MachineState(StrEnum):
    """A machine's life; ``crashed`` is a guest that reported a panic and was not reset since."""

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    CRASHED = "crashed"
    STOPPED = "stopped"
    FAILED = "failed"


def paused_error(name: str) -> HvHostError:
    """What to raise where the guest of machine *name* would have to answer."""
    return HvHostError(f"machine {name!r} is paused; `hvhost resume {name}` lets it go on.")


class HeartbeatStatus(StrEnum):
    """What the heartbeat service knows, in the words of Hyper-V's own management."""

    NO_DRIVER = "no-driver"
    OK = "ok"
    NO_CONTACT = "no-contact"
    PAUSED = "paused"
    CRASHED = "crashed"


class ShutdownAction(StrEnum):
    """What the shutdown service can ask of a guest."""

    POWER_OFF = "power-off"
    REBOOT = "reboot"


@dataclass(frozen=True, slots=True)
class KvpRecord:
    """One key-value pair and where it is; numbers are given as their decimal digits."""

    pool: KvpPool
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class IpSettings:
    """Addresses of one adapter.

    ``adapter`` is what names it: its MAC address (``00:15:5D:…``) when asking, its instance GUID
    with braces when setting. ``family`` has bit 0 set for IPv4, bit 1 for IPv6. Lists are separated
    by semicolons.
    """

    adapter: str
    family: int = 0
    dhcp: bool = False
    addresses: str = ""
    subnets: str = ""
    gateways: str = ""
    dns_servers: str = ""


class CopyState(StrEnum):
    """A file copy is under way, or ended."""

    COPYING = "copying"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """A file copied into the guest: sizes in bytes, ``error`` says why it failed."""

    source: str
    destination: str
    size: int
    copied: int = 0
    seconds: float = 0.0
    state: CopyState = CopyState.COPYING
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """An integration service; ``state`` is its channel's, ``ready``: the guest's driver is there.

    Sockets have channels only while somebody is connected.
    """

    name: str
    enabled: bool
    state: str | None
    ready: bool


@dataclass(frozen=True, slots=True)
class ChannelInfo:
    """One VMBus offer as the host lists it; GUIDs as lower-case strings."""

    channel_id: int
    name: str
    interface_type: str
    interface_instance: str
    state: str
    target_vp: int


class ProcessorState(StrEnum):
    """What a virtual processor does: run code, wait for an interrupt, or wait to be started."""

    RUNNING = "running"
    HALTED = "halted"
    NOT_STARTED = "not-started"


@dataclass(frozen=True, slots=True)
class ProcessorInfo:
    """Where a virtual processor is just now: ``rip`` linear, ``ring`` its privilege level."""

    index: int
    state: ProcessorState
    rip: int
    rflags: int
    ring: int


@dataclass(frozen=True, slots=True)
class CrashReport:
    """What the guest wrote to the crash MSRs ([TLFS] 2.8): P0..P4 and, if sent, the text."""

    parameters: tuple[int, ...]
    text: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class MachineInfo:
    """A machine's own account; times in seconds since its worker started."""

    name: str
    pid: int
    state: MachineState
    seconds: float
    cpus: int
    memory: int
    kernel: str
    command_line: str
    transport: str
    boots: int = 0
    guest_os_id: int = 0
    vmbus_version: str | None = None
    heartbeat: HeartbeatStatus = HeartbeatStatus.NO_DRIVER
    heartbeat_round_trip_microseconds: float | None = None
    shutdown_ready: bool = False
    timesync_ready: bool = False
    kvp_ready: bool = False
    file_copy_ready: bool = False
    crash: CrashReport | None = None
    channels: tuple[ChannelInfo, ...] = ()
    exits: dict[str, int] = field(default_factory=dict)
    last_stop: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ClockSample:
    """A clock of the guest and the host's at one moment, in nanoseconds since 1970.

    Their true difference is within ``error`` of that of these two numbers.
    """

    host: int
    guest: int
    error: int


@dataclass(frozen=True, slots=True)
class MachineEvent:
    """Something that happened; ``sequence`` grows by one, so that a client can ask for the rest.

    Kinds: ``started``, ``reset``, ``heartbeat`` (detail: the new status), ``crash`` (detail: the
    guest's text), ``paused``, ``resumed`` (detail: after how long), ``bus`` (detail: the
    negotiated version), ``fault`` (detail: what the guest did wrong), ``sleep`` (detail: ``S5``),
    ``stopped`` (detail: why).
    """

    sequence: int
    seconds: float
    kind: str
    detail: str = ""


class LiveMachine(Protocol):
    """What the API server may ask of the machine in its own process; all methods thread-safe.

    Methods raise :class:`hvhost.errors.HvHostError` with a sentence for the user.
    """

    @property
    def config(self) -> MachineConfig: ...

    def peripheral(self, kind: type[Family]) -> Family:
        """The machine's device family of this class (see :mod:`hvhost.machine.peripheral`)."""
        ...

    def elsewhere(self, family: str) -> Callable[[str, str], str] | None:
        """What calls a route by its name, parameters and result in JSON, in the process that has
        this family's devices; ``None`` if that is this one."""
        ...

    def info(self) -> MachineInfo: ...

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        """Events with a sequence above *after*; waits up to *timeout* seconds for the first."""
        ...

    def shut_down(self, action: ShutdownAction) -> None:
        """Ask the guest through its shutdown service; returns when the request was sent."""
        ...

    def force_stop(self) -> None:
        """Power off at once; the worker ends."""
        ...

    def reset(self) -> None:
        """Hard reset: the guest boots again from its kernel."""
        ...

    def pause(self) -> None:
        """Stop every VP and the partition's clock; devices keep their state."""
        ...

    def resume(self) -> None:
        """Let a paused machine go on; its guest is told the time."""
        ...

    def nmi(self) -> None:
        """Raise a non-maskable interrupt on VP 0."""
        ...

    def hang(self) -> list[ProcessorInfo]:
        """Debug: leave every VP spinning in the guest's own ring-0 text, interrupts off."""
        ...

    def processors(self) -> list[ProcessorInfo]:
        """Debug: where every VP is; each leaves the guest for a moment."""
        ...

    def heartbeat_round_trips(self, count: int) -> list[float]:
        """Seconds of *count* heartbeats sent back to back."""
        ...

    def time_sync(self) -> float:
        """Have the guest set its clock to the host's now; seconds until its driver took it."""
        ...

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        """Debug: see :mod:`hvhost.machine.clock_watch`."""
        ...

    def kvp_list(self, pool: KvpPool | None) -> list[KvpRecord]:
        """All items of *pool*, or of all pools, in the guest's order."""
        ...

    def kvp_get(self, pool: KvpPool | None, key: str) -> KvpRecord:
        """The item of *key* in *pool*, or in the first pool that has it."""
        ...

    def kvp_set(self, pool: KvpPool, key: str, value: str) -> None:
        """Add an item or change it; one of a host's pool is given again at every boot."""
        ...

    def kvp_delete(self, pool: KvpPool, key: str) -> None:
        """Remove an item."""
        ...

    def ip_settings(self, adapter: str) -> IpSettings:
        """The addresses of the guest's adapter with this MAC address."""
        ...

    def set_ip(self, settings: IpSettings) -> None:
        """Have the guest's daemon configure an adapter, named by its instance GUID in braces."""
        ...

    def copy_start(
        self, source: str, destination: str, *, create_path: bool, overwrite: bool
    ) -> CopyProgress:
        """Begin to copy the host's file *source* into the guest; one copy at a time."""
        ...

    def copy_progress(self, timeout: float) -> CopyProgress:
        """How far the last copy is; waits up to *timeout* seconds for its end."""
        ...

    def copy_cancel(self) -> None:
        """Give the copy under way up, if there is one."""
        ...

    def services(self) -> list[ServiceInfo]:
        """The integration services, switched on or off."""
        ...

    def set_service(self, name: str, enabled: bool) -> None:
        """Switch a service on or off; the guest's driver binds or unbinds."""
        ...
