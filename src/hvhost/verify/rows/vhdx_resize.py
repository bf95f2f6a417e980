"""``vhdx-resize``: VHDX disks get another size while the guest uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.storage_model import DriveConfig
from hvhost.verify.drives import (
    MIB,
    MOUNT_POINT,
    await_gone,
    await_size,
    find,
    require,
    told_digest,
    workplace,
)
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session

SMALL, LARGE, SHRUNK = 48 * MIB, 96 * MIB, 64 * MIB
DATA = 8 * MIB


def _file_system(probe: Probe) -> int:
    """Bytes of the mounted file system."""
    blocks, size = run(probe, f"stat -f -c '%b %S' {MOUNT_POINT}").split()
    return int(blocks) * int(size)


def _resize(session: Session, probe: Probe, path: Path, kind: str) -> Iterator[str]:
    boots = session.machine.info().boots
    drive = session.machine.drives.add(DriveConfig(str(path)))
    name = find(session, probe, drive)
    device, file = f"/dev/{name}", f"{MOUNT_POINT}/data"
    session.step(f"growing a {kind} VHDX under a mounted file system")
    run(probe, f"/usr/sbin/mke2fs -q -F -t ext4 {device} && mount -t ext4 {device} {MOUNT_POINT}")
    run(probe, f"dd if=/dev/urandom of={file} bs=1M count={DATA // MIB} conv=fsync")
    told, before = told_digest(probe, file), _file_system(probe)
    session.machine.drives.resize(drive.address, LARGE)
    seconds = await_size(session, probe, name, LARGE)
    run(probe, f"/usr/sbin/resize2fs {device}")
    after = _file_system(probe)
    require(after > before + (LARGE - SMALL) * 3 // 4, f"resize2fs grew {before} to {after} bytes")
    # The new space takes data, and the old data is whole.
    run(probe, f"dd if=/dev/zero of={file}2 bs=1M count=40 conv=fsync", 120.0)
    require(told_digest(probe, file) == told, "the file is another after the disk grew")
    run(probe, f"rm {file}2; sync; umount {MOUNT_POINT}")
    yield (
        f"{kind}: {SMALL // MIB} to {LARGE // MIB} MiB seen after {seconds:.1f} s, mounted; ext4 "
        f"grown from {before // MIB} to {after // MIB} MiB, its file whole"
    )
    session.step(f"shrinking a {kind} VHDX")
    try:
        session.machine.drives.resize(drive.address, SHRUNK)
    except HvHostError:
        pass
    else:
        raise RowFailed("a disk shrank without anybody having allowed that")
    # Without e2fsck at hand the file system is made small enough again by a new one.
    run(
        probe,
        f"/usr/sbin/mke2fs -q -F -t ext4 {device} {SHRUNK // 1024} && mount {device} {MOUNT_POINT}",
    )
    run(probe, f"dd if=/dev/urandom of={file} bs=1M count={DATA // MIB} conv=fsync")
    told = told_digest(probe, file)
    session.machine.drives.resize(drive.address, SHRUNK, shrink=True)
    seconds = await_size(session, probe, name, SHRUNK)
    run(
        probe,
        f"umount {MOUNT_POINT}; echo 3 > /proc/sys/vm/drop_caches; mount {device} {MOUNT_POINT}",
    )
    require(told_digest(probe, file) == told, "the file is another after the disk shrank")
    run(probe, f"umount {MOUNT_POINT}")
    require(session.machine.info().boots == boots, "the guest was restarted meanwhile")
    yield f"{kind}: back to {SHRUNK // MIB} MiB, the end of its file system, after {seconds:.1f} s"
    session.machine.drives.remove(drive.address)
    await_gone(session, probe, name)


def prove(session: Session) -> Iterator[str]:
    """A dynamic and a fixed VHDX grow while mounted, and shrink to what is used."""
    from hvhost.storage.images import create_disk
    from hvhost.storage.vhdx_create import VhdxOptions

    probe = session.running()
    with workplace(session) as directory:
        for kind, fixed in (("dynamic", False), ("fixed", True)):
            path = directory / f"{kind}.vhdx"
            create_disk(path, VhdxOptions(SMALL, fixed=fixed, block_size=MIB)).close()
            yield from _resize(session, probe, path, kind)
    yield (
        f"dynamic and fixed VHDX: grown from {SMALL // MIB} to {LARGE // MIB} MiB while mounted, "
        "without a restart, file system grown; shrunk again"
    )
