"""A guest and its machine by script: they do what Linux and the worker do, or one thing wrong."""

from __future__ import annotations

import fnmatch
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from panic_texts import UNKNOWN_NMI, nmi_text
from scripted_services import ScriptedServices

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.model import (
    ChannelInfo,
    CopyProgress,
    CrashReport,
    HeartbeatStatus,
    MachineEvent,
    MachineInfo,
    MachineState,
    ProcessorInfo,
    ProcessorState,
    ShutdownAction,
)
from hvhost.sockets.protocol import Service
from hvhost.verify.contract import (
    HV_HEART_BEAT_GUID,
    HV_KVP_GUID,
    HV_SHUTDOWN_GUID,
    HV_TS_GUID,
    ROWS,
    Row,
    vmbus_alias,
)
from hvhost.verify.guest import (
    ANY_SHAPE,
    Carrier,
    CommandResult,
    Machine,
    MemoryControl,
    NetworkControl,
    Probe,
    Shape,
)
from hvhost.verify.results import RowResult
from hvhost.verify.rows import PROOFS
from hvhost.verify.services import Drives
from hvhost.verify.session import Timing

RELEASE = "6.1.0-test-amd64"
FAST = Timing(
    boot=0.3,
    heartbeat=0.1,
    no_contact=0.1,
    bus=0.1,
    event=0.1,
    poll=0.005,
    silence=0.01,
    stretch=lambda: 1.0,
)
INSTANCES = {
    HV_SHUTDOWN_GUID: "b6650ff7-33bc-4840-8048-e0676786f393",
    HV_HEART_BEAT_GUID: "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0",
    HV_TS_GUID: "2dd1ce17-079e-403c-b352-a1921ee207ee",
    HV_KVP_GUID: "242ff919-07db-4180-9c2e-b86cb68c8c55",
}
# Others speak through real sockets with the real probe, or need a guest's real memory.
_UNSCRIPTED = (
    "file-copy",
    "live-backup",
    "hvsocket",
    "mmio-gap",
    "pae",
    "memory-resize",
    "hot-add",
    "ballooning",
    "storage",
    "trim",
    "vhdx-resize",
    "fibre-channel",
    "wwn",
    "network",
    "jumbo-frames",
    "offloads",
    "lro",
    "vrss",
    "vlan",
    "static-ip",
)
SCRIPTED_PROOFS = tuple(p for p in PROOFS if p.row_id not in _UNSCRIPTED)
HEARTBEAT_CHANNEL = 2
TIMESYNC_CHANNEL = 3
UNBOUND = {
    HV_HEART_BEAT_GUID: {"unbound"},
    HV_TS_GUID: {"timesync-unbound"},
    HV_KVP_GUID: {"kvp-unbound"},
}


@dataclass(frozen=True)
class ScriptedModules:
    """A module tree; aliases are exact."""

    release: str = RELEASE
    aliases: dict[str, str] = field(default_factory=dict)
    builtin: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    options: frozenset[str] | None = None

    def drivers_for(self, modalias: str) -> Sequence[str]:
        return [self.aliases[modalias]] if modalias in self.aliases else []

    def is_builtin(self, name: str) -> bool:
        return name in self.builtin

    def option(self, name: str) -> bool | None:
        return None if self.options is None else name in self.options

    def __contains__(self, name: str) -> bool:
        return name in self.builtin or name in self.names or name in self.aliases.values()


def full_modules() -> ScriptedModules:
    """A kernel with every driver of the contract as a module."""
    drivers = [driver for row in ROWS for driver in row.drivers]
    return ScriptedModules(
        aliases={driver.alias: driver.modules[0] for driver in drivers if driver.alias},
        names=frozenset(name for driver in drivers for name in driver.modules),
    )


class ScriptedGuest:
    """A prepared guest; ``faults`` name what goes wrong in the machines started of it."""

    def __init__(self, *faults: str, cpus: int = 2, modules: ScriptedModules | None = None) -> None:
        self.faults = set(faults)
        self.cpus = cpus
        self.machines: list[ScriptedMachine] = []
        self.verbose: list[bool] = []
        self.shapes: list[Shape] = []
        self.sibling: ScriptedGuest | None = None
        self._modules = modules or full_modules()

    @property
    def os_name(self) -> str:
        return "Scripted Linux 1"

    @property
    def modules(self) -> ScriptedModules | None:
        return None if "modules-unknown" in self.faults else self._modules

    @property
    def daemons(self) -> frozenset[str]:
        return frozenset({"hv_kvp_daemon", "chronyd"} - self.faults)

    @property
    def daemons_of(self) -> str:
        return "debian-12"

    @property
    def release(self) -> str:
        return RELEASE

    @property
    def is_64_bit(self) -> bool:
        return "32-bit" not in self.faults

    def pae_sibling(self) -> ScriptedGuest | None:
        return self.sibling

    def start(self, *, verbose: bool, shape: Shape = ANY_SHAPE) -> Machine:
        self.shapes.append(shape)
        self.verbose.append(verbose)
        if "no-start" in self.faults:
            raise HvHostError("no KVM here; run hvhost doctor.")
        machine = ScriptedMachine(self)
        if "second-boot-works" in self.faults:
            self.faults -= {"second-boot-works", "no-probe"}
        self.machines.append(machine)
        return machine


class ScriptedMachine:
    @property
    def network(self) -> NetworkControl:
        raise NotImplementedError("the network is not scripted")

    def back_up(self, options: BackupOptions) -> BackupInfo:
        raise NotImplementedError("backups are not scripted")

    @property
    def drives(self) -> Drives:
        raise NotImplementedError("drives are not scripted")

    @property
    def memory(self) -> MemoryControl:
        raise NotImplementedError("memory is not scripted")

    def memory_held(self) -> int:
        raise NotImplementedError("memory is not scripted")

    def connect(self, service: Service, timeout: float) -> socket.socket:
        raise NotImplementedError("sockets are not scripted")

    def listen(self, service: Service) -> socket.socket:
        raise NotImplementedError("sockets are not scripted")

    def copy(
        self,
        source: Path,
        destination: str,
        *,
        create_path: bool = False,
        overwrite: bool = False,
        watch: Callable[[CopyProgress], None] = lambda progress: None,
    ) -> CopyProgress:
        raise NotImplementedError("file copy is not scripted")

    def __init__(self, guest: ScriptedGuest) -> None:
        self.guest = guest
        self.faults = set(guest.faults)
        self.cpus = guest.cpus
        self.console_text = ""
        self.log: list[MachineEvent] = []
        self.boot_count = 0
        self.killed = False
        self.worker_dead = False
        self.spun = 0.0
        self.services = ScriptedServices(self.faults)
        self.looks = 0
        self._boot_id = str(uuid.uuid4())
        self._boot()

    # The guest's side.

    def _boot(self) -> None:
        self.boot_count += 1
        self.state = MachineState.RUNNING
        self.heartbeat = HeartbeatStatus.NO_DRIVER
        self.crash: CrashReport | None = None
        self.hung = False
        self.nmi_panics = False
        self.interrupts = [[0] * self.cpus for _ in INSTANCES]
        self.events_sent = [0] * len(INSTANCES)
        self.callbacks = [10] * self.cpus
        self.channel_cpu = dict.fromkeys(range(1, len(INSTANCES) + 1), 0)
        self.kernel_log: list[str] = []
        if "same-boot-id" not in self.faults:
            self._boot_id = str(uuid.uuid4())
        self._event("reset" if self.boot_count > 1 else "started")
        self._print("" if "silent" in self.faults else f"Linux version {RELEASE} (x)")
        if "silent" in self.faults:
            return
        if "undetected" not in self.faults:
            self._print("Hypervisor detected: Microsoft Hyper-V")
        if "boot-panic" in self.faults:
            self._print("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block")
            return
        if "no-userspace" in self.faults:
            self._print("clocksource: jiffies")
            return
        if "stops-at-boot" in self.faults:
            self.state = MachineState.STOPPED
            return
        if self.bus:
            self._event("bus", "5.3")
            if "no-heartbeat" not in self.faults:
                self.heartbeat = HeartbeatStatus.OK
        self._print("hvhost-guest: init")

    @property
    def bus(self) -> bool:
        return "no-bus" not in self.faults

    @property
    def probe_there(self) -> bool:
        return not (
            self.faults & {"silent", "boot-panic", "no-userspace", "no-probe"}
            or self.hung
            or self.state is not MachineState.RUNNING
        )

    def _print(self, line: str) -> None:
        if line:
            self.console_text += line + "\r\n"

    def _event(self, kind: str, detail: str = "") -> None:
        self.log.append(MachineEvent(len(self.log) + 1, 0.0, kind, detail))

    def deliver(self, channel: int, signals: int = 1) -> None:
        """The host interrupts for *channel*; the guest counts and answers."""
        cpu = 0 if "wrong-cpu" in self.faults else self.channel_cpu[channel]
        self.callbacks[cpu] += signals
        if "all-cpus" in self.faults:
            self.callbacks = [count + signals for count in self.callbacks]
            self.callbacks[cpu] -= signals
        counted = channel % len(INSTANCES) + 1 if "wrong-channel" in self.faults else channel
        polled = "driver-at-work" in self.faults and self.events_sent[channel - 1] % 4 == 3
        self.interrupts[counted - 1][cpu] += 0 if polled else signals
        if "noisy-channel" in self.faults:
            self.interrupts[channel % len(INSTANCES)][cpu] += signals
        if "no-answers" not in self.faults:
            self.events_sent[channel - 1] += signals

    def panic(self, reason: str) -> None:
        lines = [*self.kernel_log, f"<0>[    9.0] Kernel panic - not syncing: {reason}"]
        if "token-lost" in self.faults:
            lines = lines[-1:]
        self._crashed("\n".join(lines))

    def _crashed(self, text: str) -> None:
        """The panic's last act: its *text* goes to the host."""
        self.state, self.heartbeat = MachineState.CRASHED, HeartbeatStatus.CRASHED
        if "state-not-crashed" in self.faults:
            self.state = MachineState.RUNNING
        self._print(text)
        if "no-crash-msrs" in self.faults:
            return
        sent = None if "no-crash-text" in self.faults else text
        self.crash = CrashReport((1, 2, 3, 4, len(text)), sent, 9.0)
        self._event("crash", sent or "")

    def files(self) -> dict[str, str]:
        mapping = "\n".join(f"processor\t: {cpu}" for cpu in range(self.cpus))
        online = f"0-{self.cpus - 1}" if "cpu-offline" not in self.faults else "0"
        counts = " ".join(map(str, self.callbacks))
        files = {
            "/proc/sys/kernel/osrelease": RELEASE + "\n",
            "/proc/sys/kernel/random/boot_id": self._boot_id + "\n",
            "/proc/sys/kernel/unknown_nmi_panic": "0\n",
            "/proc/uptime": f"{self.services.uptime():.2f} 1.00\n",
            "/sys/devices/system/cpu/online": online + "\n",
            "/proc/cpuinfo": mapping + "\n",
            "/proc/interrupts": (
                "     " + " ".join(f"CPU{cpu}" for cpu in range(self.cpus)) + "\n"
                f"  0:  {counts}  IO-APIC timer\nHYP:  {counts}  Hypervisor callback interrupts\n"
            ),
        }
        files |= self.services.files()
        if not self.bus:
            return files
        for channel, (interface, instance) in enumerate(INSTANCES.items(), 1):
            if "no-devices" in self.faults or (
                "guest-misses-device" in self.faults and interface == HV_KVP_GUID
            ):
                continue
            directory = f"/sys/bus/vmbus/devices/{instance}"
            modalias = vmbus_alias(interface)
            if interface == HV_TS_GUID and self.services.off:
                continue
            bound = not self.faults & UNBOUND.get(interface, set())
            bound &= not (interface == HV_TS_GUID and self.services.unbound)
            files |= {
                f"{directory}/class_id": f"{{{interface}}}\n",
                f"{directory}/device_id": f"{{{instance}}}\n",
                f"{directory}/uevent": ("DRIVER=hv_utils\n" if bound else "")
                + f"MODALIAS={modalias}\n",
                f"{directory}/channel_vp_mapping": f"{channel}:{self.channel_cpu[channel]}\n",
                f"{directory}/channels/{channel}/cpu": f"{self.channel_cpu[channel]}\n",
                f"{directory}/channels/{channel}/interrupts": (
                    f"{sum(self.interrupts[channel - 1])}\n"
                ),
                f"{directory}/channels/{channel}/events": f"{self.events_sent[channel - 1]}\n",
            }
        return files

    # The host's side: the Machine protocol.

    def _alive(self) -> None:
        if self.worker_dead or self.killed:
            raise HvHostError("the machine's worker has ended; its log is in worker.log.")

    def info(self) -> MachineInfo:
        self._alive()
        channels = [
            ChannelInfo(channel, interface[:4], interface, instance, "open", 0)
            for channel, (interface, instance) in enumerate(INSTANCES.items(), 1)
        ]
        if "host-misses-device" in self.faults:
            channels = channels[:-1]
        negotiated = self.bus and any(event.kind == "bus" for event in self.log)
        return MachineInfo(
            name="scripted",
            pid=1,
            state=self.state,
            seconds=1.0,
            cpus=self.cpus,
            memory=512 << 20,
            kernel="/k",
            command_line="console=ttyS0"
            + (" initcall_blacklist=hv_acpi_init" if "blacklisted" in self.faults else "")
            + (" module_blacklist=x,hv_vmbus" if "forbidden" in self.faults else "")
            + (" nopv" if "nopv" in self.faults else ""),
            transport="rig" if "rig" in self.faults else "scripted",
            timesync_ready=(
                self.bus
                and "no-timesync" not in self.faults
                and (not self.services.off or "off-ready" in self.faults)
            ),
            kvp_ready=self.bus and "no-kvp" not in self.faults,
            guest_os_id=0 if self.faults & {"undetected", "silent"} else 0x8100060100000000,
            vmbus_version="5.3" if negotiated and "no-version" not in self.faults else None,
            heartbeat=self.heartbeat,
            shutdown_ready=self.bus and "no-shutdown-channel" not in self.faults,
            crash=self.crash,
            channels=tuple(channels) if negotiated else (),
        )

    def events(self, after: int, timeout: float) -> list[MachineEvent]:
        return [event for event in self.log if event.sequence > after]

    def shut_down(self, action: ShutdownAction) -> None:
        self._alive()
        if "init-does-nothing" in self.faults:
            return
        missing = "init-line-missing" in self.faults or (
            "poweroff-without-init" in self.faults and action is ShutdownAction.POWER_OFF
        )
        if not missing:
            self._print("hvhost-guest: shutdown path of init")
        if action is ShutdownAction.REBOOT:
            if "no-reset" not in self.faults:
                self._boot()
            return
        self._event("sleep", "S3" if "wrong-sleep-state" in self.faults else "S5")
        if "stays-on" not in self.faults:
            self.state, self.worker_dead = MachineState.STOPPED, True
            self._event("stopped", "S5")

    def reset(self) -> None:
        self._alive()
        if "dies-at-reset" in self.faults:
            self.worker_dead = True
            self._alive()
        if "reset-ignored" not in self.faults:
            self._boot()

    def pause(self) -> None:
        if "says-running" not in self.faults:
            self.state, self.heartbeat = MachineState.PAUSED, HeartbeatStatus.PAUSED
        self.services.pause()

    def resume(self) -> None:
        self.state, self.heartbeat = MachineState.RUNNING, HeartbeatStatus.OK
        self.services.resume()

    def nmi(self) -> None:
        self._alive()
        if "nmi-lost" in self.faults or not (self.hung and self.nmi_panics):
            return
        flags = "00000206" if "interrupts-on" in self.faults else "00000006"
        self.kernel_log.append(f"RIP: 0010:default_idle+0xb/0x10\nRSP: 0 EFLAGS: {flags}")
        depth = 120 if self.faults & {"long-trace", "longer-trace"} else 0
        if "longer-trace-once" in self.faults and self.boot_count == 1:
            depth = 120
        if depth:
            text = nmi_text(UNKNOWN_NMI, "NMI: Not continuing", depth)
            kept = "panic+0x" if "long-trace" in self.faults else "exc_nmi+0x"
            self._crashed(text[text.index("\n", text.index(kept)) + 1 :])
            return
        self.panic("Hard LOCKUP" if "other-panic" in self.faults else "NMI: Not continuing")

    def hang(self) -> list[ProcessorInfo]:
        self._alive()
        if "hang-pauses" in self.faults:
            self.state = MachineState.PAUSED
        if "hang-not-hung" not in self.faults:
            self.hung = True
        if "contact-stays" not in self.faults:
            self.heartbeat = HeartbeatStatus.NO_CONTACT
        self.looks = 0
        return self.processors()

    def processors(self) -> list[ProcessorInfo]:
        self._alive()
        self.looks += 1
        wandering = "hang-wanders" in self.faults and self.looks > 1
        return [
            ProcessorInfo(
                index,
                ProcessorState.HALTED if "hang-halts" in self.faults else ProcessorState.RUNNING,
                0xFFFFFFFF81000000 + 0x10 * index + (2 if wandering and index else 0),
                0x202 if "hang-interruptible" in self.faults else 2,
                3 if "hang-in-user-space" in self.faults else 0,
            )
            for index in range(self.cpus)
        ]

    def heartbeat_round_trips(self, count: int) -> list[float]:
        self._alive()
        if "triple-fault" in self.faults:
            self.faults -= set() if "again-and-again" in self.faults else {"triple-fault"}
            self._event("reset", "triple fault")
            self._boot()
            raise HvHostError("the guest's probe was started again.")
        if "rig-dies" in self.faults:
            self.guest.faults -= {"rig-dies"}
            self._event("stopped", "the rig's QEMU died: abort.")
            self.worker_dead = True
            self._alive()
        for _ in range(count):
            self.deliver(HEARTBEAT_CHANNEL)
        return [0.001] * count

    def vp_seconds(self) -> float | None:
        if "no-spin" in self.faults:
            return 0.0
        self.spun += 2.0
        return self.spun

    def wait_stopped(self, timeout: float) -> bool:
        return self.worker_dead

    def console(self) -> str:
        return self.console_text

    def connect_probe(self, timeout: float) -> Probe | None:
        self._alive()
        if "dies-at-boot" in self.faults:
            self.worker_dead = True
            self._alive()
        return ScriptedProbe(self) if self.probe_there else None

    def keep_logs(self, directory: Path) -> None:
        (directory / "worker.log").write_text("worker\n")

    def kill(self) -> None:
        self.killed = True


class ScriptedProbe:
    def __init__(self, machine: ScriptedMachine) -> None:
        self.machine = machine
        self.boot = machine.boot_count
        serial = "serial" in machine.faults
        self.carrier = Carrier.SERIAL_LINE if serial else Carrier.SOCKET

    def _there(self) -> ScriptedMachine:
        if not self.answers(0):
            raise HvHostError("the guest's probe does not answer.")
        return self.machine

    def read(self, path: str) -> str:
        files = self._there().files()
        if path not in files:
            raise HvHostError(f"{path}: No such file or directory (in the guest)")
        return files[path]

    def read_bytes(self, path: str) -> bytes:
        return self._there().services.read_bytes(path)

    def read_all(self, *patterns: str) -> dict[str, str]:
        if any("interrupts" in pattern for pattern in patterns):
            machine = self._there()
            machine.interrupts[TIMESYNC_CHANNEL - 1][0] += machine.services.interrupt()

        def matches(path: str, pattern: str) -> bool:
            parts, wanted = path.split("/"), pattern.split("/")
            return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))

        return {
            path: text.removesuffix("\n")
            for path, text in self._there().files().items()
            if any(matches(path, pattern) for pattern in patterns)
        }

    def write(self, path: str, text: str) -> None:
        machine = self._there()
        if path.endswith("/cpu"):
            if "move-refused" in machine.faults:
                raise HvHostError(f"{path}: Input/output error (in the guest)")
            if "move-ignored" not in machine.faults:
                machine.channel_cpu[int(path.split("/")[-2])] = int(text)
        elif machine.services.write(path, text):
            pass
        elif path == "/dev/kmsg":
            machine.kernel_log.append(text.strip())
        elif path.endswith("unknown_nmi_panic"):
            machine.nmi_panics = text == "1"
        else:
            raise HvHostError(f"{path}: Permission denied (in the guest)")

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        machine = self._there()
        if command[0] == "nproc":
            return CommandResult(0, f"{machine.cpus}\n")
        if command[0] == "dmesg":
            return CommandResult(0, "[0.0] Linux version " + RELEASE + "\n")
        if command[0] == "sh" and "lsvmbus" in command[-1] and "python" in machine.faults:
            listed = [*INSTANCES.items()]
            if "lists-twice" in machine.faults:
                listed.append(listed[0])
            if "lists-nameless" in machine.faults:
                listed.append((str(uuid.UUID(int=0)), listed[0][1]))
            return CommandResult(
                0,
                "\n".join(
                    f"VMBUS ID  {number}: Class_ID = {{{interface}}} - [x]\n"
                    f"\tDevice_ID = {{{instance}}}\n\tSysfs path: /sys\n\tRel_ID=1, target_cpu=0\n"
                    for number, (interface, instance) in enumerate(listed, 1)
                ),
            )
        return machine.services.run(command) or CommandResult(127, "")

    def fire(self, path: str, text: str) -> None:
        assert (path, text) == ("/proc/sysrq-trigger", "c")
        self._there().panic("sysrq triggered crash")

    def answers(self, timeout: float) -> bool:
        return self.machine.probe_there and self.boot == self.machine.boot_count

    def close(self) -> None: ...


class Silent:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.done: list[RowResult] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def row_started(self, row: Row) -> None:
        self.steps.append(row.id)

    def row_done(self, result: RowResult) -> None:
        self.done.append(result)
