"""A machine's storage for people and programs: from words to configuration, and its client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.model import MachineConfig
from hvhost.machine.storage_model import DriveConfig, DriveInfo, DriveKind, FibreChannelConfig
from hvhost.manager.client import MachineClient
from hvhost.manager.launcher import check_images
from hvhost.units import parse_size

RESIZE_SECONDS = 600.0
"""How long a change of size may take: a fixed disk is written out."""


def parse_drive(text: str, kind: DriveKind) -> DriveConfig:
    """What ``FILE[,controller=scsi0][,lun=N][,readonly][,iops=N][,bandwidth=SIZE]``
    ``[,format=raw][,full=pause][,temporary]`` means; a DVD drive without FILE is empty.
    """
    file, *options = text.split(",")
    drive = DriveConfig(path=str(Path(file).absolute()) if file else None, kind=kind)
    if not file and kind is DriveKind.DISK:
        raise HvHostError("a disk needs an image file; write it like disk.vhdx,lun=1.")
    for option in options:
        drive = _with_option(drive, option)
    return drive


def _with_option(drive: DriveConfig, option: str) -> DriveConfig:
    key, _, value = option.partition("=")
    match key:
        case "controller":
            return replace(drive, controller=value)
        case "lun":
            return replace(drive, lun=_number(key, value))
        case "iops":
            return replace(drive, iops=_number(key, value))
        case "bandwidth":
            return replace(drive, bandwidth=parse_size(value, what="bandwidth"))
        case "format":
            return replace(drive, image_format=value)
        case "readonly" if not value:
            return replace(drive, read_only=True)
        case "temporary" if not value:
            return replace(drive, temporary=True)
        case "full" if value in ("pause", "fail"):
            return replace(drive, pause_when_full=value == "pause")
    raise HvHostError(
        f"{option!r} is no option of a drive; there are controller=, lun=, readonly, temporary, "
        "iops=, bandwidth=, format=, full=pause."
    )


def _number(key: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise HvHostError(f"{key}={value} is no number; write it like {key}=1.")
    return int(value)


def parse_adapter(text: str, machine: str, number: int) -> FibreChannelConfig:
    """Names of a fibre channel adapter: ``PORT:NODE`` of 16 digits each, or ``auto``."""
    from hvhost.storage.names import default_names

    if text == "auto":
        return default_names(machine, number)
    port, _, node = text.lower().removeprefix("0x").partition(":")
    names = FibreChannelConfig(port, node.removeprefix("0x"))
    names.check()
    return names


def _ours(drive: DriveConfig, progress: Callable[[str], None]) -> DriveConfig:
    """*drive*, or one with a VHDX in place of an image of another format."""
    from hvhost.storage.foreign import foreign_format, prepare_foreign

    if not drive.temporary or drive.path is None or drive.image_format is not None:
        return drive
    kind = foreign_format(Path(drive.path))
    if kind is None:
        return drive
    return replace(drive, path=str(prepare_foreign(Path(drive.path), kind, progress)))


def check_storage(disks: Sequence[str], dvds: Sequence[str], adapters: Sequence[str]) -> None:
    """Refuse what :func:`with_storage` and the machine would, before what takes time is done."""
    check_images([parse_drive(each, DriveKind.DISK) for each in disks])
    check_images([parse_drive(each, DriveKind.DVD) for each in dvds])
    for number, each in enumerate(adapters):
        parse_adapter(each, "", number)


def with_storage(
    config: MachineConfig,
    disks: Sequence[str] = (),
    dvds: Sequence[str] = (),
    adapters: Sequence[str] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> MachineConfig:
    """*config* with drives and fibre channel adapters as people write them.

    A temporary disk may be an image that ``qemu-img`` makes a VHDX of, which can take a while.
    """
    drives = [parse_drive(each, DriveKind.DISK) for each in disks]
    drives = [_ours(each, progress) for each in drives]
    drives += [parse_drive(each, DriveKind.DVD) for each in dvds]
    names = [parse_adapter(each, config.name, number) for number, each in enumerate(adapters)]
    return replace(
        config,
        drives=(*config.drives, *drives),
        fibre_channel=(*config.fibre_channel, *names),
    )


@dataclass(frozen=True, slots=True)
class DriveClient:
    """The drives of a running machine, by addresses like ``scsi0:1``.

    Every method raises :class:`HvHostError` with a sentence.
    """

    machine: MachineClient

    def list(self) -> list[DriveInfo]:
        """All drives."""
        return self.machine.ask("GET", "/v1/machine/drives", list[DriveInfo])

    def add(self, drive: DriveConfig) -> DriveInfo:
        """Attach a drive; the guest is told at once."""
        return self._do("add", **asdict(drive))

    def remove(self, address: str) -> DriveInfo:
        """Detach a drive; its image is free when this returns."""
        return self._do("remove", address=address)

    def insert(self, address: str, path: Path) -> DriveInfo:
        """Put an image into a DVD drive."""
        return self._do("insert", address=address, path=str(path.absolute()))

    def eject(self, address: str, *, force: bool = False) -> DriveInfo:
        """Take the image out of a DVD drive."""
        return self._do("eject", address=address, force=force)

    def resize(
        self, address: str, size: int, *, shrink: bool = False, force: bool = False
    ) -> DriveInfo:
        """Set a disk's size in bytes; by *force* also below the end of its partitions."""
        return self._do("resize", address=address, size=size, shrink=shrink, force=force)

    def limit(self, address: str, *, iops: int = 0, bandwidth: int = 0) -> DriveInfo:
        """Limit a drive to so many requests and bytes a second; 0 is no limit."""
        return self._do("limit", address=address, iops=iops, bandwidth=bandwidth)

    def _do(self, verb: str, **body: object) -> DriveInfo:
        return self.machine.ask(
            "POST", f"/v1/machine/drives/{verb}", DriveInfo, body, RESIZE_SECONDS
        )
