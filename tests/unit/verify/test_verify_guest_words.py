"""What rows make of a guest's answers: of those that are missing, late, or no answers at all."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hvhost.verify import drives
from hvhost.verify.clocks import guest_clock
from hvhost.verify.command import describe_host
from hvhost.verify.guest import CommandResult, RowFailed
from hvhost.verify.script import run

WWN = "600224800d0e0f10"


def impatient() -> Any:
    return SimpleNamespace(timing=SimpleNamespace(patiently=lambda seconds: 0.0, poll=0.0))


def asked_often(answer: object) -> Callable[..., Any]:
    """The same answer each time, but not without an end."""
    left = itertools.count(100, -1)

    def ask(*words: object) -> object:
        assert next(left), "it is asked for ever"
        return answer

    return ask


def a_probe(result: CommandResult, **more: object) -> Any:
    return SimpleNamespace(run=lambda command, timeout: result, **more)


@pytest.mark.parametrize(
    "result",
    [CommandResult(1, "281474 99"), CommandResult(0, "no such clock"), CommandResult(0, "")],
)
def test_a_clock_that_the_guest_cannot_show(result: CommandResult) -> None:
    session: Any = SimpleNamespace(running=lambda: a_probe(result))
    with pytest.raises(RowFailed, match="cannot show its clock ptp0"), guest_clock(session, "ptp0"):
        pass


def test_a_script_that_fails_fails_the_row() -> None:
    with pytest.raises(RowFailed, match="'mount /x' failed: no such device") as failed:
        run(a_probe(CommandResult(32, "mounting\nno such device\n")), "mount /x")
    assert failed.value.evidence[-1] == "no such device"
    assert run(a_probe(CommandResult(0, " done\n")), "mount /x") == "done"


def test_drives_that_do_not_come_or_go_or_grow() -> None:
    words = CommandResult(0, "sd 0:0:0:1: rejected\n")
    drive: Any = SimpleNamespace(wwn=WWN)
    there = {"/sys/block/sdb/device/wwid": "naa.1"}
    with pytest.raises(RowFailed, match=f"no unit naa.{WWN}") as failed:
        drives.find(impatient(), a_probe(words, read_all=asked_often(there)), drive)
    assert failed.value.evidence == ("it has ['naa.1']", "sd 0:0:0:1: rejected")
    with pytest.raises(RowFailed, match="still has sdb"):
        drives.await_gone(impatient(), a_probe(words, read_all=asked_often({"x": "8"})), "sdb")
    with pytest.raises(RowFailed, match="sees 4096 bytes in sdb, not 8192"):
        drives.await_size(impatient(), a_probe(words, read=asked_often("8")), "sdb", 8192)
    with pytest.raises(RowFailed, match="not so") as failed:
        drives.require(False, "not so", "for this reason")
    assert failed.value.evidence == ("for this reason",)
    drives.require(True, "not so")


def test_the_report_names_the_processor() -> None:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert describe_host("rig")["cpu"] == (found[1].strip() if found else "")
