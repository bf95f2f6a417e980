"""The rows of memory, on a guest whose numbers are scripted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hvhost.chipset.acpi import build_dsdt
from hvhost.errors import HvHostError
from hvhost.firmware.layout import memory_layout
from hvhost.memory.report import MemoryInfo
from hvhost.memory.settings import DynamicMemory
from hvhost.units import GIB, MIB
from hvhost.verify.contract import HV_DM_GUID
from hvhost.verify.guest import CommandResult, RowFailed
from hvhost.verify.rows import memory as rows
from hvhost.verify.rows import mmio_gap
from hvhost.verify.session import Session, Timing
from hvhost.verify.sysfs import DEVICES

START = 512 * MIB
INFO = MemoryInfo(START, START, 0, 0, 4 * GIB, None, 0, 0, 0, "ready", "2.0", needed=200 * MIB)


class Guest:
    """Session, machine, memory and probe in one; *faults* name what goes wrong."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.machine = SimpleNamespace(
            memory=self, memory_held=self.memory_held, info=lambda: SimpleNamespace(exits={})
        )
        self.timing = Timing(poll=0.0, settle=0.0, stretch=lambda: 1.0)
        self.now = INFO
        self.total = START - 40 * MIB
        self.filled = 0
        self.written: dict[str, str] = {}
        self.shape: object = None
        modules = SimpleNamespace(option=lambda name: "no-reporting" not in faults)
        self.guest = SimpleNamespace(modules=modules)
        self._owner = threading.get_ident()

    # session

    def running(self, shape: object = None) -> Guest:
        self.shape = shape
        if shape is rows.DYNAMIC:
            self.now = replace(self.now, dynamic=DynamicMemory(256 * MIB, GIB))
        return self

    def step(self, text: str) -> None: ...

    def await_ticks(self, probe: object) -> None:
        """A 32-bit driver's reports are heard from now on."""
        self.now = replace(self.now, demand=100 * MIB)

    # machine and memory

    def memory_held(self) -> int:
        return self.filled + 50 * MIB + ("hoards" in self.faults) * (GIB - 2 * self.filled)

    def info(self) -> Any:
        if self.now.dynamic is not None:
            self._policy()
        return self.now

    def _policy(self) -> None:
        wanted = max(256 * MIB, (self.filled + 120 * MIB) * 6 // 5)
        change = min(GIB, wanted) - self.now.assigned
        frozen = "frozen" in self.faults and self.filled > 128 * MIB
        if change and not (frozen and change > 0):
            self._move(change)

    def _move(self, change: int) -> None:
        assigned = self.now.assigned + change
        if "counts-given" in self.faults:
            before, added = self.now.added, max(self.now.added, assigned - START)
            self.total += added - before
            self.now = replace(
                self.now, assigned=assigned, added=added, ballooned=START + added - assigned
            )
            return
        self.now = replace(
            self.now,
            assigned=assigned,
            added=max(0, assigned - START),
            ballooned=max(0, START - assigned),
        )
        half = "half" in self.faults or (change > 0 and "half-again" in self.faults)
        self.total += change // 2 if half else change

    def set(self, size: int, timeout: float = 1.0) -> MemoryInfo:
        if size < 200 * MIB and "careless" not in self.faults:
            raise HvHostError("it is too little.")
        if size > START and "no-hot-plug" in self.faults:
            if "grows-unseen" in self.faults:
                self.now = replace(self.now, assigned=size)
            raise HvHostError("the guest did not add all the memory it was offered.")
        self._move(size - self.now.assigned)
        return self.now

    # probe

    def read_all(self, *patterns: str) -> dict[str, str]:
        if patterns[0].startswith(DEVICES):
            device = f"{DEVICES}/1eccfd72-4b41-45ef-b73a-4a6e44c12924"
            return {
                f"{device}/class_id": f"{{{HV_DM_GUID}}}",
                f"{device}/device_id": "{1eccfd72-4b41-45ef-b73a-4a6e44c12924}",
                f"{device}/state": "3",
            }
        if "auto_online" in patterns[0]:
            return {} if "no-hot-plug" in self.faults else {patterns[0]: "offline"}
        layout = memory_layout(768 * MIB, low_mmio_bytes=3584 * MIB)
        files = {}
        for number, entry in enumerate(layout.e820):
            place = f"/sys/firmware/memmap/{number}"
            files[f"{place}/start"] = f"{entry.address:#x}"
            files[f"{place}/end"] = f"{entry.address + entry.size - 1:#x}"
            files[f"{place}/type"] = "System RAM" if entry.type.name == "RAM" else "Reserved"
        return files

    def read_bytes(self, path: str) -> bytes:
        low = 2048 if "other-gap" in self.faults else 3584
        layout = memory_layout(768 * MIB, low_mmio_bytes=low * MIB, high_mmio_bytes=2 * GIB)
        return build_dsdt(layout.low_mmio, layout.high_mmio, serial_ports=2)

    def read(self, path: str) -> str:
        if path == "/proc/vmstat":
            return f"oom_kill {'1' if 'killed' in self.faults else '0'}\n"
        if path == "/proc/iomem":
            return "00100000-1fffffff : System RAM\n100000000-107ffffff : System RAM\n"
        total = 660 * MIB if self.shape is mmio_gap.GAP else self.total
        total -= ("lost" in self.faults) * 256 * MIB
        available = max(0, total - self.filled - 80 * MIB)
        return f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n"

    def write(self, path: str, text: str) -> None:
        self.written[path] = text

    def run(self, command: list[str], timeout: float) -> CommandResult:
        script = command[-1]
        if "bs=" in script:
            self.filled = sum(int(word[3:-1]) for word in script.split() if word[:3] == "bs=") * MIB
        elif "kill" in script:
            self.filled = 0
        elif "VmRSS" in script:
            return CommandResult(0, f"VmRSS:\t{self.filled >> 10} kB\n")
        return CommandResult(0, "")


def prove(row: Any, guest: Guest) -> list[str]:
    proof: Iterator[str] = row(cast("Session", guest))
    return list(proof)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHANGE_SECONDS", 0.2)
    monkeypatch.setattr(rows, "_HELD_SECONDS", 0.05)
    monkeypatch.setattr(rows, "read_devices", lambda probe: ())


def test_resize() -> None:
    guest = Guest()
    *_, last = prove(rows.prove_memory_resize, guest)
    assert "600.0 MiB, 677.0 MiB, 549.0 MiB, 395.0 MiB, 472.0 MiB" in last
    assert guest.now.assigned == START, "the guest is left as it was"


def test_resize_of_a_kernel_that_counts_what_it_gave() -> None:
    *lines, last = prove(rows.prove_memory_resize, Guest("counts-given"))
    assert "600.0 MiB, 677.0 MiB, 677.0 MiB, 677.0 MiB, 677.0 MiB" in last
    assert "this kernel's MemTotal still counts what it has given back" in lines
    *lines, _ = prove(rows.prove_memory_resize, Guest())
    assert "this kernel subtracts ballooned pages from its MemTotal" in lines


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("half", r"after \+128 MiB the guest's MemTotal changed by \+64.0 MiB"),
        ("careless", "could be given less than it needs"),
        ("killed", "killed a process"),
    ],
)
def test_resizes_that_fail(fault: str, said: str) -> None:
    with pytest.raises(RowFailed, match=said):
        prove(rows.prove_memory_resize, Guest(fault))


def test_resize_of_a_kernel_without_hot_plug() -> None:
    *lines, last = prove(rows.prove_memory_resize, Guest("no-hot-plug"))
    assert "keeps what it was started with: the guest did not add" in " ".join(lines)
    assert "from 512 MiB down by 128 and 77 MiB" in last


def test_a_kernel_without_hot_plug_whose_host_counts_wrong() -> None:
    with pytest.raises(RowFailed, match=r"the machine has 640\.0 MiB after"):
        prove(rows.prove_memory_resize, Guest("no-hot-plug", "grows-unseen"))


def test_hot_add() -> None:
    guest = Guest()
    *_, last = prove(rows.prove_hot_add, guest)
    assert guest.shape is rows.DYNAMIC and "hot-added (100000000-107ffffff)" in last
    assert guest.filled == 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [("frozen", "added memory did not come"), ("half", "do not agree"), ("killed", "killed")],
)
def test_hot_add_that_fails(fault: str, said: str) -> None:
    with pytest.raises(RowFailed, match=said):
        prove(rows.prove_hot_add, Guest(fault))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no-reporting", "the guest's kernel is built without CONFIG_PAGE_REPORTING"),
        ("nothing", "host-lacks KVM extended hypercalls"),
    ],
)
def test_who_lacks_what_cold_discard_needs(fault: str, said: str) -> None:
    assert any(said in line for line in prove(rows.prove_ballooning, Guest(fault)))


def test_ballooning() -> None:
    *_, last = prove(rows.prove_ballooning, Guest())
    assert "assigned fell from" in last and "nothing was killed" in last


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hoards", "holds no less memory"),
        ("frozen", "memory for a guest under pressure did not come"),
        ("killed", "killed"),
        ("half", r"after -\d+ MiB the guest's MemTotal changed by -\d"),
        ("half-again", r"after \+\d+ MiB the guest's MemTotal changed by \+\d"),
    ],
)
def test_ballooning_that_fails(fault: str, said: str) -> None:
    with pytest.raises(RowFailed, match=said):
        prove(rows.prove_ballooning, Guest(fault))


def test_gap() -> None:
    *_, last = prove(mmio_gap.prove, Guest())
    assert "0x20000000-0xfebfffff" in last and "256 MiB of RAM moved above 4 GiB" in last


@pytest.mark.parametrize(
    ("fault", "said"), [("other-gap", "does not have the windows"), ("lost", "of 768 MiB")]
)
def test_gaps_that_are_not_there(fault: str, said: str) -> None:
    with pytest.raises(RowFailed, match=said):
        prove(mmio_gap.prove, Guest(fault))
