"""A host that has no room for what a guest writes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.conftest import Start
from guest.helpers import Guest, wait_for
from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.machine.storage_model import DriveConfig
from hvhost.units import MIB

ROOM, DISK = 16 * MIB, 64 * MIB
WRITTEN_MIB = 24

pytestmark = [
    only_in_matrix("a guest to boot"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which is root's"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for less than is written."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * ROOM}", "hvhost-test", str(place)]
    subprocess.run(mount, check=True)
    (place / "filler").write_bytes(bytes(ROOM))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def attach(guest: Guest, image: Path, *, pause_when_full: bool) -> None:
    with image.open("wb") as file:
        file.truncate(DISK)
    guest.machine.drives.add(DriveConfig(str(image), pause_when_full=pause_when_full))
    wait_for("the disk", lambda: guest.probe.read_all("/sys/block/sda/size"), 120.0)


def waits(guest: Guest) -> bool:
    (drive,) = guest.machine.drives.list()
    return drive.waiting


WRITE = f"dd if=/tmp/data of=/dev/sda bs=1M count={WRITTEN_MIB} oflag=direct"


def test_a_full_host_is_an_error_in_the_guest(one: GuestImages, start: Start, small: Path) -> None:
    """The write that has no room fails, those before it are there; later there is room."""
    guest: Guest = start(one)
    attach(guest, small / "disk.img", pause_when_full=False)
    guest.run(f"head -c {WRITTEN_MIB * MIB} /dev/urandom >/tmp/data", 120.0)
    told = guest.run(f"{WRITE} 2>&1 && echo all of it; dmesg | grep -i sda | tail -5", 120.0)
    assert "all of it" not in told
    assert "No space left on device" in told, told
    assert not waits(guest)
    guest.run(
        "dd if=/dev/sda of=/tmp/start bs=1M count=8 && cmp -n 8388608 /tmp/start /tmp/data", 120
    )
    (small / "filler").unlink()
    digest = guest.run(f"{WRITE} 2>/dev/null && sha256sum /tmp/data", 120.0).split()[0]
    with (small / "disk.img").open("rb") as file:
        assert hashlib.sha256(file.read(WRITTEN_MIB * MIB)).hexdigest() == digest


def test_a_full_host_pauses_the_guests_writes(one: GuestImages, start: Start, small: Path) -> None:
    """Nothing fails in the guest: it waits, and goes on once there is room."""
    guest: Guest = start(one)
    attach(guest, small / "disk.img", pause_when_full=True)
    guest.run(f"head -c {WRITTEN_MIB * MIB} /dev/urandom >/tmp/data", 120.0)
    guest.run(
        f"({WRITE} >/tmp/told 2>&1; echo ended with $? >>/tmp/told) </dev/null >&2 2>/dev/null &"
    )
    wait_for("the pause", lambda: waits(guest), 120.0)
    assert "ended" not in guest.run("cat /tmp/told")
    (small / "filler").unlink()
    wait_for("its end", lambda: "ended" in guest.run("cat /tmp/told"), 120.0)
    assert "ended with 0" in guest.run("cat /tmp/told")
    assert not waits(guest)
    digest = guest.run("sha256sum /tmp/data").split()[0]
    with (small / "disk.img").open("rb") as file:
        assert hashlib.sha256(file.read(WRITTEN_MIB * MIB)).hexdigest() == digest
