"""Routes of a machine's storage. Drives are named by address, like ``scsi0:1``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hvhost.machine.endpoint import Endpoint
from hvhost.machine.model import LiveMachine
from hvhost.machine.storage_model import DriveConfig, DriveInfo, DriveKind
from hvhost.storage.controller import Storage

Address = Annotated[str, msgspec.Meta(description="controller and LUN, like scsi0:1")]
Rate = Annotated[int, msgspec.Meta(ge=0)]


class DriveAddRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A drive to attach; ``path`` is an absolute one on the host. Limits are per second."""

    path: str | None = None
    kind: DriveKind = DriveKind.DISK
    controller: str = "scsi0"
    lun: int | None = None
    read_only: bool = False
    image_format: str | None = None
    iops: Rate = 0
    bandwidth: Rate = 0
    pause_when_full: bool = False
    temporary: bool = False


class DriveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which drive."""

    address: Address


class DriveInsertRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image for a DVD drive."""

    address: Address
    path: str


class DriveEjectRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``force``: also while the guest holds the medium."""

    address: Address
    force: bool = False


class DriveResizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk's new size in bytes; what is cut off is lost.

    ``shrink`` allows a smaller one, down to the last partition; ``force`` cuts partitions off.
    """

    address: Address
    size: Annotated[int, msgspec.Meta(ge=1)]
    shrink: bool = False
    force: bool = False


class DriveLimitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests and bytes a second; 0 is no limit."""

    address: Address
    iops: Rate = 0
    bandwidth: Rate = 0


def _add(machine: LiveMachine, request: DriveAddRequest) -> DriveInfo:
    return machine.peripheral(Storage).add(
        DriveConfig(
            path=request.path,
            kind=request.kind,
            controller=request.controller,
            lun=request.lun,
            read_only=request.read_only,
            image_format=request.image_format,
            iops=request.iops,
            bandwidth=request.bandwidth,
            pause_when_full=request.pause_when_full,
            temporary=request.temporary,
        )
    )


def _insert(machine: LiveMachine, request: DriveInsertRequest) -> DriveInfo:
    return machine.peripheral(Storage).insert(request.address, request.path)


def _eject(machine: LiveMachine, request: DriveEjectRequest) -> DriveInfo:
    return machine.peripheral(Storage).eject(request.address, force=request.force)


def _resize(machine: LiveMachine, request: DriveResizeRequest) -> DriveInfo:
    return machine.peripheral(Storage).resize(
        request.address, request.size, shrink=request.shrink, force=request.force
    )


def _limit(machine: LiveMachine, request: DriveLimitRequest) -> DriveInfo:
    return machine.peripheral(Storage).limit(request.address, request.iops, request.bandwidth)


ENDPOINTS = (
    Endpoint(
        "GET",
        "/v1/machine/drives",
        "drives",
        "The machine's disks and DVD drives",
        lambda machine, _: machine.peripheral(Storage).drives(),
        result=list[DriveInfo],
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/add",
        "drive_add",
        "Attach a disk or a DVD drive while the machine runs",
        _add,
        DriveAddRequest,
        DriveInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/remove",
        "drive_remove",
        "Detach a drive while the machine runs; how it was",
        lambda machine, request: machine.peripheral(Storage).remove(request.address),
        DriveRequest,
        DriveInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/insert",
        "drive_insert",
        "Put an image into a DVD drive",
        _insert,
        DriveInsertRequest,
        DriveInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/eject",
        "drive_eject",
        "Take the image out of a DVD drive",
        _eject,
        DriveEjectRequest,
        DriveInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/resize",
        "drive_resize",
        "Set a disk's size while the guest uses it",
        _resize,
        DriveResizeRequest,
        DriveInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/drives/limit",
        "drive_limit",
        "Limit a drive's requests and bytes a second",
        _limit,
        DriveLimitRequest,
        DriveInfo,
        family="storage",
    ),
)
