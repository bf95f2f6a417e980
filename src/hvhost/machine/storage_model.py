"""What storage a machine is told to have, and what it says of it: plain data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from hvhost.errors import HvHostError

#: Drives of one controller.
DRIVES_PER_CONTROLLER = 64
_WORLD_WIDE_NAME = re.compile(r"[0-9a-f]{16}")


class DriveKind(StrEnum):
    """A disk, or a DVD drive that takes ISO images."""

    DISK = "disk"
    DVD = "dvd"


@dataclass(frozen=True, slots=True)
class DriveConfig:
    """A drive to attach; ``path`` is absolute, ``None`` for a DVD drive without a medium.

    ``controller`` is ``scsi0``, ``scsi1``… or ``fc0``…; without a ``lun`` the next free one is
    taken. ``image_format`` is ``vhdx``, ``vhd`` or ``raw`` where the file's name does not say it.
    Limits are requests and bytes a second, 0 for none. ``pause_when_full``: when the host's
    file system is full, the guest's writes wait for room instead of failing. ``temporary``: what
    the guest writes is gone when the drive is, and the image is only read.
    """

    path: str | None
    kind: DriveKind = DriveKind.DISK
    controller: str = "scsi0"
    lun: int | None = None
    read_only: bool = False
    image_format: str | None = None
    iops: int = 0
    bandwidth: int = 0
    pause_when_full: bool = False
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class FibreChannelConfig:
    """A fibre channel adapter's names on its fabric, 16 hexadecimal digits each."""

    port_name: str
    node_name: str

    def check(self) -> None:
        """:class:`HvHostError` unless both are such names."""
        for name in (self.port_name, self.node_name):
            if not _WORLD_WIDE_NAME.fullmatch(name):
                raise HvHostError(
                    f"{name!r} is no world-wide name; write it like c003ff0123456789, 16 digits."
                )


@dataclass(frozen=True, slots=True)
class DriveInfo:
    """A drive of a running machine; sizes in bytes, those of the medium.

    ``address`` is controller and LUN, like ``scsi0:1``. ``wwn`` is the unit's world-wide name as
    the guest sees it. ``allocated`` is what the image takes on the host. ``waiting``: writes wait
    for room on the host. ``adapter`` is the fibre channel adapter it is behind.
    """

    address: str
    kind: DriveKind
    path: str | None
    wwn: str
    size: int = 0
    allocated: int = 0
    read_only: bool = False
    iops: int = 0
    bandwidth: int = 0
    locked: bool = False
    waiting: bool = False
    adapter: FibreChannelConfig | None = None
