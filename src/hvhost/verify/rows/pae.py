"""``pae``: a 32-bit kernel with more memory than 32 bits address, all of it usable.

For a 64-bit guest this is about the kernel beside it: that of the same distribution for 32-bit
processors, started in a machine of its own. Its own map and count show all of the memory. Programs
fill some, one after the other, until they have enough that lies above 4 GiB; then each looks
whether its pages still hold what it wrote: a page above 4 GiB that stood for one below would not.
Where its pages lie a program is told by the kernel (``/proc/self/pagemap``), and Linux hands out
high memory from its top.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hvhost.firmware.layout import FOUR_GIB
from hvhost.memory.host import kept_by_host, read_host_memory
from hvhost.units import GIB, KIB, MIB, format_size
from hvhost.verify.diagnose import unbound_devices
from hvhost.verify.guest import GuestLacks, HostLacks, PreparedGuest, Probe, RowFailed, Shape
from hvhost.verify.rows.memory import check_none_killed
from hvhost.verify.session import Session
from hvhost.verify.sysfs import read_devices

PAE = Shape(memory=5 * GIB, cpus=1)
"""One processor: the row is about memory, and more of them have a row of their own."""
KERNEL_MAX = 192 * MIB
"""What the guest's kernel may keep, so that MemTotal does not show it; it describes each page."""

_PIECE = 96 * MIB
_WANTED = 192 * MIB
"""Of what lies above 4 GiB, so much is filled: emulated processors take a minute for it."""
_LEFT = 96 * MIB
"""What the programs leave free: a guest without any is slow, and ends them."""
_FILL_SECONDS, _CHECK_SECONDS, _DRIVER_SECONDS = 180.0, 60.0, 20.0
_FILES = "/tmp/hvhost-fill"
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.M)
_REPORT = re.compile(r"^pages (\d+) wrong (\d+) above-4g (\d+) highest 0x([0-9a-f]+)$", re.M)


@dataclass(frozen=True, slots=True)
class Filled:
    """What a program found: pages, and the highest physical address in bytes."""

    pages: int
    wrong: int
    above: int
    highest: int

    def __add__(self, other: Filled) -> Filled:
        return Filled(
            self.pages + other.pages,
            self.wrong + other.wrong,
            self.above + other.above,
            max(self.highest, other.highest),
        )


class Programs:
    """Programs in the guest that fill memory and keep it, numbered from 0."""

    def __init__(self, session: Session, probe: Probe) -> None:
        self._session = session
        self._probe = probe
        self._pids: list[str] = []
        probe.run(["mkdir", "-p", _FILES], 20.0)

    def start(self, size: int) -> Filled:
        """One more, that fills *size* bytes; what it found."""
        number = len(self._pids)
        script = f"hvhost-fill {size // MIB} </dev/null >{_FILES}/{number} 2>&1 & echo $!"
        self._pids.append(self._probe.run(["sh", "-c", script], 20.0).output.strip())
        self._await(number, "filled", 1, _FILL_SECONDS)
        return self._ask(number, 1)

    def check(self) -> Filled:
        """What all of them find now."""
        reports = [self._ask(number, 2) for number in range(len(self._pids))]
        return sum(reports[1:], start=reports[0])

    def end(self) -> None:
        self._probe.run(["kill", "-9", *self._pids], 60.0)

    def _ask(self, number: int, count: int) -> Filled:
        self._probe.run(["kill", "-USR1", self._pids[number]], 60.0)
        said = self._await(number, "wrong", count, _CHECK_SECONDS)
        pages, wrong, above, highest = _REPORT.findall(said)[-1]
        return Filled(int(pages), int(wrong), int(above), int(highest, 16))

    def _await(self, number: int, word: str, count: int, seconds: float) -> str:
        deadline = time.monotonic() + self._session.timing.patiently(seconds)
        while (said := self._probe.read(f"{_FILES}/{number}")).count(word) < count:
            alive = self._probe.run(["kill", "-0", self._pids[number]], 60.0).status == 0
            if not alive or time.monotonic() > deadline:
                raise RowFailed(
                    f"program {number} that fills the guest's memory "
                    + ("is too slow" if alive else "is gone"),
                    [said.strip(), self._probe.run(["sh", "-c", "dmesg | tail -5"], 60.0).output],
                )
            time.sleep(self._session.timing.poll)
        return said


def pae_guest(session: Session) -> PreparedGuest:
    """The 32-bit guest of this row; :class:`GuestLacks` if there is none."""
    session.step("preparing the 32-bit kernel")
    guest = session.guest.pae_sibling()
    if guest is None:
        raise GuestLacks(
            f"kernel {session.guest.release} is a 64-bit one, and no 32-bit kernel of its "
            "distribution is known; Debian 12 is the last that has one"
        )
    return guest


def system_ram(iomem: str) -> tuple[int, int]:
    """Bytes of RAM that ``/proc/iomem`` shows, and how many of them lie above 4 GiB."""
    ranges = [(int(first, 16), int(last, 16) + 1) for first, last in _RANGE.findall(iomem)]
    return (
        sum(end - start for start, end in ranges),
        sum(end - start for start, end in ranges if start >= FOUR_GIB),
    )


def fill_above(session: Session, probe: Probe, available: int) -> Filled:
    """Fill memory until programs have :data:`_WANTED` bytes that lie above 4 GiB.

    What they found in the end. :class:`HostLacks` if the host has not that much to give.
    """
    programs = Programs(session, probe)
    found = Filled(0, 0, 0, 0)
    while found.above * 4 * KIB < _WANTED:
        size = min(_PIECE, (available - _LEFT) // MIB * MIB - found.pages * 4 * KIB)
        if size <= 0:
            break
        memory = read_host_memory()
        if memory.available - kept_by_host(memory.total) < size:
            raise HostLacks(
                f"free memory, which the guest's programs fill: this computer has "
                f"{memory.available / GIB:.1f} GiB available"
            )
        session.step(
            f"programs in the guest fill memory: {found.above * 4 // KIB} of {_WANTED // MIB} MiB "
            "above 4 GiB"
        )
        found += programs.start(size)
    session.step("looking whether the memory holds what was written")
    found = programs.check()
    programs.end()
    return found


def _check_drivers(session: Session, probe: Probe, guest: PreparedGuest) -> str:
    deadline = time.monotonic() + session.timing.patiently(_DRIVER_SECONDS)
    while True:
        devices = read_devices(probe)
        unbound = unbound_devices(devices, guest.modules) if guest.modules is not None else ()
        if devices and not unbound:
            break
        if time.monotonic() > deadline:
            raise RowFailed("drivers of the 32-bit kernel did not bind", unbound)
        time.sleep(session.timing.poll)
    bound = sorted({f"{device.name} ({device.driver})" for device in devices if device.driver})
    if not bound:
        raise RowFailed("no driver of the 32-bit kernel bound to a device of the bus")
    return f"drivers attached: {', '.join(bound)}"


def prove(session: Session) -> Iterator[str]:
    """Debian's 32-bit PAE kernel: its drivers attach, programs use memory above 4 GiB."""
    assert PAE.memory is not None
    guest = pae_guest(session)
    probe = session.running(PAE, guest)
    machine = probe.run(["uname", "-m"], 20.0).output.strip()
    flags = re.search(r"^flags\s*:(.*)$", probe.read("/proc/cpuinfo"), re.M)
    if not re.fullmatch(r"i[3-6]86", machine) or flags is None or "pae" not in flags[1].split():
        raise RowFailed(f"the guest runs on {machine}, which is no 32-bit PAE kernel")
    yield f"kernel {guest.release} on {machine}, entered by the 32-bit boot protocol"
    yield _check_drivers(session, probe, guest)
    ram, above = system_ram(probe.read("/proc/iomem"))
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", probe.read("/proc/meminfo"), re.M))
    total, available = (int(meminfo[name]) * KIB for name in ("MemTotal", "MemAvailable"))
    shown = (
        f"System RAM {format_size(ram)}, {format_size(above)} of it above 4 GiB; MemTotal "
        f"{total / MIB:.0f} MiB, HighTotal {int(meminfo.get('HighTotal', '0')) // KIB} MiB"
    )
    yield shown
    if not above or ram < PAE.memory - MIB or total < PAE.memory - KERNEL_MAX:
        raise RowFailed(f"of {format_size(PAE.memory)} the guest does not use all", [shown])
    filled = fill_above(session, probe, available)
    found = (
        f"programs filled {filled.pages * 4 // KIB} MiB, {filled.above * 4 // KIB} MiB of it above "
        f"4 GiB, up to {filled.highest:#x}"
    )
    yield check_none_killed(probe)
    if filled.wrong:
        raise RowFailed(f"{filled.wrong} pages hold what was not written to them", [found])
    if filled.above * 4 * KIB < _WANTED:
        raise RowFailed("the memory above 4 GiB was not used", [found])
    yield f"{guest.release} has {format_size(PAE.memory)}: {found}; each page held what was written"
