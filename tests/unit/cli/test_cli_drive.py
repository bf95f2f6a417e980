"""``hvhost drive`` against a worker without a virtual machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.machine.model import MachineConfig
from hvhost.manager.launcher import launch

__all__ = ["hvhost"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_drives_come_change_and_go(
    hvhost: Hvhost, runtime: Path, config: MachineConfig, image: Path
) -> None:
    launch(config, detach=True)
    assert hvhost("drive", "m1", "add", str(image), "--option", "lun=5").status == 0
    assert hvhost("drive", "m1", "limit", "scsi0:5", "--iops", "50").status == 0
    assert hvhost("drive", "m1", "resize", "scsi0:5", "2M").status == 0
    (drive,) = json.loads(hvhost("drive", "m1", "list", "--json").out)
    assert (drive["address"], drive["size"], drive["iops"]) == ("scsi0:5", 2 << 20, 50)
    assert image.stat().st_size == 2 << 20
    shown = hvhost("drive", "m1", "list").out
    assert "scsi0:5" in shown and "50 requests/s" in shown and str(image) in shown
    assert hvhost("drive", "m1", "remove", "scsi0:5").status == 0
    assert json.loads(hvhost("drive", "m1", "list", "--json").out) == []


def test_a_dvd(hvhost: Hvhost, runtime: Path, config: MachineConfig, image: Path) -> None:
    launch(config, detach=True)
    assert hvhost("drive", "m1", "add", "--dvd").status == 0
    assert hvhost("drive", "m1", "insert", "scsi0:0", str(image)).status == 0
    assert str(image) in hvhost("drive", "m1", "list").out
    assert hvhost("drive", "m1", "eject", "scsi0:0", "--force").status == 0
    assert "empty" in hvhost("drive", "m1", "list").out


def test_what_cannot_be_is_said(
    hvhost: Hvhost, runtime: Path, config: MachineConfig, image: Path
) -> None:
    launch(config, detach=True)
    assert "lun=" in hvhost.sentence("drive", "m1", "add", str(image), "--option", "speed=9")
    assert "needs an image" in hvhost.sentence("drive", "m1", "add")
    assert "there are: none" in hvhost.sentence("drive", "m1", "remove", "scsi0:0")
    assert "would be lost" in (
        hvhost("drive", "m1", "add", str(image)).err
        + hvhost.sentence("drive", "m1", "resize", "scsi0:0", "512K")
    )
