"""``hvhost backup`` against a worker without a virtual machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.test_cli import Hvhost, hvhost
from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.model import MachineConfig
from hvhost.machine.storage_model import DriveConfig
from hvhost.manager.backup import back_up
from hvhost.manager.client import MachineClient
from hvhost.manager.launcher import launch
from hvhost.storage.images import create_disk

__all__ = ["hvhost"]


@pytest.fixture
def disk(tmp_path: Path, runtime: Path, config: MachineConfig) -> Path:
    """The disk of the machine m1, which runs."""
    path = tmp_path / "disk.img"
    create_disk(path, 1 << 20).close()
    launch(replace(config, drives=(DriveConfig(str(path)),)), detach=True)
    return path


def test_backup(hvhost: Hvhost, disk: Path, tmp_path: Path) -> None:
    backups = str(tmp_path / "backups")
    options = ("--crash-consistent", "--allow-same-volume")
    done = hvhost("backup", "m1", backups, *options)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("Backed 1 MiB up to ") and "guest was not asked" in done.out
    (found,) = Path(backups).iterdir()
    assert sorted(path.name for path in found.iterdir()) == ["backup.json", "scsi0-0.vhdx"]
    earlier = found.rename(found.with_name("m1-20200101T000000Z"))  # else of the same second
    again = hvhost("backup", "m1", backups, *options, "--incremental")
    assert (again.status, again.err) == (0, "") and f"different from {earlier}" in again.out
    answer = json.loads(hvhost("backup", "m1", str(tmp_path / "other"), *options, "--json").out)
    assert answer["state"] == "done" and Path(answer["path"]).is_dir()


def test_backups_that_are_refused(hvhost: Hvhost, disk: Path, tmp_path: Path) -> None:
    assert "--allow-same-volume" in hvhost.sentence("backup", "m1", str(tmp_path))
    told = hvhost.sentence("backup", "m1", str(tmp_path), "--allow-same-volume")
    assert told == "The machine is being reset; try again."


def test_a_backup_that_is_interrupted_is_given_up(
    runtime: Path, config: MachineConfig, tmp_path: Path
) -> None:
    """While it copies: a tebibyte of nothing takes a while to look through."""
    path = tmp_path / "large.img"
    create_disk(path, 1 << 40).close()
    launch(replace(config, drives=(DriveConfig(str(path)),)), detach=True)
    client = MachineClient("m1")

    def interrupt(info: object) -> None:
        raise KeyboardInterrupt

    options = BackupOptions(str(tmp_path / "backups"), True, False, True)
    with pytest.raises(KeyboardInterrupt):
        back_up(client, options, interrupt)
    after = client.ask("GET", "/v1/machine/backup", BackupInfo)
    assert after.error == "The backup was cancelled; nothing of it is left."
    assert list((tmp_path / "backups").iterdir()) == []
