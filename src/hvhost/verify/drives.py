"""Drives in the rows of storage: attached by the host, found and used in the guest."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.storage_model import DriveInfo
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session

MIB = 1 << 20
FIND_SECONDS = 60.0
MOUNT_POINT = "/mnt"


@contextlib.contextmanager
def workplace(session: Session) -> Iterator[Path]:
    """A directory for images; drives that were added meanwhile are gone afterwards."""
    before = {drive.address for drive in session.machine.drives.list()}
    with tempfile.TemporaryDirectory(prefix="hvhost-verify-") as name:
        try:
            yield Path(name)
        finally:
            with contextlib.suppress(HvHostError):
                for drive in session.machine.drives.list():
                    if drive.address not in before:
                        session.machine.drives.remove(drive.address)


def find(session: Session, probe: Probe, drive: DriveInfo, timeout: float = FIND_SECONDS) -> str:
    """The guest's name of a drive, like ``sda``, by the world-wide name that it shows in sysfs."""
    wanted = f"naa.{drive.wwn}"
    timeout = session.timing.patiently(timeout)
    deadline = time.monotonic() + timeout
    while True:
        names = probe.read_all("/sys/block/*/device/wwid")
        for path, name in names.items():
            if name.strip() == wanted:
                return path.split("/")[3]
        if time.monotonic() > deadline:
            raise RowFailed(
                f"the guest found no unit {wanted} within {timeout:.0f} s",
                [f"it has {sorted(names.values())}", *_kernel_words(probe)],
            )
        time.sleep(session.timing.poll)


def await_gone(session: Session, probe: Probe, name: str, timeout: float = FIND_SECONDS) -> None:
    """Until the guest has no block device *name* any more."""
    timeout = session.timing.patiently(timeout)
    deadline = time.monotonic() + timeout
    while probe.read_all(f"/sys/block/{name}/size"):
        if time.monotonic() > deadline:
            raise RowFailed(
                f"the guest still has {name}, {timeout:.0f} s after it was removed",
                _kernel_words(probe),
            )
        time.sleep(session.timing.poll)


def await_size(session: Session, probe: Probe, name: str, size: int) -> float:
    """Seconds until the guest sees *size* bytes in the block device *name*."""
    started = time.monotonic()
    while (seen := int(probe.read(f"/sys/block/{name}/size")) * 512) != size:
        if time.monotonic() - started > session.timing.patiently(FIND_SECONDS):
            raise RowFailed(f"the guest sees {seen} bytes in {name}, not {size}")
        time.sleep(session.timing.poll)
    return time.monotonic() - started


def _kernel_words(probe: Probe) -> list[str]:
    words = probe.run(["sh", "-c", "dmesg | grep -iE 'scsi|sd |sr |storvsc' | tail -5"], 20.0)
    return words.output.splitlines()


def told_digest(probe: Probe, path: str, timeout: float = 120.0) -> str:
    """The SHA-256 of a file or device, as the guest's own program says."""
    return run(probe, f"sha256sum {path}", timeout).split()[0]


def digest(data: bytes) -> str:
    """SHA-256 on the host."""
    return hashlib.sha256(data).hexdigest()


def require(claim: bool, sentence: str, *evidence: str) -> None:
    """:class:`RowFailed` unless *claim* holds."""
    if not claim:
        raise RowFailed(sentence, evidence)
