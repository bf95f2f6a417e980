"""``make bench`` as a whole: what is measured counts, whatever happens to the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import __main__ as bench
from bench import cases, software_host
from bench.measurement import Measurement
from hvhost.errors import HvHostError

#: What the project promises a figure of, and the case that measures it.
PROMISED = {"rig-boot", "local-boot", "heartbeat", "idle", "start-up", "verify"}

Run = Callable[..., tuple[int, list[dict[str, Any]]]]


def figure(name: str, beside: float | None = 2.0) -> Measurement:
    return Measurement("case", name, 3.0, "s", "a peer", beside)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the bench with other cases: its status, and the figures of its JSON."""

    def begin(*words: str, **those: Any) -> tuple[int, list[dict[str, Any]]]:
        monkeypatch.setattr(bench, "CASES", those)
        monkeypatch.setattr(sys, "argv", ["bench", "--json", str(tmp_path / "b.json"), *words])
        monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
        status = bench.main()
        document = json.loads((tmp_path / "b.json").read_text())
        assert document["schema"] == 1 and document["computer"]["cpus"] >= 1
        return status, document["figures"]

    return begin


def test_figures_are_a_table_and_json(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures = run(one=lambda rounds: [figure(f"of {rounds}")], two=lambda _: [figure("b")])
    assert status == 0
    assert [each["figure"] for each in figures] == ["of 2", "b"]
    assert figures[0] == {
        "case": "case",
        "figure": "of 2",
        "value": 3.0,
        "unit": "s",
        "beside_name": "a peer",
        "beside": 2.0,
        "ratio": 1.5,
    }
    table = capsys.readouterr().out
    assert "of 2" in table and "a peer: 2 s" in table and "1.50" in table


def test_where_the_peer_did_not_run_there_is_no_ratio(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (alone,) = run(one=lambda _: [figure("alone", beside=None)])
    assert (alone["beside"], alone["ratio"]) == (None, None)
    line = next(line for line in capsys.readouterr().out.splitlines() if "alone" in line)
    assert "a peer" not in line and line.count("3 s") == 1


@pytest.mark.parametrize(
    "error",
    [
        HvHostError("the guest did not come."),
        OSError(28, "No space left on device"),
        subprocess.CalledProcessError(1, ["hvhost", "verify"]),
        subprocess.TimeoutExpired(["qemu"], 5.0),
    ],
)
def test_a_case_that_fails_takes_no_figure_with_it(
    run: Run, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def breaks(_: int) -> Iterator[Measurement]:
        yield figure("before")
        raise error

    status, figures = run(first=breaks, second=lambda _: [figure("after")])
    assert status == 1
    assert [each["figure"] for each in figures] == ["before", "after"]
    told = capsys.readouterr()
    assert "".join(str(error).split()) in "".join(told.err.split())  # which folds its lines
    assert "before" in told.out and "after" in told.out


def test_only_some(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    those = {"one": lambda _: [figure("a")], "two": lambda _: [figure("b")]}
    assert [each["figure"] for each in run("--only", "two", **those)[1]] == ["b"]
    with pytest.raises(SystemExit) as ended:
        run("--only", "two,three", **those)
    assert ended.value.code == 2 and "no such case: three" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_first(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(_: int) -> list[Measurement]:
        raise AssertionError("measured although the figures would be lost")

    with pytest.raises(SystemExit) as ended:
        run("--json", "/proc/none/b.json", one=measured)
    assert ended.value.code == 2
    assert "/proc/none/b.json cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hvhost", "qemu", "ratio"),
    [([6.0, 4.0], [None, 8.0], 0.5), ([None, 4.0], [None, None], None)],
)
def test_a_boot_is_compared_with_a_peer_that_booted(
    hvhost: list[float | None],
    qemu: list[float | None],
    ratio: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "guest", lambda: SimpleNamespace(kernel="k", initrd="i"))
    monkeypatch.setattr(software_host, "figures", lambda *_: {"hvhost": hvhost, "qemu": qemu})
    (measured,) = cases.local_boot(2)
    assert (measured.value, measured.ratio) == (4.0, ratio)


def test_a_boot_of_ours_that_never_came_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "guest", lambda: SimpleNamespace(kernel="k", initrd="i"))
    monkeypatch.setattr(software_host, "figures", lambda *_: {"hvhost": [None], "qemu": [5.0]})
    with pytest.raises(HvHostError, match="no guest of ours reached user space"):
        cases.local_boot(1)


def test_what_is_promised_is_measured() -> None:
    assert set(cases.CASES) >= PROMISED
    assert (cases.COLD_SECONDS, cases.WARM_SECONDS) == (20.0, 15.0)
