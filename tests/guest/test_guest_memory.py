"""Memory on real guests: what goes wrong while it changes, and machines that share a host."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from typing import Any

import pytest

from guest.conftest import Start
from guest.helpers import Guest, command, wait_for
from guest.matrix import only_in_matrix
from guest.pages import commands, do, ended
from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages
from hvhost.machine.model import MachineState
from hvhost.memory.host import RESERVE_VARIABLE, read_host_memory
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.units import KIB, MIB

pytestmark = only_in_matrix("minutes")

START = 512 * MIB
TAKEN = 128 * MIB
PIECE_MIB, PIECES, RATE = 96, 3, 12  # MiB a second: no quicker than the driver tells of it
# Emulated processors touch some MiB a second where others want them too.
SETTLE_SECONDS, BUSY_SECONDS = 300.0, 120.0
DELAY = "/sys/module/hv_balloon/parameters/pressure_report_delay"
DRIVER = "/sys/bus/vmbus/drivers/hv_balloon"
ONLINE = "/sys/devices/system/memory/auto_online_blocks"


def info(guest: Guest) -> MemoryInfo:
    return guest.machine.memory.info()


def report(guest: Guest) -> MemoryInfo:
    """The guest's memory once its driver has told of its demand; it uses what is added."""
    wait_for("the driver", lambda: info(guest).driver == "ready", SETTLE_SECONDS)
    guest.probe.write(ONLINE, "online")  # first: once it reports, it is given memory
    guest.probe.write(DELAY, "0")
    wait_for("a report", lambda: info(guest).demand is not None, SETTLE_SECONDS)
    return info(guest)


def available(guest: Guest) -> int:
    match = re.search(r"MemAvailable:\s+(\d+)", guest.probe.read("/proc/meminfo"))
    assert match is not None
    return int(match[1]) * KIB


@pytest.mark.timeout(1800)
def test_a_driver_that_leaves_with_a_full_balloon_and_returns(
    one: GuestImages, start: Start
) -> None:
    """What it gave stays given; the next driver gets it back. Paused, nothing is asked of it."""
    guest: Guest = start(one)
    report(guest)
    before = available(guest)
    guest.machine.memory.set(START - TAKEN)
    # The module has no way out, in no kernel; the driver has one.
    device = guest.run(f"cd {DRIVER} && ls -d *-*-*-*-*").strip()
    guest.run(f"echo {device} >{DRIVER}/unbind")
    wait_for("its end", lambda: info(guest).driver == "no-driver")
    assert info(guest).assigned == START - TAKEN
    assert available(guest) < before - TAKEN // 2, "the guest does not use what it gave"
    guest.run(f"echo {device} >{DRIVER}/bind")
    report(guest)
    assert info(guest).assigned == START - TAKEN
    guest.machine.pause()
    with pytest.raises(HvHostError, match="is paused"):
        guest.machine.memory.set(START)
    assert info(guest).assigned == START - TAKEN
    guest.machine.resume()
    guest.machine.memory.set(START)
    assert info(guest).ballooned == 0
    wait_for("the pages", lambda: available(guest) > before - TAKEN // 4)


@pytest.mark.timeout(1800)
def test_a_guest_that_crashes_while_ballooned(one: GuestImages, start: Start) -> None:
    """The numbers stay what they were; after a reset it has all and may be asked again."""
    guest: Guest = start(one)
    report(guest)
    guest.machine.memory.set(START - TAKEN)
    guest.probe.fire("/proc/sysrq-trigger", "c")
    wait_for("the crash", lambda: guest.machine.info().state is MachineState.CRASHED)
    crashed = info(guest)
    assert (crashed.assigned, crashed.ballooned) == (START - TAKEN, TAKEN)
    guest.machine.reset()
    guest.booted_again(2)
    again = info(guest)
    assert (again.assigned, again.ballooned, again.added) == (START, 0, 0)
    report(guest)
    guest.machine.memory.set(START - TAKEN)


def shown() -> Any:
    """What ``hvhost memory demo`` says."""
    return json.loads(do(["memory", "demo", "--json"]))


@pytest.mark.timeout(1800)
def test_what_the_page_has_people_type() -> None:
    """docs/memory.md, fixed memory and dynamic memory."""
    with ended("demo"):
        start, show, up, down = commands("memory.md", "Fixed memory, set by you")
        do(start)
        assert "1 GiB" in do(show)
        do(up)
        assert shown()["assigned"] == 1536 * MIB
        wait_for("the guest's demand", lambda: shown()["demand"] is not None, SETTLE_SECONDS)
        do(down)
        assert (shown()["assigned"], shown()["ballooned"]) == (700 * MIB, 836 * MIB)
    with ended("demo"):
        start, watch, change = commands("memory.md", "Dynamic memory")
        do([*start, "--detach"])
        do(change)
        limits = shown()["dynamic"]
        assert (limits["minimum"], limits["maximum"]) == (256 * MIB, 6144 * MIB)
        watching = subprocess.Popen(command(*watch), stdout=subprocess.PIPE, text=True)
        wait_for("trimming", lambda: shown()["assigned"] < 1024 * MIB, SETTLE_SECONDS)
        watching.send_signal(signal.SIGINT)
        assert "assigned" in watching.communicate(timeout=30)[0]


@pytest.mark.timeout(3600)
def test_machines_share_what_is_there_by_weight(
    one: GuestImages, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two want more than there is: nine parts to one, but what the light one needs comes first.

    A third with fixed memory keeps it.
    """
    fixed: Guest = start(one)
    # Less than the two want, more than they need, whatever else begins and ends meanwhile.
    free = read_host_memory().available - 2500 * MIB
    if free < 0:
        pytest.skip("this computer has not 2500 MiB of free memory")
    monkeypatch.setenv(RESERVE_VARIABLE, f"{free // MIB}M")
    heavy, light = (
        start(one, dynamic_memory=DynamicMemory(256 * MIB, 3072 * MIB, 2000, weight))
        for weight in (9000, 1000)
    )
    for guest in (heavy, light):
        report(guest)

    def beyond(guest: Guest) -> int:
        now = info(guest)
        assert now.needed is not None, now
        return now.assigned - now.needed

    def said(guest: Guest, file: str) -> str:
        return guest.run(f"cat {file}", BUSY_SECONDS)

    # The light one falls in steps, and neither is moved for a few MiB.
    wait_for(
        "shares by weight",
        lambda: 0 <= 6 * beyond(light) < beyond(heavy),
        SETTLE_SECONDS,
    )
    much, little = info(heavy), info(light)
    print(f"heavy {much.assigned >> 20} MiB, light {little.assigned >> 20} MiB", flush=True)
    assert much.assigned < 3072 * MIB, "there is not that much"

    fill = f"hvhost-fill {PIECE_MIB} {RATE} </dev/null >/tmp/fill{{}} 2>&1 &"
    light.run(" ".join(fill.format(number) for number in range(PIECES)), BUSY_SECONDS)
    for number in range(PIECES):
        file = f"/tmp/fill{number}"
        wait_for(
            f"program {number}",
            lambda file=file: "filled" in said(light, file),  # type: ignore[misc]
            SETTLE_SECONDS,
        )
    wait_for("what the light one needs", lambda: beyond(light) >= 0, SETTLE_SECONDS)
    assert info(light).assigned > little.assigned
    wait_for("the heavy one's part", lambda: info(heavy).assigned < much.assigned, SETTLE_SECONDS)
    for guest in (heavy, light, fixed):
        assert "oom_kill 0" in said(guest, "/proc/vmstat")
    print(f"heavy {info(heavy).assigned >> 20} MiB, light {info(light).assigned >> 20} MiB")
    assert beyond(heavy) >= 0
    assert info(fixed).assigned == START
