"""``smp``: every CPU is online, and a channel interrupts the CPU that the guest chose for it.

The heartbeat channel is moved to each CPU in turn, by the guest's own sysfs, and heartbeats are
sent over it. What counts is how many interrupts the guest's kernel took on each CPU meanwhile
(the ``HYP`` line of ``/proc/interrupts``), and on which channel (its counters in sysfs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hvhost.errors import HvHostError
from hvhost.verify.contract import HV_HEART_BEAT_GUID
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.session import Session
from hvhost.verify.sysfs import (
    DEVICES,
    GuestDevice,
    callback_interrupts,
    parse_cpu_list,
    read_counters,
    read_devices,
)

HEARTBEATS = 40
"""Heartbeats per CPU, one after the other: each is answered before the next is sent."""

SHARE = 0.9
"""Of the heartbeats, how many must have interrupted the CPU chosen for them."""

STRAY = 0.25
"""Of the heartbeats, how many interrupts other CPUs or channels may have had for other reasons."""


def heartbeat_device(probe: Probe) -> GuestDevice:
    """The guest's heartbeat device; :class:`RowFailed` when it is absent or has no driver."""
    devices = read_devices(probe)
    for device in devices:
        if device.interface_type == HV_HEART_BEAT_GUID:
            if device.driver is None or not device.channels:
                raise RowFailed("no driver of the guest bound to the heartbeat device")
            return device
    raise RowFailed("the guest's bus has no heartbeat device")


def _check_online(probe: Probe, cpus: int) -> str:
    online = parse_cpu_list(probe.read("/sys/devices/system/cpu/online"))
    described = re.findall(r"^processor\s*:\s*(\d+)", probe.read("/proc/cpuinfo"), re.M)
    usable = probe.run(["nproc"], 10.0).output.strip()
    seen = (
        f"online {','.join(map(str, online))}; /proc/cpuinfo has {len(described)}; "
        f"nproc says {usable}"
    )
    if list(online) != list(range(cpus)) or len(described) != cpus or usable != str(cpus):
        raise RowFailed(f"the machine has {cpus} VPs, the guest: {seen}")
    return f"{cpus} CPUs: {seen}"


def _send_to(session: Session, probe: Probe, device: GuestDevice, channel: int, cpu: int) -> str:
    path = f"{DEVICES}/{device.interface_instance}/channels/{channel}/cpu"
    try:
        probe.write(path, str(cpu))
    except HvHostError as error:
        raise RowFailed(
            f"the guest could not move the heartbeat channel to CPU {cpu}", [str(error)]
        ) from error
    if (now := probe.read(path).strip()) != str(cpu):
        raise RowFailed(f"the heartbeat channel was moved to CPU {cpu} but stays on CPU {now}")
    counters_before = read_counters(probe)
    cpus_before = callback_interrupts(probe.read("/proc/interrupts"))
    for _ in range(HEARTBEATS):
        session.machine.heartbeat_round_trips(1)
    cpus_after = callback_interrupts(probe.read("/proc/interrupts"))
    counters_after = read_counters(probe)
    taken = [after - before for before, after in zip(cpus_before, cpus_after, strict=True)]
    grown = {
        identifier: counters.interrupts - counters_before[identifier].interrupts
        for identifier, counters in counters_after.items()
        if identifier in counters_before
    }
    own = grown.pop(channel, 0)
    measured = (
        f"{HEARTBEATS} heartbeats with the channel on CPU {cpu}: callback interrupts per CPU "
        f"{taken}, on the heartbeat channel {own}, on all others {sum(grown.values())}"
    )
    if taken[cpu] < HEARTBEATS * SHARE:
        raise RowFailed(f"CPU {cpu} was not the one interrupted", [measured])
    if own < HEARTBEATS * SHARE:
        raise RowFailed("the heartbeat channel was not the one interrupted", [measured])
    strays = max([0, *(count for other, count in enumerate(taken) if other != cpu)])
    if strays > HEARTBEATS * STRAY or sum(grown.values()) > HEARTBEATS * STRAY:
        raise RowFailed("other CPUs or channels were interrupted as well", [measured])
    return measured


def prove(session: Session) -> Iterator[str]:
    """All CPUs are online; a channel moved to each in turn interrupts that one and no other."""
    if session.cpus < 2:
        raise RowFailed("the machine has one VP; run with --cpus 2 or more")
    probe = session.running()
    session.step("counting CPUs in the guest")
    online = _check_online(probe, session.cpus)
    device = heartbeat_device(probe)
    channel, home = min(device.channels.items())
    session.machine.heartbeat_round_trips(1)
    yield online
    # Away from where it is first, so that every CPU is really moved to.
    for cpu in [*range(home + 1, session.cpus), *range(home + 1)]:
        session.step(f"moving the heartbeat channel to CPU {cpu}")
        yield _send_to(session, probe, device, channel, cpu)
    yield (
        f"{session.cpus} CPUs online; the heartbeat channel moved to each in turn interrupted "
        "that CPU and no other"
    )
