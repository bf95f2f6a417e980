"""Memory that changes: how quickly a guest gives and takes it, and what deciding costs."""

from __future__ import annotations

import random
import resource
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
from hvhost.memory.host import Commons
from hvhost.memory.policy import Claim, Pace, share, step
from hvhost.units import GIB, MIB

MACHINES = 1000
TICKS = 10
TICK_SECONDS = 2.0
_PIECE = 192 * MIB
_READY_SECONDS = 60.0


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
            (_noticed(claims) + own) * 1e6,
            "µs",
        ),
        Measurement("memory", "policy a machine a second, alone", own * 1e6, "µs"),
    ]


def _noticed(claims: list[Claim]) -> float:
    """As above, of one machine that reads what all others wrote."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        machines = [Commons(place) for _ in range(MACHINES)]
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


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise HvHostError("the guest's memory driver does not report.")
        time.sleep(0.2)


def _prepare(client: MachineClient) -> MemoryClient:
    """A guest that reports at once and uses what it is given."""
    memory = MemoryClient(client)
    _await(lambda: memory.info().driver == "ready")
    probe = connect_probe(client.directory)
    try:
        parameters = "/sys/module/hv_balloon/parameters/pressure_report_delay"
        probe.write_text(parameters, "0")
        probe.write_text("/sys/devices/system/memory/auto_online_blocks", "online")
    finally:
        probe.close()
    _await(lambda: memory.info().demand is not None)
    return memory


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
