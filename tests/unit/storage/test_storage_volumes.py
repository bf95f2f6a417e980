"""What may be backed up to where."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.storage.volumes import check_backup, read_volumes, volume_of, volumes

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /srv/nfs rw - nfs4 server:/export rw
31 22 0:41 / /srv/ssh rw - fuse.sshfs me@host:/ rw
32 22 8:17 / /mnt/new\\040disk rw shared:2 - xfs /dev/sdb1 rw
33 22 8:1 /srv /var/bind rw - ext4 /dev/sda1 rw
34 22 0:42 / /mnt/twice rw - tmpfs none rw
35 34 8:33 / /mnt/twice rw - ext4 /dev/sdc1 rw
36 22 0:43 / /srv/\\303\\251 rw - cifs //server/share rw
"""
MOUNTED = read_volumes(MOUNTS)


def check(source: str, destination: str, *, network: bool = False, same: bool = False) -> None:
    check_backup(
        [Path(source)],
        Path(destination),
        MOUNTED,
        allow_network=network,
        allow_same_volume=same,
    )


@pytest.mark.parametrize(
    ("path", "device"),
    [
        ("/srv/disk.vhdx", "8:1"),
        ("/srv/nfs/disk.vhdx", "0:40"),
        ("/srv/nfs2/disk.vhdx", "8:1"),
        ("/mnt/new disk/a", "8:17"),
        ("/mnt/twice/a", "8:33"),
        ("/srv/é/a", "0:43"),
    ],
)
def test_the_volume_of_a_path(path: str, device: str) -> None:
    assert volume_of(Path(path), MOUNTED).device == device


@pytest.mark.parametrize("place", ["/srv/nfs", "/srv/ssh", "/srv/é"])
def test_network_storage_is_refused_with_its_name(place: str) -> None:
    with pytest.raises(HvHostError, match=r"network storage .*--allow-network"):
        check(f"{place}/disk.vhdx", "/mnt/new disk")
    check(f"{place}/disk.vhdx", "/mnt/new disk", network=True)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("platform/host3/session1/target3:0:0/3:0:0:1/block/sda/sda1", "iSCSI, sda1"),
        ("virtual/block/nbd0", "NBD, nbd0"),
        ("virtual/block/rbd1/rbd1p1", "RBD, rbd1p1"),
        ("virtual/nvme-fabrics/ctl/nvme0/nvme0n1", "NVMe over fabrics, nvme0n1"),
        ("virtual/block/etherd!e0.0", "ATA over Ethernet, etherd!e0.0"),
        ("pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda/sda1", None),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_block_devices_of_other_computers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str | None, stacked: bool
) -> None:
    """By themselves, and below a logical volume."""
    numbers, device = tmp_path / "dev/block", tmp_path / "devices" / place
    numbers.mkdir(parents=True)
    device.mkdir(parents=True)
    top = device
    if stacked:
        top = tmp_path / "devices/virtual/block/dm-0"
        (top / "slaves").mkdir(parents=True)
        (top / "slaves" / device.name).symlink_to(device)
    (numbers / "8:1").symlink_to(top)
    monkeypatch.setattr("hvhost.storage.volumes._BLOCK_DEVICES", numbers)
    if name is None:
        check("/srv/disk.vhdx", "/mnt/new disk")
        return
    with pytest.raises(HvHostError, match=rf"network storage \({name}\).*--allow-network"):
        check("/srv/disk.vhdx", "/mnt/new disk")
    check("/srv/disk.vhdx", "/mnt/new disk", network=True)


def test_devices_that_are_made_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel lets that be; a search through it ends all the same."""
    numbers, devices = tmp_path / "dev/block", tmp_path / "devices/virtual/block"
    numbers.mkdir(parents=True)
    for name, other in (("dm-0", "dm-1"), ("dm-1", "dm-0")):
        (devices / name / "slaves").mkdir(parents=True)
        (devices / name / "slaves" / other).symlink_to(devices / other)
    (numbers / "8:1").symlink_to(devices / "dm-0")
    monkeypatch.setattr("hvhost.storage.volumes._BLOCK_DEVICES", numbers)
    check("/srv/disk.vhdx", "/mnt/new disk")


def test_network_storage_is_a_good_destination() -> None:
    check("/srv/disk.vhdx", "/srv/nfs/backups")


@pytest.mark.parametrize("destination", ["/backups", "/var/bind/backups"])
def test_the_volume_of_the_disk_is_refused(destination: str) -> None:
    with pytest.raises(HvHostError, match="--allow-same-volume"):
        check("/srv/disk.vhdx", destination)
    check("/srv/disk.vhdx", destination, same=True)
    check("/srv/disk.vhdx", "/mnt/new disk/backups")


def test_this_computers_volumes_are_read(tmp_path: Path) -> None:
    assert volume_of(tmp_path, volumes()).type
    with pytest.raises(HvHostError, match="no mounted file system"):
        volume_of(tmp_path, [])
