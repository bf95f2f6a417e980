"""``fibre-channel``: an adapter with names of its own, and a disk behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hvhost.machine.storage_model import DriveConfig
from hvhost.verify.drives import MIB, await_gone, digest, find, require, told_digest, workplace
from hvhost.verify.script import run
from hvhost.verify.session import Session

SIZE = 4 * MIB
SCAN_SECONDS = 120.0
"""Linux asks all 1,024 places of an adapter, and sees what is gone only after that."""


def prove(session: Session) -> Iterator[str]:
    """``fc_host`` shows the names that the host gave; the LUN behind it is read and written."""
    probe = session.running()
    with workplace(session) as directory:
        path = directory / "lun.img"
        data = os.urandom(SIZE)
        path.write_bytes(data)
        session.step("adding a LUN behind a fibre channel adapter")
        drive = session.machine.drives.add(DriveConfig(str(path), controller="fc0", lun=3))
        name = find(session, probe, drive, SCAN_SECONDS)
        adapter = drive.adapter
        assert adapter is not None
        hosts = probe.read_all("/sys/class/fc_host/*/port_name", "/sys/class/fc_host/*/node_name")
        told = {path.rpartition("/")[2]: value.strip() for path, value in hosts.items()}
        wanted = {
            "port_name": f"0x{adapter.port_name}",
            "node_name": f"0x{adapter.node_name}",
        }
        require(told == wanted, f"the guest's fc_host says {told}, the host gave {wanted}")
        yield f"fc_host: port {told['port_name']}, node {told['node_name']}"
        place = run(probe, f"readlink -f /sys/block/{name}/device")
        scsi_host = next(part for part in place.split("/") if part.startswith("host"))
        fc_hosts = {path.split("/")[4] for path in hosts}
        require(scsi_host in fc_hosts, f"{name} is on {scsi_host}, not on {fc_hosts}")
        require(
            told_digest(probe, f"/dev/{name}") == digest(data), "the LUN reads wrongly in the guest"
        )
        run(probe, "head -c 1048576 /dev/urandom > /tmp/data; sha256sum /tmp/data")
        told_data = told_digest(probe, "/tmp/data")
        run(probe, f"dd if=/tmp/data of=/dev/{name} bs=64k conv=fsync,notrunc; rm /tmp/data")
        require(digest(path.read_bytes()[:MIB]) == told_data, "what was written is not in the file")
        place = place.rpartition("/")[2]
        yield f"{name} at {place}: {SIZE // MIB} MiB read, 1 MiB written, by hash"
        session.machine.drives.remove(drive.address)
        await_gone(session, probe, name, SCAN_SECONDS)
    yield f"fc_host port {told['port_name']}, node {told['node_name']}; a LUN read and written"
