"""Two SCSI controllers with all the disks that they take, and disks with limits, in one guest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.helpers import Guest, hvhost, tell, wait_for
from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.machine.storage_model import DRIVES_PER_CONTROLLER, DriveConfig
from hvhost.storage.limits import BURST_SECONDS
from hvhost.storage.names import instance
from hvhost.units import KIB, MIB

NAME = "crowd"
FULL = ("scsi0", "scsi1")
LUNS = range(DRIVES_PER_CONTROLLER)
#: /proc/uptime has hundredths of a second, twice.
ROUNDING_SECONDS = 0.02
_BLOCK_LINK = re.compile(
    r"/([0-9a-f-]{36})/host\d+/target[\d:]+/\d+:\d+:\d+:(\d+)/block/(sd[a-z]+)"
)

pytestmark = [
    only_in_matrix("a guest of 128 disks"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drives")


@pytest.fixture(scope="module")
def guest(images: GuestImages, directory: Path) -> Iterator[Guest]:
    """The first controller's disks are there from the start, the second's come while it runs."""
    first, second = (
        [DriveConfig(str(image(directory, name, lun)), controller=name, lun=lun) for lun in LUNS]
        for name in FULL
    )
    made = Guest.start(images, name=NAME, drives=tuple(first))
    try:
        for drive in second:
            made.machine.drives.add(drive)
        yield made
    finally:
        tell(made.machine)
        made.machine.kill()


def image(directory: Path, controller: str, lun: int) -> Path:
    """A disk that starts with its address; the last of a controller is full, the others sparse."""
    path = directory / f"{controller}-{lun}.img"
    mark = f"{controller}:{lun}\n".encode()
    path.write_bytes(mark + (os.urandom(MIB - len(mark)) if lun == LUNS[-1] else b""))
    os.truncate(path, MIB)
    return path


def disks(guest: Guest) -> dict[tuple[str, int], str]:
    """The guest's names of its disks, by controller and LUN, as its own device tree has them."""
    controllers = {str(instance(name)): name for name in (*FULL, "scsi2")}
    found = _BLOCK_LINK.findall(guest.run("ls -l /sys/block"))
    return {(controllers[where], int(lun)): name for where, lun, name in found}


def test_two_controllers_have_64_disks_each(guest: Guest, directory: Path) -> None:
    everywhere = {(controller, lun) for controller in FULL for lun in LUNS}
    assert len(everywhere) == 128
    wait_for("128 disks", lambda: len(disks(guest)) >= len(everywhere), 300.0)
    found = disks(guest)
    assert set(found) == everywhere
    assert guest.run("ls /sys/class/scsi_device | wc -l").split() == ["128"], "no phantoms"
    marks = guest.run(
        "for disk in /sys/block/sd*; do disk=${disk##*/}; "
        "read mark < /dev/$disk; echo $disk $mark; done",
        300.0,
    )
    told = dict(line.split() for line in marks.splitlines())
    assert told == {name: f"{controller}:{lun}" for (controller, lun), name in found.items()}
    for controller in FULL:
        name, path = found[controller, LUNS[-1]], directory / f"{controller}-{LUNS[-1]}.img"
        assert sha256(guest, f"/dev/{name}") == hashlib.sha256(path.read_bytes()).hexdigest()
        guest.run("head -c 65536 /dev/urandom > /tmp/data")
        guest.run(f"dd if=/tmp/data of=/dev/{name} bs=64k seek=1 conv=fsync,notrunc")
        written = path.read_bytes()[64 * KIB : 128 * KIB]
        assert hashlib.sha256(written).hexdigest() == sha256(guest, "/tmp/data")
    extra = image(directory, "scsi0", len(LUNS))
    refused = hvhost("drive", NAME, "add", extra, timeout=300.0)
    assert refused.returncode == 1
    assert "scsi0 has 64 drives; use another controller." in refused.stderr


def sha256(guest: Guest, path: str) -> str:
    return guest.run(f"sha256sum {path}", 120.0).split()[0]


class LimitedDisk:
    """A disk of ``scsi2`` and how long the guest, by its own clock, takes to read from it."""

    def __init__(self, guest: Guest, address: str, block: int) -> None:
        self.guest, self.address, self.block = guest, address, block
        controller, _, lun = address.partition(":")
        key = controller, int(lun)
        wait_for(address, lambda: key in disks(guest), 120.0)
        self.name = disks(guest)[key]
        # Whoever opens a disk waits until the kernel has looked for its partitions.
        guest.run(f"dd if=/dev/{self.name} of=/dev/null bs=4k count=1 iflag=direct")

    def requests(self) -> int:
        """Reads that the guest's kernel has seen done."""
        return int(self.guest.probe.read(f"/sys/block/{self.name}/stat").split()[0])

    def _reading(self, count: int, to: str) -> str:
        return (
            f"read start _ < /proc/uptime; dd if=/dev/{self.name} of={to} bs={self.block} "
            f"count={count} iflag=direct; read end _ < /proc/uptime; echo took $start $end"
        )

    def read(self, count: int, to: str = "/dev/null") -> float:
        """Seconds for *count* requests, one after the other."""
        before = self.requests()
        seconds = took(self.guest.run(self._reading(count, to), 300.0))
        assert self.requests() - before == count
        return seconds

    def begin(self, count: int) -> None:
        """As :meth:`read`, without waiting for the end."""
        script = self._reading(count, "/dev/null")
        self.guest.run(f"rm -f /tmp/took; ({script}) < /dev/null > /tmp/reading 2>&1 &")

    def end(self) -> float:
        """Seconds that what was begun took."""
        wait_for("the reading", lambda: "took" in self.guest.run("cat /tmp/reading"), 300.0)
        return took(self.guest.run("cat /tmp/reading"))


def took(output: str) -> float:
    start, end = re.findall(r"took (\S+) (\S+)", output)[0]
    return float(end) - float(start)


@pytest.mark.parametrize(
    ("limit", "raised", "block", "rate"),
    [
        (("iops", "5"), {"iops": 5000}, 4 * KIB, 5),
        (("bandwidth", "256K"), {"bandwidth": 1 << 30}, 64 * KIB, 4),
    ],
    ids=["iops", "bandwidth"],
)
def test_a_limit_holds_until_it_is_raised(
    guest: Guest,
    directory: Path,
    limit: tuple[str, str],
    raised: dict[str, int],
    block: int,
    rate: int,
) -> None:
    """*rate* requests of *block* bytes are what the limit allows in a second."""
    if "iflag=direct" not in guest.run("dd --help 2>&1 || true"):
        pytest.skip("this guest's busybox has no dd that reads directly")
    few, many = 15, 40 * rate
    data = os.urandom(few * block)
    path = directory / f"{limit[0]}.img"
    path.write_bytes(data)
    os.truncate(path, many * block)
    options = ["--option", "controller=scsi2", "--option", "=".join(limit)]
    added = hvhost("drive", NAME, "add", path, *options, timeout=300.0)
    assert added.returncode == 0, added.stderr
    (address,) = (each.address for each in guest.machine.drives.list() if each.path == str(path))
    try:
        disk = LimitedDisk(guest, address, block)

        def least(count: int) -> float:
            return count / rate - BURST_SECONDS - ROUNDING_SECONDS

        seconds = disk.read(few, "/tmp/read")
        print(f"{few} requests of {block} bytes at {'='.join(limit)}: {seconds:.2f} s")
        assert seconds >= least(few)
        assert sha256(guest, "/tmp/read") == hashlib.sha256(data).hexdigest()

        before = disk.requests()
        disk.begin(many)
        wait_for("some requests", lambda: disk.requests() >= before + 5, 60.0)
        guest.machine.drives.limit(address, **raised)
        seconds = disk.end()
        assert disk.requests() - before == many
        print(f"{many} requests, raised to {raised} meanwhile: {seconds:.2f} s")
        assert seconds < least(many) * 0.75

        lifted = hvhost("drive", NAME, "limit", address, timeout=300.0)
        assert lifted.returncode == 0, lifted.stderr
        seconds = disk.read(many)
        print(f"{many} requests without a limit: {seconds:.2f} s")
        assert seconds < least(many) / 2
    finally:
        guest.machine.drives.remove(address)
