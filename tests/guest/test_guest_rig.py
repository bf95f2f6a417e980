"""The rig under machines that live and die: nothing stays, and every death is told."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.conftest import PowerOn, Start
from guest.helpers import (
    Guest,
    emulators_of,
    end_rig,
    hvhost,
    keeper_of,
    processes_of,
    wait_for,
)
from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages

LINGER = 1


@pytest.fixture
def own_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with a rig that nobody else uses and that does not wait."""
    path = Path(tempfile.mkdtemp(prefix="hvr"))
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(path))
    monkeypatch.setenv("HVHOST_RIG_LINGER", str(LINGER))
    yield path
    end_rig(path)
    shutil.rmtree(path)


def test_a_killed_worker_leaves_nothing(own_rig: Path, one: GuestImages, power_on: PowerOn) -> None:
    """Its session is freed, so the rig is idle and ends; ``ps`` says what happened."""
    machine = power_on(one, name="victim")
    assert keeper_of(own_rig) is not None
    (emulator,) = emulators_of(own_rig)
    assert Path(f"/proc/{emulator}").exists()
    (line,) = re.findall(r"processors for guests:(.*)", (own_rig / "rig" / "rig.log").read_text())
    numbers = [int(number) for number in line.split()]
    assert 0 not in numbers  # its state is written to by the others, see qemu.py
    assert len(numbers) >= 2
    pid = machine.info().pid
    os.kill(pid, signal.SIGKILL)
    wait_for("the end of rig and emulator", lambda: not processes_of(own_rig), 30.0)
    assert not Path(f"/proc/{emulator}").exists()
    listed = hvhost("ps")
    assert listed.returncode == 0
    assert "victim" in listed.stdout
    assert "dead" in listed.stdout
    refused = hvhost("info", "victim")
    assert refused.returncode == 1
    assert f"process {pid}) has died" in refused.stderr


@pytest.mark.parametrize("victim", ["emulator", "keeper"])
def test_a_rig_that_dies_is_told(
    victim: str, own_rig: Path, one: GuestImages, start: Start, power_on: PowerOn
) -> None:
    machine = power_on(one)
    if victim == "emulator":
        (pid,) = emulators_of(own_rig)
    else:
        keeper = keeper_of(own_rig)
        assert keeper is not None
        pid = keeper
    os.kill(pid, signal.SIGKILL)
    assert machine.wait_stopped(15), "the worker did not notice"
    with pytest.raises(HvHostError, match="the rig") as caught:
        machine.info()
    sentence = str(caught.value)
    assert "died" in sentence or "was killed" in sentence
    assert "\n" not in sentence
    wait_for("the end of everything", lambda: not processes_of(own_rig), 20.0)
    assert keeper_of(own_rig) is None
    if victim == "keeper":  # which could clear nothing away; the next machine gets a new rig
        again: Guest = start(one, transport="rig")
        assert again.run("echo alive") == "alive\n"


def test_a_worker_that_is_killed_gives_its_place_back(
    runtime: Path, one: GuestImages, start: Start
) -> None:
    """Others in the same rig do not notice."""
    first: Guest = start(one, transport="rig")
    keeper = keeper_of(runtime)
    second: Guest = start(one, transport="rig")
    assert keeper_of(runtime) == keeper, "one rig for both"
    assert first.run("cat /proc/sys/kernel/random/boot_id") != second.run(
        "cat /proc/sys/kernel/random/boot_id"
    )
    os.kill(second.machine.info().pid, signal.SIGKILL)
    assert len(first.machine.heartbeat_round_trips(20)) == 20
    third: Guest = start(one, transport="rig")
    assert third.run("echo alive") == "alive\n"
    assert first.run("echo alive") == "alive\n"
    assert keeper_of(runtime) == keeper
