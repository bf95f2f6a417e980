"""``hot-add``, ``ballooning``, ``memory-resize``: a guest's memory, as it sees it, and the host.

What the guest has is its own ``MemTotal``; what the host gave is what the host's kernel says of
the file that the memory lies in (``st_blocks``), or of the worker's anonymous memory. Pressure is
made by a program in the guest that fills so much memory and holds it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.units import KIB, MIB
from hvhost.verify.contract import HV_DM_GUID
from hvhost.verify.guest import Probe, RowFailed, Shape
from hvhost.verify.session import Session
from hvhost.verify.sysfs import read_devices

DYNAMIC = Shape(memory=512 * MIB, dynamic_memory=DynamicMemory(256 * MIB, 1024 * MIB))

TOLERANCE = 4 * MIB
"""Between a change of memory as the host counts it and as the guest's ``MemTotal`` shows it."""

_DELAY = "/sys/module/hv_balloon/parameters/pressure_report_delay"
_ONLINE = "/sys/devices/system/memory/auto_online_blocks"
_DRIVER_SECONDS = 30.0
_CHANGE_SECONDS, _SET_SECONDS = 90.0, 60.0
_STEP = 128 * MIB
_ODD = 77 * MIB
_PIECE = 96 * MIB
_HOG = 448 * MIB  # more than the guest has at first, with what its kernel needs
_FLOOR_SHARE = 2
_LOOKS = 100
_HELD_SECONDS, _HELD_LESS = 60.0, 32 * MIB
_COMMAND_SECONDS = 60.0  # a guest that has no memory left is slow


@dataclass(frozen=True, slots=True)
class Seen:
    """The guest's account and the host's at one moment, in bytes."""

    total: int
    available: int
    held: int
    info: MemoryInfo

    def __str__(self) -> str:
        return (
            f"the guest's MemTotal {_mib(self.total)}, MemAvailable {_mib(self.available)}; "
            f"assigned {_mib(self.info.assigned)}, held by the host {_mib(self.held)}"
        )


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


def look(session: Session, probe: Probe) -> Seen:
    """Both sides' numbers at a moment in which no memory moves."""
    memory = session.machine.memory
    for _ in range(_LOOKS):
        before = memory.info()
        meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", probe.read("/proc/meminfo"), re.M))
        held, after = session.machine.memory_held(), memory.info()
        if before.assigned == after.assigned and before.work == after.work == "idle":
            total, available = (int(meminfo[name]) for name in ("MemTotal", "MemAvailable"))
            return Seen(total * KIB, available * KIB, held, after)
        time.sleep(session.timing.poll)
    raise RowFailed("the guest's memory does not come to rest", [str(memory.info())])


def prepare(session: Session, probe: Probe) -> bool:
    """A guest whose driver reports, and that uses what is added by itself.

    Whether memory can be added to it at all.
    """
    for device in read_devices(probe):
        if device.interface_type == HV_DM_GUID and device.driver is None:
            raise RowFailed("no driver of the guest bound to the dynamic memory device")
    session.step("waiting for the guest's first memory report")
    await_memory(session, lambda info: info.driver == "ready", _DRIVER_SECONDS, "a memory driver")
    hot_plug = bool(probe.read_all(_ONLINE))  # of kernels with CONFIG_MEMORY_HOTPLUG
    if hot_plug:
        probe.write(_ONLINE, "online")
    session.await_ticks(probe)
    probe.write(_DELAY, "0")  # by itself it waits 45 seconds before it reports
    await_memory(session, lambda info: info.demand is not None, _DRIVER_SECONDS, "a report")
    return hot_plug


def await_memory(
    session: Session, suits: Callable[[MemoryInfo], bool], seconds: float, what: str
) -> MemoryInfo:
    """The machine's memory once it suits; :class:`RowFailed` if *what* does not come in time."""
    seconds = session.timing.patiently(seconds)
    deadline = time.monotonic() + seconds
    while not suits(info := session.machine.memory.info()):
        if time.monotonic() > deadline:
            raise RowFailed(
                f"{what} did not come within {seconds:.0f} seconds",
                [
                    f"assigned {_mib(info.assigned)}, demand {info.demand}, driver {info.driver}, "
                    f"{info.work}; {info.problem or 'no problem'}"
                ],
            )
        time.sleep(session.timing.poll)
    return info


class Hog:
    """Programs in the guest that fill memory and keep it: dd's, whose readers do not read.

    Several, because Linux refuses one program more than it has in all.
    """

    def __init__(self, probe: Probe, size: int) -> None:
        size = size // MIB * MIB
        self._probe = probe
        self.size = size
        sizes = [_PIECE] * (size // _PIECE) + [size % _PIECE // MIB * MIB]
        script = " ".join(
            f"(dd if=/dev/zero bs={each // MIB}M count=1 | sleep 9999) </dev/null >/dev/null 2>&1 &"
            for each in sizes
            if each
        )
        probe.run(["sh", "-c", script], _COMMAND_SECONDS)

    def filled(self) -> int:
        """Bytes of memory that it has; 0 when it is gone."""
        script = "for p in $(pidof dd); do grep VmRSS /proc/$p/status; done"
        listed = self._probe.run(["sh", "-c", script], _COMMAND_SECONDS).output
        return sum(int(each) * KIB for each in re.findall(r"VmRSS:\s+(\d+)", listed))

    def end(self) -> None:
        self._probe.run(["sh", "-c", "kill $(pidof dd) $(pidof sleep)"], _COMMAND_SECONDS)


def fill(session: Session, probe: Probe, size: int) -> Hog:
    """A program that has filled *size*; :class:`RowFailed` if it does not get that far."""
    session.step(f"a program in the guest fills {_mib(size)}")
    hog = Hog(probe, size)
    deadline = time.monotonic() + session.timing.patiently(_CHANGE_SECONDS)
    most = 0
    while (filled := hog.filled()) < hog.size:
        gone = filled < most
        most = max(most, filled)
        if gone or time.monotonic() > deadline:
            raise RowFailed(
                f"the program that fills {_mib(size)} got {_mib(filled)}",
                [probe.run(["sh", "-c", "dmesg | tail -5"], _COMMAND_SECONDS).output],
            )
        time.sleep(session.timing.poll)
    return hog


def check_none_killed(probe: Probe) -> str:
    """The guest's kernel counted no process that it killed for want of memory."""
    match = re.search(r"^oom_kill (\d+)", probe.read("/proc/vmstat"), re.M)
    if match is None or int(match[1]):
        raise RowFailed("the guest's kernel killed a process for want of memory")
    return "oom_kill 0 in the guest's /proc/vmstat"


def prove_hot_add(session: Session) -> Iterator[str]:
    """Under pressure the guest gets more memory than it was started with, and uses it."""
    probe = session.running(DYNAMIC)
    prepare(session, probe)
    before = look(session, probe)
    started = time.monotonic()
    hog = fill(session, probe, _HOG)
    seconds = time.monotonic() - started
    info = await_memory(session, lambda info: info.added > 0, _CHANGE_SECONDS, "added memory")
    after = look(session, probe)
    yield f"before: {before}"
    yield f"programs filled {_mib(hog.size)} in {seconds:.1f} s: {after}"
    high = re.findall(r"^1[0-9a-f]{8}-[0-9a-f]+ : System RAM", probe.read("/proc/iomem"), re.M)
    if not high or hog.filled() < hog.size:
        raise RowFailed("the guest does not use the memory that it was given", [str(after)])
    growth = after.total - before.total
    if abs(growth - (after.info.assigned - before.info.assigned)) > TOLERANCE:
        raise RowFailed("guest and host do not agree on what was added", [str(before), str(after)])
    yield check_none_killed(probe)
    hog.end()
    yield (
        f"MemTotal grew from {_mib(before.total)} to {_mib(after.total)} under pressure, "
        f"{_mib(info.added)} of it hot-added ({high[0].split()[0]}); nothing was killed"
    )


def prove_ballooning(session: Session) -> Iterator[str]:
    """Memory that is not needed goes to the host; under pressure the guest has it back."""
    probe = session.running(DYNAMIC)
    prepare(session, probe)
    hog = fill(session, probe, _STEP)
    full = look(session, probe)
    yield f"with {_mib(hog.size)} filled by a program: {full}"
    hog.end()
    session.step("waiting for the guest to be trimmed")
    lean_info = await_memory(
        session,
        lambda info: info.assigned < full.info.assigned and info.ballooned > info.added,
        _CHANGE_SECONDS,
        "ballooned memory",
    )
    lean = look(session, probe)
    deadline = time.monotonic() + session.timing.patiently(_HELD_SECONDS)
    while full.held - lean.held < _HELD_LESS and time.monotonic() < deadline:
        time.sleep(session.timing.poll)
        lean = look(session, probe)
    yield f"some seconds after it ended: {lean}"
    if full.held - lean.held < _HELD_LESS:
        raise RowFailed("the host holds no less memory than before", [str(full), str(lean)])
    if lean.info.assigned < lean_info.dynamic.minimum if lean_info.dynamic else True:
        raise RowFailed("the guest has less than its minimum", [str(lean)])
    check_agreement(full, lean)
    subtracts = full.total - lean.total > (full.info.assigned - lean.info.assigned) // 2
    yield (
        "this kernel subtracts ballooned pages from its MemTotal"
        if subtracts
        else "this kernel's MemTotal still counts what it has given back"
    )
    yield _cold_discard(session, probe, lean.info)
    hog = fill(session, probe, max(_STEP, lean.available))
    await_memory(
        session,
        lambda info: info.assigned > lean.info.assigned,
        _CHANGE_SECONDS,
        "memory for a guest under pressure",
    )
    again = look(session, probe)
    yield f"with {_mib(hog.size)} filled anew: {again}"
    check_agreement(lean, again)
    yield check_none_killed(probe)
    hog.end()
    yield (
        f"assigned fell from {_mib(full.info.assigned)} to {_mib(lean.info.assigned)} and what "
        f"the host holds from {_mib(full.held)} to {_mib(lean.held)}; under pressure the guest "
        f"had {_mib(again.info.assigned)} again, and nothing was killed; its MemTotal agreed "
        f"within {TOLERANCE // MIB} MiB"
    )


def _cold_discard(session: Session, probe: Probe, info: MemoryInfo) -> str:
    """Whether the guest tells of free memory by itself, beside the balloon."""
    log = probe.run(["sh", "-c", "dmesg | grep -i 'cold memory'"], 20.0).output
    if "hint enabled" in log:
        return (
            "cold memory discard is on, says the guest's log; it told of "
            f"{_mib(info.reported)} that it does not use"
        )
    if any("hypercall 0x8001" in reason for reason in session.machine.info().exits):
        return "the guest asked for cold memory discard and did not switch it on"
    modules = session.guest.modules
    if modules is not None and modules.option("CONFIG_PAGE_REPORTING") is False:
        return "no cold memory discard: the guest's kernel is built without CONFIG_PAGE_REPORTING"
    return (
        "no cold memory discard: host-lacks KVM extended hypercalls (Linux 6.3), or the guest's "
        "kernel lacks CONFIG_PAGE_REPORTING"
    )


def _resize(session: Session, probe: Probe, before: Seen, size: int) -> Seen:
    session.step(f"setting the guest's memory to {_mib(size)}")
    started = time.monotonic()
    session.machine.memory.set(size, session.timing.patiently(_SET_SECONDS))
    seconds = time.monotonic() - started
    after = look(session, probe)
    if after.info.assigned != size:
        raise RowFailed(f"set to {_mib(size)}, the machine has {_mib(after.info.assigned)}")
    check_agreement(before, after, f"{seconds:.1f} s")
    return after


def check_agreement(before: Seen, after: Seen, *also: str) -> None:
    """The guest's total changed as what the host counts, within :data:`TOLERANCE`."""
    change, seen = after.info.assigned - before.info.assigned, after.total - before.total
    # Kernels before 5.11 count what they gave to the balloon: they see added memory only.
    added = after.info.added - before.info.added
    if all(abs(seen - each) > TOLERANCE for each in (change, added)):
        raise RowFailed(
            f"after {change / MIB:+.0f} MiB the guest's MemTotal changed by {seen / MIB:+.1f} MiB",
            [str(before), str(after), *also],
        )


def _what_is_counted(change: int, added: int) -> str:
    """Which kind of kernel this is, by its total when it has again what it had at first."""
    if added > TOLERANCE and abs(change - added) <= TOLERANCE:
        return "this kernel's MemTotal still counts what it has given back"
    return "this kernel subtracts ballooned pages from its MemTotal"


def _refused_growth(session: Session, start: int) -> str:
    """A kernel that cannot be given more than it started with is not, and the host knows it."""
    try:
        session.machine.memory.set(start + _STEP)
    except HvHostError as refusal:
        if (assigned := session.machine.memory.info().assigned) != start:
            raise RowFailed(f"the machine has {_mib(assigned)} after {refusal}") from None
        return f"this kernel has no memory hot-plug and keeps what it was started with: {refusal}"
    raise RowFailed("a kernel without memory hot-plug was given more memory")


def prove_memory_resize(session: Session) -> Iterator[str]:
    """The memory of a machine with fixed memory is set up and down, by even and odd sizes."""
    probe = session.running()
    hot_plug = prepare(session, probe)
    first = look(session, probe)
    start = first.info.assigned
    if first.info.dynamic is not None:
        raise RowFailed("the machine's memory is not fixed; this is a bug of hvhost's verify.")
    yield f"at first: {first}"
    now, totals = first, []
    steps = (_STEP, _STEP + _ODD, _ODD, -_ODD, 0) if hot_plug else (-_STEP, -_STEP - _ODD, -_ODD, 0)
    for size in (start + step for step in steps):
        now = _resize(session, probe, now, size)
        totals.append(now.total)
        yield f"set to {size / MIB:.0f} MiB: {now}"
    yield _what_is_counted(totals[-1] - first.total, now.info.added)
    needed = now.info.needed
    if needed is None or needed <= MIB:
        raise RowFailed("the guest's demand is not known", [str(now)])
    try:
        session.machine.memory.set(needed // _FLOOR_SHARE // MIB * MIB)
    except HvHostError as refusal:
        if "too little" not in str(refusal):
            raise
        yield f"refused: {refusal}"
    else:
        raise RowFailed("the guest could be given less than it needs")
    yield check_none_killed(probe)
    path = "up by 128 and 77 MiB and down by 128 and 154 MiB"
    if not hot_plug:
        yield _refused_growth(session, start)
        path = "down by 128 and 77 MiB and up by 128 and 77 MiB"
    yield (
        f"from {start / MIB:.0f} MiB {path}; the "
        f"guest's MemTotal followed within {TOLERANCE // MIB} MiB: "
        + ", ".join(_mib(total) for total in totals)
    )
