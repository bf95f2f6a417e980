"""``storage``: disks and DVDs that come and go while the guest uses them, every byte checked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.storage_model import DriveConfig, DriveInfo, DriveKind
from hvhost.verify.drives import (
    MIB,
    MOUNT_POINT,
    await_gone,
    digest,
    find,
    require,
    told_digest,
    workplace,
)
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.iso import iso_image
from hvhost.verify.script import run
from hvhost.verify.session import Session

SIZE = 16 * MIB
WRITTEN = 4 * MIB
_FLUSHES = 15  # of /sys/block/*/stat, Documentation/block/stat.rst
_TRACING = "/tmp/tracing"
_SCSI_EVENT = "events/scsi/scsi_dispatch_cmd_start"
_WRITE = re.compile(r"raw=(?:2a|8a|aa) ")
_FORCED_WRITE = re.compile(r"raw=(?:2a|8a|aa) [0-9a-f][89a-f] ")


def _statistics(probe: Probe, name: str) -> list[int]:
    return [int(word) for word in probe.read(f"/sys/block/{name}/stat").split()]


def _read_and_write(session: Session, probe: Probe, path: Path) -> tuple[DriveInfo, str, str]:
    """The drive, the guest's name for it, and what was seen."""
    data = os.urandom(SIZE)
    path.write_bytes(data)
    session.step("adding a disk to the running guest")
    drive = session.machine.drives.add(DriveConfig(str(path)))
    name = find(session, probe, drive)
    require(
        told_digest(probe, f"/dev/{name}") == digest(data),
        "the guest reads something else from the disk than is in its file",
    )
    session.step("writing to the disk")
    run(probe, f"head -c {WRITTEN} /dev/urandom > /tmp/data")
    told = told_digest(probe, "/tmp/data")
    before = _statistics(probe, name)
    run(probe, f"dd if=/tmp/data of=/dev/{name} bs=1M seek=2 conv=fsync,notrunc")
    after = _statistics(probe, name)
    there = path.read_bytes()[2 * MIB : 2 * MIB + WRITTEN]
    require(digest(there) == told, "what the guest wrote and flushed is not in the host's file")
    flushes = after[_FLUSHES] - before[_FLUSHES] if len(after) > _FLUSHES else None
    require(flushes != 0, "fsync in the guest sent no flush to the disk")
    return (
        drive,
        name,
        f"{name}: {SIZE // MIB} MiB read, {WRITTEN // MIB} MiB written and flushed, sha256 equal "
        "on both sides",
    )


def _forced(session: Session, probe: Probe, path: Path, name: str) -> str:
    """A synchronous write forces unit access: the guest's kernel shows the command's bit."""
    session.step("writing with FUA")
    queue = f"/sys/block/{name}/queue"
    modes = [probe.read(f"{queue}/{each}").strip() for each in ("fua", "write_cache")]
    require(modes == ["1", "write back"], f"the guest's disk has FUA {modes[0]}, cache {modes[1]}")
    run(probe, f"mkdir -p {_TRACING}; mount -t tracefs tracefs {_TRACING} 2>/dev/null || true")
    run(probe, f"echo > {_TRACING}/trace; echo 1 > {_TRACING}/{_SCSI_EVENT}/enable")
    run(probe, f"head -c 65536 /tmp/data | hvhost-dsync /dev/{name} {8 * MIB}")
    run(probe, f"echo 0 > {_TRACING}/{_SCSI_EVENT}/enable")
    trace = run(probe, f"cat {_TRACING}/trace; umount {_TRACING}")
    forced = len(_FORCED_WRITE.findall(trace))
    plain = len(_WRITE.findall(trace)) - forced
    require(
        forced > 0 and plain == 0,
        f"O_DSYNC made {forced} writes with FUA and {plain} without",
        *trace.splitlines()[-4:],
    )
    there = path.read_bytes()[8 * MIB : 8 * MIB + 65536]
    told = run(probe, "head -c 65536 /tmp/data | sha256sum").split()[0]
    require(digest(there) == told, "what the guest wrote with FUA is not in the host's file")
    return f"O_DSYNC: {forced} write commands, all with FUA set, their data in the host's file"


def _come_and_go(
    session: Session, probe: Probe, directory: Path, first: DriveInfo, name: str
) -> Iterator[str]:
    """A second disk comes and goes while the guest writes to the first one."""
    other = directory / "other.img"
    other.write_bytes(os.urandom(2 * MIB))
    session.step("adding and removing a disk while another is written to")
    run(
        probe,
        "rm -f /tmp/stop; "
        f"(n=0; while [ ! -e /tmp/stop ]; do dd if=/tmp/data of=/dev/{name} bs=1M seek=10 "
        "conv=fsync,notrunc 2>/dev/null || exit 1; n=$((n+1)); done; echo $n > /tmp/done) "
        "</dev/null >/dev/null 2>&1 &",
    )
    second = session.machine.drives.add(DriveConfig(str(other), lun=40, read_only=True))
    found = find(session, probe, second)
    require(
        told_digest(probe, f"/dev/{found}") == digest(other.read_bytes()),
        "the second disk reads wrongly while the first is written to",
    )
    read_only = probe.read(f"/sys/block/{found}/ro").strip()
    require(read_only == "1", "the guest takes a read-only disk for writable")
    session.machine.drives.remove(second.address)
    await_gone(session, probe, found)
    run(
        probe,
        "touch /tmp/stop; n=0; until [ -e /tmp/done ] || [ $n = 100 ]; do usleep 200000; "
        "n=$((n+1)); done; rm -f /tmp/stop",
    )
    rounds = int(run(probe, "cat /tmp/done; rm /tmp/done"))
    require(rounds > 0, "the guest could not write to the first disk while the second came")
    with Path(first.path or "").open("rb") as file:
        file.seek(10 * MIB)
        there = file.read(WRITTEN)
    require(
        digest(there) == told_digest(probe, "/tmp/data"),
        "what the guest wrote while another disk came and went is not in the host's file",
    )
    yield (
        f"{found} at {second.address} came read-only and went while {name} was written to "
        f"{rounds} times"
    )
    session.step("removing the disk and adding it again")
    session.machine.drives.remove(first.address)
    await_gone(session, probe, name)
    again = session.machine.drives.add(DriveConfig(first.path))
    name = find(session, probe, again)
    content = Path(first.path or "").read_bytes()
    require(
        told_digest(probe, f"/dev/{name}") == digest(content),
        "the disk reads differently after it was removed and added again",
    )
    yield f"removed, and added again with the same data, as {name}"


def _mounted(probe: Probe, name: str, file: str, data: bytes) -> None:
    run(probe, f"mount -t iso9660 -o ro /dev/{name} {MOUNT_POINT}")
    told = told_digest(probe, f"{MOUNT_POINT}/{file}")
    require(told == digest(data), f"{file} on the DVD reads wrongly")


def _dvd(session: Session, probe: Probe, directory: Path) -> str:
    """An image is read, refuses to go while mounted, is ejected, and another one inserted."""
    contents = {name: os.urandom(300_000) for name in ("first", "second")}
    for name, data in contents.items():
        image = iso_image(name, {"data.bin": data})
        (directory / f"{name}.iso").write_bytes(image)
    session.step("mounting a DVD")
    path = directory / "first.iso"
    drive = session.machine.drives.add(DriveConfig(str(path), DriveKind.DVD))
    name = find(session, probe, drive)
    _mounted(probe, name, "data.bin", contents["first"])
    try:
        session.machine.drives.eject(drive.address)
    except HvHostError as error:
        require("unmount" in str(error), f"the refusal to eject says {error}")
    else:
        raise RowFailed("a DVD that the guest had mounted was ejected without force")
    run(probe, f"umount {MOUNT_POINT}")
    session.step("ejecting the DVD and inserting another")
    session.machine.drives.eject(drive.address)
    gone = probe.run(["sh", "-c", f"dd if=/dev/{name} of=/dev/null bs=2048 count=1"], 30.0)
    require(
        gone.status != 0 and "medium" in gone.output.lower(),
        "the guest still reads from an empty DVD drive",
        gone.output.strip(),
    )
    session.machine.drives.insert(drive.address, directory / "second.iso")
    _mounted(probe, name, "data.bin", contents["second"])
    run(probe, f"umount {MOUNT_POINT}")
    session.machine.drives.remove(drive.address)
    await_gone(session, probe, name)
    return f"{name}: ISO mounted, held while in use, ejected, another inserted, drive removed"


def prove(session: Session) -> Iterator[str]:
    """Read, write, flush, FUA, disks and a DVD that come and go; all data checked by hash."""
    probe = session.running()
    with workplace(session) as directory:
        path = directory / "disk.img"
        drive, name, line = _read_and_write(session, probe, path)
        yield line
        yield _forced(session, probe, path, name)
        yield from _come_and_go(session, probe, directory, drive, name)
        yield _dvd(session, probe, directory)
        run(probe, "rm -f /tmp/data")
    yield (
        "read, written, flushed and written with FUA; disks added and removed while in use; "
        "DVD inserted, ejected and changed: every byte checked by hash on both sides"
    )
