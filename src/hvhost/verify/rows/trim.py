"""``trim``: what the guest discards is given back by the host's file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvhost.machine.storage_model import DriveConfig
from hvhost.verify.drives import MIB, MOUNT_POINT, await_gone, find, require, workplace
from hvhost.verify.guest import HostLacks, Probe
from hvhost.verify.script import run
from hvhost.verify.session import Session

SIZE, FILLED = 48 * MIB, 24 * MIB
LEAST = 20 * MIB
"""Of what was filled, how much must come back."""
BLOCK = MIB


def _used(path: Path) -> int:
    """Bytes of the host's storage under a file, as the host's kernel counts them."""
    return path.stat().st_blocks * 512


def _check_host(directory: Path) -> None:
    """:class:`HostLacks` where the host's file system cannot make holes."""
    from hvhost.storage.raw import RawDisk

    disk = RawDisk.create(directory / "hole.img", MIB)
    try:
        data = [memoryview(b"x" * MIB)]
        disk.writev(0, data)
        disk.flush()
        before = _used(directory / "hole.img")
        disk.unmap(0, MIB)
        if _used(directory / "hole.img") >= before:
            raise HostLacks(f"the file system of {directory} cannot give storage of a file back")
    finally:
        disk.close()


def _trim(session: Session, probe: Probe, path: Path) -> Iterator[str]:
    drive = session.machine.drives.add(DriveConfig(str(path)))
    name = find(session, probe, drive)
    discard = int(probe.read(f"/sys/block/{name}/queue/discard_max_bytes"))
    require(discard > 0, f"the guest sees no discard on {name}")
    session.step(f"filling and trimming {path.name}")
    device = f"/dev/{name}"
    run(probe, f"/usr/sbin/mke2fs -q -F -t ext4 {device} && mount -t ext4 {device} {MOUNT_POINT}")
    run(probe, f"echo kept > {MOUNT_POINT}/kept")
    run(
        probe,
        f"dd if=/dev/urandom of={MOUNT_POINT}/large bs=1M count={FILLED // MIB} conv=fsync",
        120.0,
    )
    full, listed = _used(path), session.machine.drives.list()
    run(probe, f"rm {MOUNT_POINT}/large && sync && fstrim {MOUNT_POINT}")
    run(probe, f"sync; cat {MOUNT_POINT}/kept | grep -q kept && umount {MOUNT_POINT}")
    left = _used(path)
    require(
        full - left >= LEAST,
        f"{path.name} took {full >> 20} MiB before fstrim and {left >> 20} MiB after",
        f"the host lists {[each.allocated for each in listed]} bytes before",
    )
    yield f"{path.name}: {full / MIB:.0f} MiB on the host before fstrim, {left / MIB:.0f} MiB after"
    session.step("discarding a whole disk")
    run(probe, f"blkdiscard {device}")
    empty = _used(path)
    other = run(probe, f"tr -d '\\000' < {device} | wc -c", 120.0)
    require(other == "0", f"{other} bytes of what was discarded do not read as zeros")
    yield f"{path.name}: {empty / MIB:.1f} MiB after blkdiscard, and the disk reads as zeros"
    session.machine.drives.remove(drive.address)
    await_gone(session, probe, name)


def prove(session: Session) -> Iterator[str]:
    """``fstrim`` and ``blkdiscard`` make the host's raw and VHDX files smaller on disk."""
    from hvhost.storage.images import create_disk
    from hvhost.storage.vhdx_create import VhdxOptions

    probe = session.running()
    with workplace(session) as directory:
        _check_host(directory)
        raw, vhdx = directory / "disk.img", directory / "disk.vhdx"
        create_disk(raw, SIZE).close()
        create_disk(vhdx, VhdxOptions(SIZE, block_size=BLOCK)).close()
        for path in (raw, vhdx):
            yield from _trim(session, probe, path)
    yield "fstrim and blkdiscard in the guest shrink a raw file's and a VHDX's use of the disk"
