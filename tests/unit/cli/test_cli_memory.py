"""``hvhost memory`` and the options of ``hvhost run`` that belong to it, without a guest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.cli import memory_output
from hvhost.cli.memory_output import chart
from hvhost.errors import HvHostError
from hvhost.machine.config_file import dump_config, load_config
from hvhost.machine.model import MachineConfig
from hvhost.manager.client import MachineClient
from hvhost.manager.definition import define, dynamic_memory
from hvhost.manager.launcher import check, launch
from hvhost.manager.memory import MemoryClient
from hvhost.memory.settings import DynamicMemory
from hvhost.units import GIB, MIB

__all__ = ["hvhost"]


@pytest.fixture
def running(runtime: Path, config: MachineConfig) -> MemoryClient:
    launch(replace(config, memory=512 * MIB), detach=True)
    return MemoryClient(MachineClient("m1"))


def test_shown(hvhost: Hvhost, running: MemoryClient) -> None:
    out = hvhost("memory", "m1").out
    for said in (
        "512 MiB (512 MiB at start)",
        "300 MiB (59 % of assigned)",
        "fixed; can be set up to 4 GiB",
        "ready, version 2.0",
    ):
        assert said in out
    assert json.loads(hvhost("memory", "m1", "--json").out)["needed"] == 400 * MIB


def test_set(hvhost: Hvhost, running: MemoryClient) -> None:
    assert "512 MiB at start, 188 MiB added" in hvhost("memory", "m1", "set", "700M").out
    done = hvhost("memory", "m1", "set", "450M", "--json")
    assert json.loads(done.out)["ballooned"] == 62 * MIB
    assert hvhost.sentence("memory", "m1", "set", "100M") == "100 MiB is too little."
    assert "is not a size" in hvhost.sentence("memory", "m1", "set", "much")
    assert running.info().assigned == 450 * MIB


@pytest.mark.parametrize(
    "words", [["set"], ["get", "3G"], ["set", "1G", "2G"], ["set", "1G", "--minimum", "1G"]]
)
def test_words_that_make_no_sense(hvhost: Hvhost, running: MemoryClient, words: list[str]) -> None:
    assert hvhost("memory", "m1", *words).status == 2


def test_limits(hvhost: Hvhost, running: MemoryClient) -> None:
    shown = hvhost("memory", "m1", "--minimum", "128M", "--maximum", "2G").out
    assert "dynamic, 128 MiB to 2 GiB, buffer 20 %, weight 5000" in shown
    assert "only while" in hvhost.sentence("memory", "m1", "--buffer", "30")


def test_the_picture(running: MemoryClient) -> None:
    """Demand runs inside the shaded memory; what is assigned falls on the right."""
    info = running.info()
    history = [info, info, replace(info, assigned=320 * MIB), replace(info, demand=None)]
    *rows, pressure, last = chart("m1", history).splitlines()
    assert pressure == "pressure ▅▅█ ", "59 %, 94 %, and none told"
    assert len(rows) == 12 and rows[0].startswith("   512 M")
    assert [row.count("●") for row in rows] == [0] * 4 + [3] + [0] * 7
    assert rows[0].endswith("░░ ░") and rows[-1].endswith("░░░░")
    assert "assigned 512 MiB" in last and "demand not told" in last


def test_more_is_needed_than_there_is(running: MemoryClient) -> None:
    info = running.info()
    history = [replace(info, demand=demand * MIB) for demand in (0, 512, 520)]
    assert chart("m1", history).splitlines()[-2] == "pressure ▁█!"


def test_watched_by_a_program(
    hvhost: Hvhost, running: MemoryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter((None, KeyboardInterrupt()))

    def sleep(seconds: float) -> None:
        if (end := next(looks)) is not None:
            raise end

    monkeypatch.setattr(memory_output, "time", SimpleNamespace(sleep=sleep))
    done = hvhost("memory", "m1", "--watch", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [each["assigned"] for each in lines] == [512 * MIB] * 2 and done.status == 130


def test_definition(config: MachineConfig) -> None:
    limits = dynamic_memory("1G", minimum="256M", maximum=4 * GIB, weight=100)
    assert limits == DynamicMemory(256 * MIB, 4 * GIB, 20, 100)
    assert dynamic_memory("1G") is None
    assert dynamic_memory(GIB, buffer=50) == DynamicMemory(GIB, GIB, 50)
    made = define(
        kernel=config.kernel, memory="1G", dynamic_memory=limits, mmio_low="1G", mmio_high=GIB
    )
    assert (made.low_mmio, made.high_mmio, made.dynamic_memory) == (GIB, GIB, limits)
    assert load_config(dump_config(made)) == made
    check(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low_mmio": 64 * MIB}, "low MMIO gap cannot be 64 MiB; choose 128 MiB to 3.5 GiB"),
        ({"low_mmio": 4 * GIB}, "low MMIO gap cannot be 4 GiB"),
        ({"high_mmio": 2048 * GIB}, "high MMIO gap cannot be 2 TiB; choose up to 1 TiB"),
        ({"dynamic_memory": DynamicMemory(GIB, 4 * GIB)}, "minimum cannot be 1 GiB"),
    ],
)
def test_a_machine_that_cannot_be(config: MachineConfig, change: dict[str, int], said: str) -> None:
    with pytest.raises(HvHostError, match=said):
        check(replace(config, memory=512 * MIB, **change))  # type: ignore[arg-type]
