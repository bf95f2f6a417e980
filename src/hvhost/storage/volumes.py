"""Which file system of the host a file lies on: what a backup may read from and write to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hvhost.errors import HvHostError

#: Types of file systems whose storage is another computer's.
NETWORK_TYPES: Final = frozenset(
    {
        *("9p", "afs", "ceph", "cifs", "glusterfs", "lustre", "ncpfs"),
        *("nfs", "nfs4", "smb3", "smbfs"),
        *("fuse.ceph", "fuse.curlftpfs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs"),
        *("fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    }
)
_MOUNTS: Final = Path("/proc/self/mountinfo")
_BLOCK_DEVICES: Final = Path("/sys/dev/block")
#: What the kernel's path of a block device has in it if its storage is another computer's.
_NETWORK_DEVICES: Final = {
    "iSCSI": re.compile(r"/session\d+/"),
    "NBD": re.compile(r"/nbd\d+(/|$)"),
    "RBD": re.compile(r"/rbd\d+(/|$)"),
    "NVMe over fabrics": re.compile(r"/nvme-fabrics/"),
    "ATA over Ethernet": re.compile(r"/etherd!"),
}


@dataclass(frozen=True, slots=True)
class Volume:
    """A mounted file system: its device numbers, like ``8:1``, where it is, and its type."""

    device: str
    mount_point: Path
    type: str

    @property
    def remote(self) -> bool:
        """The storage is another computer's."""
        return self.type in NETWORK_TYPES


def read_volumes(text: str) -> list[Volume]:
    """The file systems in a ``mountinfo`` (proc(5)), in its order."""
    found = []
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        # Blanks in names are octal escapes.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        point = point.encode("latin-1", "surrogateescape").decode("utf-8", "surrogateescape")
        found.append(Volume(words[2], Path(point), rest.split(" ")[0]))
    return found


def volumes() -> list[Volume]:
    """The file systems of this process's mounts."""
    return read_volumes(_MOUNTS.read_text(encoding="latin-1"))


def volume_of(path: Path, mounted: Iterable[Volume]) -> Volume:
    """The volume that *path*, which may not be there yet, lies on."""
    place = path.resolve()
    above = [each for each in mounted if place.is_relative_to(each.mount_point)]
    if not above:
        raise HvHostError(f"no mounted file system holds {path}; see /proc/self/mountinfo.")
    deepest = max(len(each.mount_point.parts) for each in above)
    # Of several at one place, the last one hides the others.
    return [each for each in above if len(each.mount_point.parts) == deepest][-1]


def _on_device(volume: Volume, path: Path) -> bool:
    """Whether a volume lies on the block device *path*, or on a partition of it."""
    whole = (_BLOCK_DEVICES / _device_numbers(path)).resolve()
    return (_BLOCK_DEVICES / volume.device).resolve().is_relative_to(whole)


def _device_numbers(path: Path) -> str:
    number = path.stat().st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _network(path: Path, volume: Volume) -> str | None:
    """How the network comes in, if the storage of *path* on *volume* is another computer's."""
    if volume.remote:
        return f"{volume.type} at {volume.mount_point}"
    device = _device_numbers(path) if path.is_block_device() else volume.device
    return _network_device(_BLOCK_DEVICES / device)


def _network_device(link: Path, depth: int = 8) -> str | None:
    """The same for a block device in sysfs, and for those that it is made of."""
    if not depth:
        return None
    place = link.resolve()
    for name, pattern in _NETWORK_DEVICES.items():
        if pattern.search(str(place)):
            return f"{name}, {place.name}"
    # Of a partition, the whole device has them.
    below = [*place.glob("slaves/*"), *place.parent.glob("slaves/*")]
    found = (_network_device(each, depth - 1) for each in sorted(below))
    return next((each for each in found if each is not None), None)


def check_backup(
    sources: Iterable[Path],
    destination: Path,
    mounted: list[Volume],
    *,
    allow_network: bool,
    allow_same_volume: bool,
) -> None:
    """:class:`HvHostError` if disks in *sources* should not be backed up to *destination*."""
    target = volume_of(destination, mounted)
    for source in sources:
        volume = volume_of(source, mounted)
        network = None if allow_network else _network(source, volume)
        if network is not None:
            raise HvHostError(
                f"{source} lies on network storage ({network}), which others may write to and "
                "which may go away during a backup; back it up where it is stored, or use "
                "--allow-network."
            )
        same = volume.device == target.device
        if not same and source.is_block_device():
            same = _on_device(target, source)
        if same and not allow_same_volume:
            raise HvHostError(
                f"{destination} is on the volume of the disk {source} (mounted at "
                f"{target.mount_point}): what destroys the one destroys the backup too; choose "
                "another volume, or use --allow-same-volume."
            )
