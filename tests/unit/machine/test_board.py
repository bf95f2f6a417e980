"""A board that runs before it is plugged in."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_transport import FakeTransport, Halt, Hypercall, Other, Out, ReadMsr, Script, SynicWrite
from kernel_files import Elf, Segment, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.image import KernelImage, parse_kernel
from hvhost.kvm.constants import Exit
from hvhost.machine.board import Board, Plug
from hvhost.machine.loading import build_board
from hvhost.machine.model import MachineConfig
from hvhost.partition.msrs import HV_X64_MSR_CRASH_CTL

MEMORY = 16 << 20
S5 = Out(0x604, 2, struct.pack("<H", 5 << 10 | 1 << 13))


def kernel() -> KernelImage:
    segments = [Segment(b"kernel text" * 100, 0x200000), pvh_note(0x200000)]
    return parse_kernel(Elf(segments, 0x200000).build(), "kernel")


def started(*guests: Callable[[FakeTransport], Script]) -> tuple[Board, FakeTransport]:
    transport = FakeTransport(MEMORY, *guests)
    config = MachineConfig("m", "/kernel", cpus=len(guests), memory=MEMORY)
    board = build_board(config, kernel(), lambda: transport)
    board.start()
    return board, transport


class Msrs:
    def read(self, msr: int) -> int:
        return msr

    def write(self, msr: int, value: int) -> bool:
        return True


def plug(told: list[object]) -> Plug:
    """Writes down what it is told."""

    def tell(what: str) -> Callable[..., Any]:
        def told_of(*arguments: object) -> int:
            told.append((what, *arguments))
            return 0

        return told_of

    return Plug(
        hypercall=tell("hypercall"),
        synic=tell("synic"),
        msrs=Msrs(),
        sleep=tell("sleep"),
        reset=tell("reset"),
        failed=tell("failed"),
        serial=(tell("com1"), tell("com2")),
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (Hypercall(0x5C, 1, 2), ("hypercall", 0x5C, 1, 2)),
        (SynicWrite(1, 2, 3), ("synic", 0, 1, 2, 3)),
        (S5, ("sleep", 5)),
        (Out(0xCF9, 1, b"\x06"), ("reset", "reset register")),
        (Other(Exit.SHUTDOWN), ("reset", "triple fault")),
    ],
)
def test_a_processor_waits_for_what_is_not_there_yet(step: object, what: object) -> None:
    reached = threading.Event()

    def guest(kvm: FakeTransport) -> Script:
        yield Out(0x3F8, 1, b"1")
        yield Out(0x3F8, 1, b"\n")
        reached.set()
        yield step  # type: ignore[misc]
        yield Out(0x2F8, 1, b"\n")
        yield Halt()

    board, _ = started(guest)
    assert reached.wait(10)
    told: list[object] = []
    with board.lock:  # a waiting processor leaves it free
        board.plug(plug(told))
    wait_for(lambda: what in told)
    assert told[0] == ("com1", b"1\n"), "what was said before is not lost"
    if isinstance(step, (Hypercall, SynicWrite)):
        wait_for(lambda: told[-1] == ("com2", b"\n"))
    board.stop()
    board.close()


def test_a_register_that_is_not_there_yet() -> None:
    values: list[int] = []

    def guest(kvm: FakeTransport) -> Script:
        values.append((yield ReadMsr(HV_X64_MSR_CRASH_CTL)))
        yield Halt()

    board, _ = started(guest)
    board.plug(plug([]))
    wait_for(lambda: values == [HV_X64_MSR_CRASH_CTL])
    board.stop()
    board.close()


@pytest.mark.parametrize("step", [SynicWrite(), Other(Exit.SHUTDOWN), Other(Exit.UNKNOWN), S5])
def test_it_ends_while_processors_wait(step: object) -> None:
    before = threading.active_count()
    reached = threading.Barrier(3)

    def guest(kvm: FakeTransport) -> Script:
        reached.wait(10)
        yield step  # type: ignore[misc]

    board, transport = started(guest, guest)
    reached.wait(10)
    board.stop()
    board.close()
    board.stop()  # again is nothing
    board.close()
    assert transport.closed == 1
    assert threading.active_count() == before


def test_a_board_that_was_stopped_tells_nobody_of_its_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next board of this machine may be there already."""

    def guest(kvm: FakeTransport) -> Script:
        yield Halt()

    board, _ = started(guest)
    board.stop()
    for reason in ("reset", "KVM failed"):
        board._stopped(reason)
    with board.lock, pytest.raises(HvHostError, match="was stopped while it started"):
        board.read(HV_X64_MSR_CRASH_CTL)
    told: list[object] = []
    board.plug(plug(told))
    for reason in ("reset", "KVM failed"):
        board._stopped(reason)
    assert not told
    board.close()
    monkeypatch.setattr(board, "_flush", lambda: pytest.fail("its transport is gone"))
    board.stop()


def test_a_transport_is_given_back_when_nothing_comes_of_it(tmp_path: Path) -> None:
    transport = FakeTransport(MEMORY)
    config = MachineConfig("m", "/kernel", initrd=str(tmp_path / "none"), memory=MEMORY)
    with pytest.raises(HvHostError, match=r"machine 'm' could not be built \(.*none'\)"):
        build_board(config, kernel(), lambda: transport)
    assert transport.closed == 1


def test_a_kernel_that_does_not_fit_is_a_sentence() -> None:
    """Found on the thread that copies it."""
    transport = FakeTransport(MEMORY)
    segments = [Segment(b"kernel text", 2 * MEMORY), pvh_note(2 * MEMORY)]
    large = parse_kernel(Elf(segments, 2 * MEMORY).build(), "large")
    with pytest.raises(HvHostError, match="large"):
        build_board(MachineConfig("m", "/large", memory=MEMORY), large, lambda: transport)
    assert transport.closed == 1


def test_a_guest_runs_before_the_bus_is_imported() -> None:
    """What a machine's start waits for where Python is slow."""
    code = (
        "import sys; import hvhost.machine.worker, hvhost.machine.board, hvhost.kvm.local\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = set(done.stdout.split())
    rooms = {name.split(".")[1] for name in modules if name.startswith("hvhost.")}
    assert rooms == {
        *("chipset", "errors", "firmware", "kvm", "machine", "memory", "partition"),
        *("paths", "units"),
    }
    assert {name for name in modules if name.startswith("hvhost.memory.")} == {
        "hvhost.memory.settings"
    }
    assert not modules & {"hvhost.machine.machine", "hvhost.machine.model", "hvhost.wire"}
    assert not modules & {"asyncio", "socket", "subprocess", "uuid", "json", "shutil", "datetime"}
