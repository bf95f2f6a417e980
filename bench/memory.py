"""Memory that changes: how quickly a guest gives and takes it, and what deciding costs."""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.measurement import Measurement
from hvhost.errors import HvHostError
from hvhost.manager.client import MachineClient
from hvhost.manager.memory import MemoryClient
from hvhost.manager.probe import connect_probe
from hvhost.memory.host import Commons, HostMemory, read_host_memory
from hvhost.memory.policy import Claim, Pace, share, step
from hvhost.units import GIB, MIB

MACHINES = 1000
TICKS = 10
TICK_SECONDS = 2.0
_PIECE = 192 * MIB
_READY_SECONDS, _SERVED_SECONDS = 60.0, 600.0


def policy() -> list[Measurement]:
    """Seconds of one processor that the policy takes, for each of a thousand machines a second."""
    numbers = random.Random(1)
    claims = [
        Claim(
            numbers.randrange(256, 8192) * MIB,
            numbers.randrange(100, 8192) * MIB,
            256 * MIB,
            16 * GIB,
            20,
            numbers.randrange(1, 10_000),
        )
        for _ in range(MACHINES)
    ]
    start = time.process_time()
    parts = [claim.part for claim in claims]
    for _ in range(TICKS):
        share(parts, 2048 * GIB)
    shared = (time.process_time() - start) / TICKS / TICK_SECONDS
    pace = Pace()
    start = time.process_time()
    for tick in range(TICKS * MACHINES):
        claim = claims[tick % MACHINES]
        share([claim.part], 0)
        step(replace(claim, assigned=GIB), 2 * GIB, pace, tick * TICK_SECONDS)
    own = (time.process_time() - start) / (TICKS * MACHINES) / TICK_SECONDS
    return [
        Measurement(
            "memory", f"policy a machine a second, {MACHINES} machines", (shared + own) * 1e6, "µs"
        ),
        Measurement(
            "memory",
            f"the same with reading the notices of {MACHINES}",
            (_noticed(claims, read_host_memory) + own) * 1e6,
            "µs",
        ),
        Measurement(
            "memory",
            "the same where the host has enough for all",
            (_noticed(claims, lambda: HostMemory(64 << 40, 64 << 40)) + own) * 1e6,
            "µs",
        ),
        Measurement("memory", "policy a machine a second, alone", own * 1e6, "µs"),
    ]


def _noticed(claims: list[Claim], host: Callable[[], HostMemory]) -> float:
    """As above, of one machine that reads what all others wrote."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        machines = [Commons(place, host) for _ in range(MACHINES)]
        for machine, claim in zip(machines, claims, strict=True):
            machine.tell(claim, claim.assigned)
        start = time.process_time()
        for _ in range(TICKS):
            machines[0].target(claims[0], claims[0].assigned)
        taken = (time.process_time() - start) / TICKS / TICK_SECONDS
        for machine in machines:
            machine.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return taken


def _await(what: str, condition: Callable[[], bool], seconds: float = _READY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise HvHostError(f"{what} did not come within {seconds:.0f} s.")
        time.sleep(0.05)


def _prepare(client: MachineClient) -> MemoryClient:
    """A guest that reports at once and uses what it is given."""
    memory = MemoryClient(client)
    _await("the guest's memory driver", lambda: memory.info().driver == "ready")
    probe = connect_probe(client.directory)
    try:
        probe.write_text("/sys/devices/system/memory/auto_online_blocks", "online")
        parameters = "/sys/module/hv_balloon/parameters/pressure_report_delay"
        probe.write_text(parameters, "0")
    finally:
        probe.close()
    _await("the guest's report", lambda: memory.info().demand is not None)
    return memory


def relief(client: MachineClient) -> list[Measurement]:
    """Seconds from the moment at which programs of the guest begin to fill more memory than it has
    until it has more, and until the programs have all."""
    memory = _prepare(client)
    before = memory.info().assigned
    size = before // MIB * 7 // 16  # of one of two: Linux refuses one program more than it has
    probe = connect_probe(client.directory)
    try:
        began = time.perf_counter()
        fill = f"hvhost-fill {size} </dev/null >/tmp/fill{{}} 2>&1 &"
        probe.run(["sh", "-c", fill.format(1) + fill.format(2)])
        _await("more memory", lambda: memory.info().assigned > before)
        relieved = time.perf_counter() - began
        print(f"relieved after {relieved:.2f} s", file=sys.stderr)
        _await(
            "all that programs wanted",
            lambda: probe.run(["cat", "/tmp/fill1", "/tmp/fill2"], 60.0).text.count("filled") == 2,
            _SERVED_SECONDS,
        )
        served = time.perf_counter() - began
        counts = probe.run(["grep", "oom_kill ", "/proc/vmstat"], 60.0).text
        if counts != "oom_kill 0":
            raise HvHostError(f"the guest killed a program for want of memory: {counts}.")
    finally:
        probe.close()
    return [
        Measurement(
            "memory", "pressure to relief", relieved, "s", "the policy looks every", TICK_SECONDS
        ),
        Measurement("memory", "pressure to all served", served, "s"),
    ]


def resize(client: MachineClient) -> list[Measurement]:
    """GiB/s of hot-add, balloon inflate and deflate on a running guest with fixed memory.

    Inflating is measured twice: with pages that the guest never touched, and with such as it had
    before; Linux clears them first, and in the rig each first touch costs a fault.
    """
    memory = _prepare(client)
    start = memory.info().assigned
    figures = []
    for name, size in (
        ("hot-add", start + _PIECE),
        ("balloon inflate, memory never touched", start),
        ("balloon deflate", start + _PIECE),
        ("balloon inflate, memory touched before", start),
    ):
        began = time.perf_counter()
        memory.set(size)
        speed = _PIECE / GIB / (time.perf_counter() - began)
        figures.append(Measurement("memory", name, speed, "GiB/s"))
    return figures
