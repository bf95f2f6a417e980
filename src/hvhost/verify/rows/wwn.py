"""``wwn``: a disk's identity is the same in every page that tells it, and after a reset."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hvhost.machine.storage_model import DriveConfig, DriveInfo
from hvhost.verify.drives import MIB, find, require, workplace
from hvhost.verify.guest import Probe
from hvhost.verify.session import Session

_NAA = 3
_T10_VENDOR = 1


def parse_identification(page: bytes) -> dict[int, bytes]:
    """VPD page 0x83 as the guest's kernel keeps it: designators by their type (SPC-4 7.8.6)."""
    found: dict[int, bytes] = {}
    position, end = 4, 4 + int.from_bytes(page[2:4], "big")
    while position + 4 <= min(end, len(page)):
        length = page[position + 3]
        found[page[position + 1] & 0xF] = page[position + 4 : position + 4 + length]
        position += 4 + length
    return found


def _identity(session: Session, probe: Probe, drive: DriveInfo) -> tuple[str, ...]:
    """World-wide name, serial number and vendor's designator as the guest shows them."""
    name = find(session, probe, drive)
    device = f"/sys/block/{name}/device"
    wwid = probe.read(f"{device}/wwid").strip()
    designators = parse_identification(probe.read_bytes(f"{device}/vpd_pg83"))
    serial = probe.read_bytes(f"{device}/vpd_pg80")[4:].decode("ascii", "replace")
    naa = designators.get(_NAA, b"").hex()
    require(
        wwid == f"naa.{naa}" and naa == drive.wwn,
        f"page 0x83 says {naa}, sysfs {wwid}, the host {drive.wwn}",
    )
    vendor = designators.get(_T10_VENDOR, b"").decode("ascii", "replace")
    require(serial != "" and serial in vendor, f"page 0x80 says {serial!r}, 0x83 {vendor!r}")
    return wwid, serial, vendor


def prove(session: Session) -> Iterator[str]:
    """Two disks differ, agree with their pages, and keep their names over a reset."""
    probe = session.running()
    with workplace(session) as directory:
        drives = []
        for number in range(2):
            path = directory / f"disk{number}.img"
            path.write_bytes(os.urandom(MIB))
            drives.append(session.machine.drives.add(DriveConfig(str(path))))
        session.step("reading the disks' identities")
        before = [_identity(session, probe, drive) for drive in drives]
        require(before[0] != before[1], f"two disks have one identity: {before[0]}")
        yield f"VPD 0x83 and sysfs {before[0][0]}, VPD 0x80 {before[0][1]}; the other disk differs"
        session.spoil()
        probe = session.running()
        after = [_identity(session, probe, drive) for drive in drives]
        require(before == after, f"after a reset: {after}", f"before: {before}")
    yield f"{before[0][0]} in VPD 0x83 and sysfs, serial in 0x80: the same after a reset"
