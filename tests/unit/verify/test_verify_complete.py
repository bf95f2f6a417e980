"""Complete systems as guests of a verification: which rows, and what they are known by."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from hvhost.errors import HvHostError
from hvhost.guests.full import FullGuest
from hvhost.verify.command import verify_guest
from hvhost.verify.complete import CompleteGuest, provable
from hvhost.verify.contract import ROWS, find_rows
from hvhost.verify.options import VerifyOptions
from hvhost.verify.requirements import what_guest_lacks
from hvhost.verify.rows import PROOFS


def test_only_rows_whose_proof_is_made_for_them() -> None:
    complete = {proof.row_id for proof in PROOFS if proof.complete}
    assert "static-ip" in complete
    assert {row.id for row in provable(ROWS, "debian-12-full", named=False)} == complete
    named = find_rows(["static-ip"], option="--rows")
    assert provable(named, "debian-12-full", named=True) == named
    with pytest.raises(HvHostError, match="smp cannot be proved on the complete guest"):
        provable(find_rows(["smp", "static-ip"], option="--rows"), "debian-12-full", named=True)


def test_its_kernel_is_that_of_its_packages_and_it_has_the_script(tmp_path: Path) -> None:
    packages = {
        "linux-image-cloud-amd64": "6.1.1-1",
        "linux-image-6.1.0-56-cloud-amd64": "6.1.1-1",
        "hyperv-daemons": "6.1.1-1",
    }
    (tmp_path / "packages").write_text("".join(f"{key} {packages[key]}\n" for key in packages))
    kernel, initrd, disk = (tmp_path / each for each in ("kernel", "initrd", "root.vhdx"))
    system = FullGuest("debian-12-full", "Debian 12, complete", kernel, initrd, disk, UUID(int=1))
    guest = CompleteGuest("debian-12-full", system, VerifyOptions(guest="debian-12-full"))
    assert (guest.os_name, guest.release) == ("Debian 12, complete", "6.1.0-56-cloud-amd64")
    (row,) = find_rows(["static-ip"], option="--rows")
    assert what_guest_lacks(row, guest.modules, guest.daemons) is None


def test_its_daemons_are_its_own() -> None:
    def prepare(options: VerifyOptions, progress: object) -> CompleteGuest:
        raise AssertionError("nothing is prepared")

    with pytest.raises(HvHostError, match="has the daemons of its own packages"):
        verify_guest(VerifyOptions(guest="debian-12-full", daemons="sid"), prepare)
