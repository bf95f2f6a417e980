"""Storage of a guest with so many processors that one channel is not enough."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from guest.conftest import Start
from guest.helpers import Guest, wait_for
from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.machine.storage_model import DriveConfig
from hvhost.verify.contract import HV_SCSI_GUID
from hvhost.verify.sysfs import GuestDevice, read_counters, read_devices

CPUS = 5
MIB = 1 << 20

pytestmark = [
    only_in_matrix("a guest of five processors"),
    pytest.mark.timeout(600),
]


def controller(guest: Guest) -> GuestDevice:
    (found,) = (each for each in read_devices(guest.probe) if each.interface_type == HV_SCSI_GUID)
    return found


@pytest.mark.parametrize("storage_process", [False, True])
def test_five_processors_have_two_channels_and_use_both(
    images: GuestImages, start: Start, tmp_path: Path, storage_process: bool
) -> None:
    data = os.urandom(8 * MIB)
    path = tmp_path / "disk.img"
    path.write_bytes(data)
    guest: Guest = start(images, cpus=CPUS, storage_process=storage_process)
    assert guest.run("nproc").strip() == str(CPUS)
    guest.machine.drives.add(DriveConfig(str(path)))
    wait_for("the disk", lambda: guest.probe.read_all("/sys/block/sda/size"), 120.0)
    wait_for("the sub-channel", lambda: len(controller(guest).channels) == 2, 60.0)
    channels = controller(guest).channels
    assert len(set(channels.values())) == 2, "each interrupts a processor of its own"
    before = read_counters(guest.probe)
    for cpu in range(CPUS):
        guest.run("echo 3 > /proc/sys/vm/drop_caches")
        told = guest.run(f"taskset {1 << cpu:x} sha256sum /dev/sda", 120.0).split()[0]
        assert told == hashlib.sha256(data).hexdigest()
    taken = {
        channel: after.interrupts - before[channel].interrupts
        for channel, after in read_counters(guest.probe).items()
        if channel in channels
    }
    assert len(taken) == 2 and all(taken.values()), taken
    guest.run("head -c 1048576 /dev/zero | tr '\\0' x | dd of=/dev/sda bs=64k conv=fsync", 120.0)
    assert path.read_bytes() == b"x" * MIB + data[MIB:]
    guest.machine.drives.resize("scsi0:0", 16 * MIB)
    size, blocks = "/sys/block/sda/size", str(16 * MIB // 512)
    wait_for("the new size", lambda: guest.probe.read_all(size)[size] == blocks, 60.0)
    guest.machine.drives.remove("scsi0:0")
    wait_for("the disk's end", lambda: not guest.probe.read_all(size), 60.0)
