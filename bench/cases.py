"""The cases: each a function of the number of rounds that returns its figures."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from bench import software_host
from bench.inside import seconds_to_line
from bench.measurement import Measurement
from bench.memory import policy, relief, resize
from bench.memory_peer import memory_peer
from bench.network import network
from bench.network_peer import network_peer
from bench.services import services
from bench.services_rig import measure as measure_services
from bench.storage import storage
from bench.storage_peer import storage_peer
from bench.storage_process import storage_process
from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.guests.initramfs import READY_LINE
from hvhost.machine.model import HeartbeatStatus, Transport
from hvhost.manager.client import MachineClient
from hvhost.manager.definition import define
from hvhost.manager.launcher import launch
from hvhost.memory.settings import DynamicMemory
from hvhost.services.heartbeat import INTERVAL
from hvhost.units import MIB

COLD_SECONDS, WARM_SECONDS = 20.0, 15.0
HEARTBEATS = 200
FIVE_ROWS = ("smp", "heartbeat", "shutdown", "nmi", "lsvmbus")
BOOT_LIMIT = 300.0
COMMAND_LINE = "console=ttyS0 quiet"


@cache
def guest() -> GuestImages:
    """The guest everything is measured on."""
    return prepare_guest("debian-12", progress=lambda text: print(text, file=sys.stderr))


def _boot_on_rig() -> float:
    images = guest()
    command = [
        *(sys.executable, "-m", "hvhost", "run", "--kvm", "rig"),
        *("--kernel", str(images.kernel), "--initrd", str(images.initrd)),
        *("--append", COMMAND_LINE),
    ]
    taken = seconds_to_line(command, READY_LINE.encode(), BOOT_LIMIT)
    if taken is None:
        raise HvHostError(f"the guest did not reach user space within {BOOT_LIMIT:.0f} s.")
    return taken


@contextlib.contextmanager
def running(
    cpus: int = 1,
    dynamic: DynamicMemory | None = None,
) -> Iterator[MachineClient]:
    """A machine of the guest on the rig, booted, with its heartbeat."""
    images = guest()
    config = define(
        kernel=images.kernel,
        initrd=images.initrd,
        command_line=COMMAND_LINE,
        cpus=cpus,
        memory="512M",
        name="bench",
        transport=Transport.RIG,
        dynamic_memory=dynamic,
    )
    worker = launch(config, detach=False)
    try:
        client = MachineClient("bench")
        deadline = time.monotonic() + BOOT_LIMIT
        while client.info().heartbeat is not HeartbeatStatus.OK:
            if time.monotonic() > deadline:
                raise HvHostError("the guest's heartbeat never came.")
            time.sleep(0.2)
        yield client
    finally:
        worker.stop()
        worker.directory.remove()


def rig_boot(rounds: int) -> list[Measurement]:
    """``hvhost run`` to user space: with the rig's own start, and with the rig already up."""
    cold = []
    for _ in range(rounds):
        cold.append(_boot_on_rig())
        time.sleep(4)  # longer than the rig outlives its last machine
    with running():  # keeps the rig up
        warm = [_boot_on_rig() for _ in range(rounds)]
    return [
        Measurement("rig-boot", "run to user space, first", min(cold), "s", "limit", COLD_SECONDS),
        Measurement("rig-boot", "run to user space, after", min(warm), "s", "limit", WARM_SECONDS),
    ]


def verify(rounds: int) -> list[Measurement]:
    """What a maintainer waits for: from the command to the table of five rows, nothing to download.

    Each round starts a rig of its own where there is no other KVM.
    """
    guest()
    taken = []
    for _ in range(rounds):
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "hvhost", "verify", "--rows", ",".join(FIVE_ROWS)],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        taken.append(time.monotonic() - started)
    return [Measurement("verify", "five rows proven", min(taken), "s", "a minute", 60.0)]


def local_boot(rounds: int) -> list[Measurement]:
    """Inside a software KVM host: the local transport beside QEMU, same kernel, same memory."""
    images = guest()
    taken: dict[str, list[float | None]] = software_host.figures(
        "bench.inside", str(images.kernel), str(images.initrd), str(rounds)
    )
    ours = [seconds for seconds in taken["hvhost"] if seconds is not None]
    peers = [seconds for seconds in taken["qemu"] if seconds is not None]
    if not ours:
        raise HvHostError("no guest of ours reached user space in the software KVM host.")
    return [
        Measurement(
            "local-boot",
            "process start to user space",
            min(ours),
            "s",
            "QEMU -M pc",
            min(peers) if peers else None,
        )
    ]


def heartbeat(rounds: int) -> list[Measurement]:
    """Heartbeats back to back on the rig, and what one boot left the guest for."""
    del rounds
    with running() as client:
        exits = client.info().exits
        trips = sorted(client.measure_heartbeats(HEARTBEATS))
    figures = [
        Measurement("heartbeat", "round trip, median", statistics.median(trips) * 1e6, "µs"),
        Measurement("heartbeat", "round trip, p95", trips[len(trips) * 95 // 100] * 1e6, "µs"),
        Measurement("exits", "all of one boot", sum(exits.values()), ""),
    ]
    most = sorted(exits.items(), key=lambda item: -item[1])[:8]
    return figures + [Measurement("exits", reason, count, "") for reason, count in most]


def idle(rounds: int) -> list[Measurement]:
    """Wake-ups of the VMM while the guest does nothing, on a local KVM: in a software KVM host."""
    del rounds
    images = guest()
    found: dict[str, float] = software_host.figures(
        "bench.idle_inside", str(images.kernel), str(images.initrd)
    )
    what = "wake-ups of the worker a second"
    tick = "the tick of its clock", 1 / INTERVAL
    return [
        Measurement("idle", what, found["plain"], "/s", "without services", found["silent"]),
        Measurement("idle", f"{what}, without services", found["silent"], "/s", *tick),
        Measurement("idle", f"{what}, and with an adapter", found["adapter"], "/s", *tick),
    ]


def bus(rounds: int) -> list[Measurement]:
    """A heartbeat exchange in memory, without KVM, beside writing its bytes and nothing else."""
    del rounds
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from hvhost.services.heartbeat import Heartbeat
    from simulated.driver import GuestService, SimulatedGuest

    simulated = SimulatedGuest()
    device = Heartbeat()
    simulated.server.add_device(device)
    offers = simulated.connect()
    channel = simulated.open(next(iter(offers)))
    service = GuestService(channel, [(3, 0), (1, 0)])
    service.run()
    count = 2000
    start = time.perf_counter()
    for number in range(count):
        device.tick(number * 2.0)
        service.run()
    exchange = (time.perf_counter() - start) / count
    if len(service.requests) < count:
        raise HvHostError(f"{len(service.requests)} of {count} heartbeats were answered.")
    memory = bytearray(4096)
    view = memoryview(memory)
    packet = os.urandom(104)
    start = time.perf_counter()
    for _ in range(count):
        view[0:104] = packet
        bytes(view[0:104])
    limit = (time.perf_counter() - start) / count
    return [
        Measurement(
            "bus",
            "heartbeat exchange in memory, both sides",
            exchange * 1e6,
            "µs",
            "its bytes copied twice",
            limit * 1e6,
        )
    ]


def start_up(rounds: int) -> list[Measurement]:
    """What people wait for before anything happens."""
    times: dict[str, list[float]] = {"hvhost": [], "python": []}
    for _ in range(5 * rounds):
        for name, command in (
            ("hvhost", [sys.executable, "-m", "hvhost", "--help"]),
            ("python", [sys.executable, "-c", "pass"]),
        ):
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times[name].append((time.perf_counter() - start) * 1000)
    return [
        Measurement(
            "start-up",
            "hvhost --help",
            statistics.median(times["hvhost"]),
            "ms",
            "Python alone",
            statistics.median(times["python"]),
        )
    ]


def memory(rounds: int) -> list[Measurement]:
    """Memory given and taken while a guest runs, and what deciding about it costs."""
    del rounds
    with running() as client:
        figures = resize(client)
    with running(dynamic=DynamicMemory(256 * MIB, 1024 * MIB)) as client:
        return [*figures, *relief(client), *policy()]


def services_rig(rounds: int) -> Iterator[Measurement]:
    """File copy, key-value pairs and sockets of a real guest on the rig."""
    del rounds
    with running() as client:
        yield from measure_services(client)


CASES: dict[str, Callable[[int], Iterable[Measurement]]] = {
    "start-up": start_up,
    "bus": bus,
    "storage": storage,
    "storage-process": storage_process,
    "network": network,
    "services": services,
    "services-rig": services_rig,
    "storage-peer": storage_peer,
    "network-peer": network_peer,
    "rig-boot": rig_boot,
    "verify": verify,
    "memory": memory,
    "memory-peer": memory_peer,
    "heartbeat": heartbeat,
    "idle": idle,
    "local-boot": local_boot,
}
