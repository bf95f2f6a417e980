"""The command as a whole: table, JSON, logs and exit status, on a scripted guest."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console
from scripted_guest import FAST, SCRIPTED_PROOFS, ScriptedGuest, full_modules

from hvhost.errors import HvHostError
from hvhost.verify import command
from hvhost.verify.command import verify_guest
from hvhost.verify.contract import GROUPS, ROWS, Status
from hvhost.verify.options import VerifyOptions
from hvhost.verify.outputs import Outputs, check_outputs
from hvhost.verify.results import VerifyReport
from hvhost.verify.rows import PROOFS, heartbeat
from hvhost.verify.runner import run_rows
from hvhost.verify.session import Session

NEED_HV_UTILS = ["smp", "heartbeat", "shutdown", "kvp", "time-sync", "accurate-time"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SPIN_SECONDS", 0.01)
    monkeypatch.setattr(command, "run_rows", functools.partial(run_rows, proofs=SCRIPTED_PROOFS))


def run(
    options: VerifyOptions, *faults: str, terminal: bool = False
) -> tuple[int, VerifyReport, str, str]:
    out, progress = io.StringIO(), io.StringIO()
    status, report = verify_guest(
        options,
        lambda _options, _observer: ScriptedGuest(*faults, cpus=options.cpus),
        timing=FAST,
        out=Console(file=out, width=160),
        progress=Console(file=progress, width=160, force_terminal=terminal),
    )
    return status, report, out.getvalue(), progress.getvalue()


def test_everything_once(tmp_path: Path) -> None:
    options = VerifyOptions(
        json_path=tmp_path / "r.json",
        svg_path=tmp_path / "table.svg",
        keep_logs=tmp_path / "logs",
    )
    status, _, table, progress = run(options)
    assert status == 0
    document = json.loads((tmp_path / "r.json").read_text())
    assert list(document) == ["schema", "host", "guest", "rows"]
    assert document["schema"] == 1
    assert document["host"]["transport"] == "scripted"
    assert document["guest"] == {"kernel": "6.1.0-test-amd64", "os": "Scripted Linux 1"}
    assert [row["id"] for row in document["rows"]] == [row.id for row in ROWS]
    assert all(
        list(row) == ["id", "group", "title", "status", "seconds", "evidence"]
        for row in document["rows"]
    )
    working = {row["id"] for row in document["rows"] if row["status"] == "works"}
    assert working == {proof.row_id for proof in SCRIPTED_PROOFS}
    positions = [table.index(group) for group in GROUPS]
    assert positions == sorted(positions)
    assert f"{len(SCRIPTED_PROOFS)} works, {35 - len(SCRIPTED_PROOFS)} missing" in table
    assert "heartbeat: waiting for the host to notice" in progress
    kept = {file.name for file in (tmp_path / "logs").iterdir()}
    assert kept == {
        *("accurate-time.svg", "console.log", "events.json", "report.json", "worker.log")
    }
    assert "Linux version" in (tmp_path / "logs" / "console.log").read_text()
    kinds = [event["kind"] for event in json.loads((tmp_path / "logs/events.json").read_text())]
    assert kinds[0] == "started" and "crash" in kinds and kinds[-1] == "stopped"
    picture = (tmp_path / "table.svg").read_text()
    assert picture.startswith("<svg") and "heartbeat" in picture
    assert "url(http" not in picture and "@font-face" not in picture


def test_a_failure_is_shown_with_all_its_evidence() -> None:
    status, _, table, _ = run(VerifyOptions(rows=["smp"]), "wrong-cpu")
    assert status == 1
    assert "callback interrupts per CPU" in table
    assert table.endswith("1 fails\nFAILED: smp\n"), "to be seen where only the end is"


def test_a_guest_without_a_bus_fails_with_its_finding() -> None:
    status, _, table, _ = run(VerifyOptions(), "no-bus", "blacklisted")
    assert status == 1
    assert table.count("2. Hyper-V detected: yes") == 1
    assert "console: hvhost-guest: init" in table


def test_missing_rows_asked_for_fail() -> None:
    assert run(VerifyOptions(rows=["network"]))[0] == 1
    assert run(VerifyOptions(rows=["lsvmbus"]))[0] == 0


def test_live_display_goes_to_a_terminal() -> None:
    status, _, _, progress = run(VerifyOptions(rows=["lsvmbus"]), terminal=True)
    assert status == 0
    assert "lsvmbus" in progress and "0:00:0" in progress


@pytest.mark.parametrize("field", ["rows", "allow_lacks"])
def test_bad_rows_are_refused_before_anything_is_prepared(field: str) -> None:
    def prepare(_options: object, _observer: object) -> ScriptedGuest:
        raise AssertionError("prepared although the input is wrong")

    options = VerifyOptions(**{field: ["smpp"]})  # type: ignore[arg-type]
    with pytest.raises(HvHostError, match="did you mean smp"):
        verify_guest(options, prepare)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (VerifyOptions(cpus=0), "at least one CPU, not 0"),
        (VerifyOptions(cpus=5000), "5000 CPUs are more than the 1024"),
        (VerifyOptions(memory=1 << 20), "1 MiB of memory is too little"),
        (VerifyOptions(memory=1 << 60), "is more than the .* this computer has"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_before_anything_is_prepared(
    options: VerifyOptions, said: str
) -> None:
    def prepare(_options: object, _observer: object) -> ScriptedGuest:
        raise AssertionError("prepared although there can be no machine for it")

    with pytest.raises(HvHostError, match=said):
        verify_guest(options, prepare)


def test_what_rows_drew_is_kept_with_the_logs(tmp_path: Path) -> None:
    drawn = {"accurate-time.svg": "<svg/>"}
    session = SimpleNamespace(consoles=["one", "two"], events=[], attachments=drawn, machines=[])
    Outputs(VerifyOptions(keep_logs=tmp_path / "logs")).keep_session(cast("Session", session))
    assert {each.name: each.read_text() for each in (tmp_path / "logs").iterdir()} == {
        "console.log": "one",
        "console-2.log": "two",
        "events.json": "[]\n",
        **drawn,
    }


@pytest.mark.parametrize("field", ["json_path", "svg_path", "keep_logs"])
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file/r", "Not a directory"),
        ("/proc/r", "No such file or directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_prepared(
    field: str, place: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    def prepare(_options: object, _observer: object) -> ScriptedGuest:
        raise AssertionError("prepared although the result would be lost")

    path = tmp_path / place
    option = {"json_path": "--json", "svg_path": "--svg", "keep_logs": "--keep-logs"}[field]
    with pytest.raises(HvHostError) as caught:
        verify_guest(VerifyOptions(**{field: path}), prepare)  # type: ignore[arg-type]
    assert str(caught.value) == f"{path} cannot be written: {why}; give {option} another path."


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (VerifyOptions(json_path=Path()), "Is a directory"),
        (VerifyOptions(keep_logs=Path("/dev/null")), "Not a directory"),
    ],
)
def test_what_is_there_but_is_no_place_to_write(options: VerifyOptions, why: str) -> None:
    with pytest.raises(HvHostError, match=why):
        check_outputs(options)


def test_looking_whether_files_can_be_written_changes_none(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.svg").symlink_to(tmp_path / "away" / "target.svg")
    os.mkfifo(tmp_path / "pipe")
    for json_path, svg_path in (("old.json", "link.svg"), ("new/r.json", "pipe")):
        check_outputs(VerifyOptions(json_path=tmp_path / json_path, svg_path=tmp_path / svg_path))
    # Directories are made, no files.
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {"old.json", "link.svg", "away", "new", "pipe"}
    assert (tmp_path / "old.json").read_text() == "old"
    for directory in ("away", "new"):
        assert not [*(tmp_path / directory).iterdir()]


def test_a_file_that_is_there_may_not_be_ours_to_write(tmp_path: Path) -> None:
    """Not even by root, who runs these tests in CI."""
    program = Path(shutil.copy(shutil.which("sleep") or "", tmp_path / "busy"))
    with subprocess.Popen([program, "60"]) as process:
        try:
            with pytest.raises(HvHostError, match=f"{program} cannot be written: Text file busy"):
                check_outputs(VerifyOptions(json_path=program))
        finally:
            process.kill()


def test_a_file_that_cannot_be_written_keeps_no_other_from_it(tmp_path: Path) -> None:
    """Nor the table from being printed first; the status is that of an error all the same."""
    for name in ("console.log", "worker.log"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    out = io.StringIO()
    options = VerifyOptions(
        rows=["lsvmbus"],
        json_path=Path("/dev/full"),
        svg_path=tmp_path / "table.svg",
        keep_logs=tmp_path / "logs",
    )
    with pytest.raises(HvHostError) as caught:
        verify_guest(
            options,
            lambda *_: ScriptedGuest(),
            timing=FAST,
            out=Console(file=out, width=160),
            progress=Console(file=io.StringIO()),
        )
    assert str(caught.value) == (
        f"{tmp_path}/logs/console.log cannot be written: Is a directory; "
        f"{tmp_path}/logs/worker.log cannot be written: Is a directory; "
        "/dev/full cannot be written: No space left on device; all else is kept."
    )
    assert "1 works" in out.getvalue()
    assert (tmp_path / "table.svg").read_text().startswith("<svg")
    kept = {file.name for file in (tmp_path / "logs").iterdir()}
    assert kept == {"console.log", "events.json", "report.json", "worker.log"}


def test_the_results_are_kept_though_nobody_reads_the_table(tmp_path: Path) -> None:
    options = VerifyOptions(rows=["lsvmbus"], json_path=tmp_path / "r.json")

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        verify_guest(
            options,
            lambda *_: ScriptedGuest(),
            timing=FAST,
            out=Console(file=Full()),
            progress=Console(file=io.StringIO()),
        )
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["status"] == "works"


@pytest.mark.parametrize(("is_64_bit", "wanted"), [(True, 0), (False, 1)])
def test_only_a_64_bit_kernel_may_lack_a_32_bit_one_beside_it(
    is_64_bit: bool, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs = [proof for proof in PROOFS if proof.row_id == "pae"]
    monkeypatch.setattr(command, "run_rows", functools.partial(run_rows, proofs=proofs))
    monkeypatch.setattr(ScriptedGuest, "is_64_bit", is_64_bit)
    quiet = Console(file=io.StringIO())
    options = VerifyOptions(kernel=Path("/k"), rows=["pae"])
    status, report = verify_guest(
        options, lambda *_: ScriptedGuest(), timing=FAST, out=quiet, progress=quiet
    )
    assert (status, report.results[0].status) == (wanted, Status.GUEST_LACKS)


@pytest.mark.parametrize(
    "options", [VerifyOptions(debs=[Path("/d")]), VerifyOptions(kernel=Path("/k"))]
)
@pytest.mark.parametrize(
    ("gone", "fault", "daemons_of", "wanted"),
    [
        ("", "", "debian-12", 0),
        ("", "modules-unknown", "debian-12", 0),
        ("hv_netvsc", "", "debian-12", 1),
        ("", "hv_kvp_daemon", "debian-12", 1),  # which that distribution has
        ("", "", "debian-12-full", 1),
    ],
)
def test_a_kernel_of_ones_own_does_not_answer_for_the_programs_beside_it(
    options: VerifyOptions,
    gone: str,
    fault: str,
    daemons_of: str,
    wanted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody ships the script that ``static-ip`` needs; its drivers are the kernel's to bring."""
    static_ip = [proof for proof in PROOFS if proof.row_id == "static-ip"]
    proofs = (*SCRIPTED_PROOFS, *static_ip)
    monkeypatch.setattr(command, "run_rows", functools.partial(run_rows, proofs=proofs))
    monkeypatch.setattr(ScriptedGuest, "daemons_of", daemons_of)
    whole = full_modules()
    aliases = {alias: name for alias, name in whole.aliases.items() if name != gone}
    guest = ScriptedGuest(fault, modules=dataclasses.replace(whole, aliases=aliases))
    quiet = Console(file=io.StringIO())
    status, report = verify_guest(options, lambda *_: guest, timing=FAST, out=quiet, progress=quiet)
    lacking = {each.row.id for each in report.results if each.status.lacking}
    assert lacking == {"static-ip", *(["kvp"] if fault == "hv_kvp_daemon" else [])}
    assert status == wanted


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (VerifyOptions(), True),
        (VerifyOptions(guest="debian-12"), True),
        (VerifyOptions(guest="debian-13"), False),
        (VerifyOptions(kernel=Path("/k")), False),
        (VerifyOptions(debs=[Path("/d")]), False),
        (VerifyOptions(kernel=Path("/k"), allow_lacks=NEED_HV_UTILS), True),
        (VerifyOptions(kernel=Path("/k"), allow_lacks=NEED_HV_UTILS[1:]), False),
    ],
)
def test_lacks_are_excused_by_the_guests_baseline_or_by_name(
    options: VerifyOptions, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"debian-12": frozenset(NEED_HV_UTILS)}
    monkeypatch.setattr(command, "shipped_baseline", lambda name: known.get(name, frozenset()))
    whole = full_modules()
    aliases = {alias: name for alias, name in whole.aliases.items() if name != "hv_utils"}
    guest = ScriptedGuest(modules=dataclasses.replace(whole, aliases=aliases))
    quiet = Console(file=io.StringIO())
    status, _ = verify_guest(options, lambda *_: guest, timing=FAST, out=quiet, progress=quiet)
    assert (status == 0) is passes
