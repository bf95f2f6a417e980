"""``hvhost verify`` on real kernels: proven features, and findings a maintainer can act on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from guest.conftest import GUESTS
from guest.helpers import command, hvhost, machines_of, processes_of, wait_for
from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.verify.contract import ROWS, Status
from hvhost.verify.session import patience

PROVEN = ("smp", "heartbeat", "shutdown", "nmi", "lsvmbus")
# Without the rows whose load loses an emulated guest too often, such as hvsocket.
ONE_OF_EACH_FAMILY = ("time-sync", "storage", "network", "memory-resize")
FINDING_SECONDS = 90.0


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in json.loads(path.read_text())["rows"]}


def shipped(guest: str) -> dict[str, str]:
    """The statuses in the baseline of *guest* that ships with the product; none where none does."""
    file = resources.files("hvhost.verify") / "baselines" / f"{guest}.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    return {row["id"]: row["status"] for row in rows}


def verified(tmp_path: Path, *words: str | Path, timeout: float) -> dict[str, dict[str, Any]]:
    """The rows of a verification whose document and exit status are as they should be."""
    result = hvhost("verify", *words, "--json", tmp_path / "j", timeout=timeout)
    document = json.loads((tmp_path / "j").read_text())
    assert document["schema"] == 1
    assert document["host"]["transport"] in ("local", "rig")
    assert document["guest"]["os"].startswith("Debian ")
    assert document["guest"]["kernel"] in result.stdout
    for row in document["rows"]:
        assert row.keys() == {"id", "group", "title", "status", "seconds", "evidence"}
        assert row["status"] in {str(status) for status in Status}
        assert row["evidence"]
        assert row["id"] in result.stdout
    # What a distribution's kernel is known to lack is no failure.
    guest = str(words[words.index("--guest") + 1]) if "--guest" in words else ""
    known = {row for row, status in shipped(guest).items() if status.endswith("-lacks")}
    bad = [row["id"] for row in document["rows"] if row["status"] not in ("works", "missing")]
    assert result.returncode == (1 if set(bad) - known else 0), result.stdout
    return rows_of(tmp_path / "j")


def check_works(rows: dict[str, dict[str, Any]], wanted: Collection[str]) -> None:
    assert {row: rows[row]["status"] for row in wanted} == dict.fromkeys(wanted, "works"), rows


@pytest.mark.timeout(920)
@pytest.mark.parametrize("guest", GUESTS)
def test_five_rows_and_one_of_each_family_are_proven(guest: str, tmp_path: Path) -> None:
    """Families in the first guest only: others have them in their whole table."""
    wanted = PROVEN + (ONE_OF_EACH_FAMILY if guest == GUESTS[0] else ())
    rows = verified(tmp_path, "--guest", guest, "--rows", ",".join(wanted), timeout=900)
    check_works(rows, wanted)
    heartbeat = " ".join(rows["heartbeat"]["evidence"])
    assert "VP 0 at 0xffffffff" in heartbeat
    assert "VP 1 at 0xffffffff" in heartbeat


@only_in_matrix("15 to 30 minutes for each guest")
@pytest.mark.timeout(5500)
@pytest.mark.parametrize("guest", GUESTS)
def test_the_whole_table(guest: str, tmp_path: Path) -> None:
    """What worked in the run that the shipped baseline is works still; nothing else fails."""
    rows = verified(tmp_path, "--guest", guest, timeout=5400)
    assert [*rows] == [row.id for row in ROWS]
    check_works(rows, {*PROVEN, *(row for row, was in shipped(guest).items() if was == "works")})
    assert not [row for row in rows.values() if row["status"] == "fails"]


@pytest.mark.timeout(420)
@pytest.mark.skipif("debian-13" not in GUESTS, reason="about Debian 13; `make test-matrix` runs it")
def test_file_copy_with_the_daemon_of_another_release(tmp_path: Path) -> None:
    """Debian 13 ships none; its kernel's side is proven with the one of sid."""
    words = ("--guest", "debian-13", "--daemons", "sid", "--rows", "file-copy")
    rows = verified(tmp_path, *words, timeout=400)
    check_works(rows, ["file-copy"])
    assert "hv_fcopy_uio_daemon" in rows["file-copy"]["evidence"][0]


@only_in_matrix("downloads a kernel's source")
@pytest.mark.timeout(900)  # the first time the kernel's source is downloaded
def test_the_bus_is_listed_by_the_script_of_the_kernel_source(tmp_path: Path) -> None:
    words = ("--guest", "debian-12-python", "--rows", "lsvmbus")
    rows = verified(tmp_path, *words, timeout=800)
    check_works(rows, ["lsvmbus"])
    assert rows["lsvmbus"]["evidence"][0].endswith("listed by the kernel source's lsvmbus -vv")


def test_rows_alone_and_in_a_pipe(images: GuestImages, tmp_path: Path) -> None:
    """``| tail`` shows the verdict, and the status is there for ``set -o pipefail``."""
    rows = "lsvmbus,kvp"
    words = [*command("verify", "--guest", GUESTS[0], "--rows", rows, "--json", tmp_path / "j")]
    result = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | tail -n 1', "_", *words],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("2 works")
    assert rows_of(tmp_path / "j").keys() == {"lsvmbus", "kvp"}


def failing(tmp_path: Path, *words: str | Path) -> tuple[str, dict[str, Any]]:
    """Output and the one row of a verification that fails, soon and with a finding."""
    started = time.monotonic()
    result = hvhost("verify", *words, "--rows", "heartbeat", "--json", tmp_path / "j", timeout=200)
    seconds = time.monotonic() - started
    assert result.returncode == 1, result.stdout + result.stderr
    assert seconds < FINDING_SECONDS * patience()
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("FAILED: heartbeat")
    return " ".join(result.stdout.split()), rows_of(tmp_path / "j")["heartbeat"]


@pytest.mark.parametrize("guest", GUESTS)
def test_a_kernel_whose_bus_driver_does_not_load(guest: str, tmp_path: Path) -> None:
    """From Linux 6.18 on this is what a kernel is that lost HYPERV_VMBUS, but for the option."""
    forbidden = "module_blacklist=hv_vmbus initcall_blacklist=hv_acpi_init"
    output, row = failing(tmp_path, "--guest", guest, "--append", forbidden)
    assert row["status"] == "fails"
    assert "no VMBus" in row["evidence"][0]
    assert "blacklist=hv_" in row["evidence"][0], "the finding names what was done"
    text = "\n".join(row["evidence"])
    assert "Hyper-V detected: yes" in text
    assert "VMBus version negotiated: no" in text
    assert "the probe answered" in text
    assert "no VMBus" in output


@pytest.mark.parametrize("guest", GUESTS)
def test_a_kernel_that_does_not_see_its_hypervisor(guest: str, tmp_path: Path) -> None:
    _, row = failing(tmp_path, "--guest", guest, "--append", "nopv")
    assert row["status"] == "fails"
    assert "nopv" in row["evidence"][0]
    assert "guest never wrote its OS id" in "\n".join(row["evidence"])


def test_a_kernel_without_the_bus_driver(one: GuestImages, tmp_path: Path) -> None:
    tree = one.modules
    assert tree is not None
    if tree.is_builtin("hv_vmbus"):
        pytest.skip("hv_vmbus is built into this kernel")
    # A tree like the kernel's own, of links, without that one module.
    less = tmp_path / "lib" / "modules" / one.release
    shutil.copytree(tree.root, less, copy_function=os.symlink)
    (driver,) = less.rglob("hv_vmbus.ko*")
    driver.unlink()
    output, row = failing(tmp_path, "--kernel", one.kernel, "--modules", less)
    assert row["status"] == "guest-lacks"
    assert "hv_vmbus" in row["evidence"][0]
    assert "HYPERV_VMBUS" in row["evidence"][0]
    assert "user space: the probe answered" in output


def workers_of(runtime: Path) -> set[str]:
    return {line for line in processes_of(runtime).values() if "hvhost.machine.worker" in line}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verification_leaves_nothing(
    number: signal.Signals, one: GuestImages, tmp_path: Path, runtime: Path
) -> None:
    before, running = machines_of(runtime), workers_of(runtime)
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            command("verify", "--guest", GUESTS[0], "--rows", "smp"), stdout=out, stderr=out
        )
        try:
            wait_for("the boot", lambda: "booting" in (tmp_path / "out").read_text(), seconds=60.0)
            process.send_signal(number)
            status = process.wait(20)
        finally:
            process.kill()
    output = (tmp_path / "out").read_text()
    assert status == 128 + number, output
    assert "Traceback" not in output
    assert machines_of(runtime) <= before
    wait_for("the end of its worker", lambda: not workers_of(runtime) - running, 20.0)
