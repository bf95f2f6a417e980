"""The row ``pae``, on a 32-bit guest whose numbers are scripted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import cast

import pytest

from hvhost.memory.host import HostMemory
from hvhost.units import GIB, MIB
from hvhost.verify.contract import HV_HEART_BEAT_GUID, Status, find_rows, vmbus_alias
from hvhost.verify.guest import (
    CommandResult,
    GuestLacks,
    HostLacks,
    PreparedGuest,
    RowFailed,
    Shape,
)
from hvhost.verify.rows import Proof, pae
from hvhost.verify.runner import _LACKS, _prove
from hvhost.verify.session import Session, Timing
from hvhost.verify.sysfs import DEVICES

IOMEM = """\
00001000-0009fbff : System RAM
00100000-f7ffffff : System RAM
  01000000-01c4ffff : Kernel code
fee00000-fee00fff : Local APIC
100000000-147ffffff : System RAM
"""
ABOVE = 1152 * MIB


class Sibling:
    """Session, the 32-bit guest and its probe in one; *faults* name what goes wrong."""

    release = "6.1.0-pae"

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.guest = SimpleNamespace(release="6.1.0-64", pae_sibling=self.pae_sibling)
        self.timing = Timing(poll=0.0, stretch=lambda: 1.0)
        self.modules = SimpleNamespace(drivers_for=lambda alias: ["hv_utils"])
        self.sizes: list[int] = []
        self.asked_of: list[int] = []
        self.ended: list[str] = []
        self.asked: tuple[Shape, object] | None = None

    def pae_sibling(self) -> Sibling | None:
        return None if "no-kernel" in self.faults else self

    def running(self, shape: Shape, guest: object) -> Sibling:
        self.asked = shape, guest
        return self

    def step(self, text: str) -> None: ...

    def read(self, path: str) -> str:
        if path == "/proc/cpuinfo":
            return f"flags\t\t: fpu {'' if 'no-pae' in self.faults else 'pae '}msr\n"
        if path == "/proc/iomem":
            return IOMEM.partition("1000")[0] if "low-only" in self.faults else IOMEM
        if path == "/proc/vmstat":
            return f"oom_kill {'1' if 'killed' in self.faults else '0'}\n"
        if path.startswith("/tmp/"):
            number = int(path.rpartition("/")[2])
            if "dies" in self.faults and number == 1:
                return ""
            return "filled 1\n" + self.report(number) * self.asked_of.count(number)
        total = (4 if "lost" in self.faults else 5) * GIB - 90 * MIB
        return f"MemTotal: {total >> 10} kB\nMemAvailable: {total >> 10} kB\n"

    def read_all(self, *patterns: str) -> dict[str, str]:
        if patterns[0].startswith(DEVICES):
            device = f"{DEVICES}/1eccfd72-4b41-45ef-b73a-4a6e44c12924"
            bound = "" if "unbound" in self.faults else "DRIVER=hv_utils\n"
            return {
                f"{device}/class_id": f"{{{HV_HEART_BEAT_GUID}}}",
                f"{device}/device_id": "{1eccfd72-4b41-45ef-b73a-4a6e44c12924}",
                f"{device}/uevent": f"{bound}MODALIAS={vmbus_alias(HV_HEART_BEAT_GUID)}",
            }
        return {}

    def report(self, number: int) -> str:
        pages, before = self.sizes[number] * 256, sum(self.sizes[:number]) * 256
        above = 0 if "kept-low" in self.faults else min(pages, max(0, ABOVE // 4096 - before))
        wrong = 3 if "aliased" in self.faults and self.asked_of.count(number) == 2 else 0
        return f"pages {pages} wrong {wrong} above-4g {above} highest {0x147FFF000 - before:#x}\n"

    def run(self, command: list[str], timeout: float) -> CommandResult:
        script = command[-1]
        if command[:1] == ["uname"]:
            return CommandResult(0, "x86_64\n" if "64-bit" in self.faults else "i686\n")
        if command[:2] == ["kill", "-USR1"]:
            self.asked_of.append(int(script))
        elif command[:2] == ["kill", "-0"]:
            return CommandResult("dies" in self.faults, "")
        elif command[:2] == ["kill", "-9"]:
            self.ended = command[2:]
        elif match := re.match(r"hvhost-fill (\d+)", script):
            self.sizes.append(int(match[1]))
            return CommandResult(0, f"{len(self.sizes) - 1}\n")
        return CommandResult(0, "")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pae, "_DRIVER_SECONDS", 0.01)
    monkeypatch.setattr(pae, "read_host_memory", lambda: HostMemory(16 * GIB, 12 * GIB))


def prove(guest: Sibling) -> list[str]:
    return list(pae.prove(cast("Session", guest)))


def test_five_gib() -> None:
    guest = Sibling()
    *lines, last = prove(guest)
    assert guest.asked == (pae.PAE, guest)
    assert guest.sizes == [96, 96], "no more than is needed"
    assert guest.ended == ["0", "1"]
    assert "drivers attached: heartbeat (hv_utils)" in lines
    assert "programs filled 192 MiB, 192 MiB of it above 4 GiB, up to 0x147fff000" in last


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("64-bit", "no 32-bit PAE kernel"),
        ("no-pae", "no 32-bit PAE kernel"),
        ("unbound", "did not bind"),
        ("low-only", "does not use all"),
        ("lost", "does not use all"),
        ("dies", "program 1 that fills the guest's memory is gone"),
        ("killed", "killed a process"),
        ("aliased", "6 pages hold what was not written"),
        ("kept-low", "above 4 GiB was not used"),
    ],
)
def test_what_fails(fault: str, said: str) -> None:
    with pytest.raises(RowFailed, match=said):
        prove(Sibling(fault))


def test_memory_handed_out_from_below() -> None:
    """Then all of it has to be filled before there is an end."""
    guest = Sibling("kept-low")
    with pytest.raises(RowFailed):
        prove(guest)
    assert sum(guest.sizes) == 5 * 1024 - 90 - 96


def test_a_distribution_without_a_32_bit_kernel() -> None:
    with pytest.raises(GuestLacks, match=r"6\.1\.0-64 is a 64-bit one.*Debian 12 is the last"):
        prove(Sibling("no-kernel"))


def test_a_host_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Sibling()
    left = iter((GIB, 300 * MIB))
    monkeypatch.setattr(pae, "read_host_memory", lambda: HostMemory(4 * GIB, next(left)))
    with pytest.raises(HostLacks, match=r"has 0\.3 GiB available"):
        prove(guest)
    assert len(guest.sizes) == 1


def test_what_guest_and_host_lack_is_told_apart() -> None:
    assert {HostLacks: Status.HOST_LACKS, GuestLacks: Status.GUEST_LACKS} == _LACKS
    session = SimpleNamespace(adopt=lambda: None, recover=lambda: None, doing="")
    session.guest = Sibling("no-kernel").guest
    session.step = lambda text: None
    (row,) = find_rows(["pae"], option="")
    result = _prove(Proof("pae", pae.prove, 5.0), row, cast("Session", session))
    assert result.status is Status.GUEST_LACKS


def test_a_32_bit_kernel_may_take_longer() -> None:
    guest = SimpleNamespace(is_64_bit=True)
    session = Session(
        cast("PreparedGuest", guest), 1, lambda text: None, Timing(boot=10.0, stretch=lambda: 1.0)
    )
    assert session.boot_limit == 10.0
    guest.is_64_bit = False
    assert session.boot_limit == 30.0
