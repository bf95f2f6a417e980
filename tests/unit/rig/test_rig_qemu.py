"""Which QEMU is the rig's: the system's, a newer one, or the one there is with a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.guests import apt, deb
from hvhost.rig import qemu


@pytest.mark.parametrize(
    ("backported", "chosen"),
    [((10, 0), "new/usr/bin/qemu-system-x86_64"), ((0, 0), "old/qemu-system-x86_64")],
)
def test_a_newer_qemu_is_taken_if_it_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backported: tuple[int, int],
    chosen: str,
) -> None:
    old = tmp_path / "old/qemu-system-x86_64"
    monkeypatch.setattr("shutil.which", lambda name: str(old))
    monkeypatch.setattr(
        qemu, "_version", lambda program: (7, 2) if program == str(old) else backported
    )
    monkeypatch.setattr(qemu, "repaired", lambda program: program)
    monkeypatch.setattr(apt, "download", lambda suite, names, progress: [tmp_path / "q.deb"])
    monkeypatch.setattr(deb, "extract", lambda paths, progress: tmp_path / "new")
    assert qemu.find_qemu().program == str(tmp_path / chosen)
    refused = any("does not run on this computer" in each for each in caplog.messages)
    assert refused is (backported == (0, 0))


def test_no_qemu_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(HvHostError, match="apt-get install qemu-system-x86"):
        qemu.find_qemu()
