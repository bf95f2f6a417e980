"""What ``hvhost disk`` does with image files that no machine uses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from hvhost.errors import HvHostError
from hvhost.storage.buffers import only_zeros
from hvhost.storage.disk import Disk, ImageDisk, Progress
from hvhost.storage.foreign import convert_foreign, foreign_format
from hvhost.storage.images import (
    ImageFormat,
    check_parent,
    create_disk,
    differencing_options,
    find_parent,
    format_for,
    format_of,
    has_parent,
    linkages,
    open_disk,
    open_single,
)
from hvhost.storage.lock import holder_of
from hvhost.storage.partitions import end_of_partitions
from hvhost.storage.raw import RawDisk
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions
from hvhost.storage.vhd_format import DEFAULT_BLOCK_SIZE as VHD_BLOCK_SIZE
from hvhost.storage.vhd_format import DiskType
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_check import CheckReport, check_vhdx
from hvhost.storage.vhdx_compact import compact as compact_vhdx
from hvhost.storage.vhdx_create import DEFAULT_BLOCK_SIZE as VHDX_BLOCK_SIZE
from hvhost.storage.vhdx_create import VhdxOptions
from hvhost.storage.vhdx_format import PARENT_LOCATOR
from hvhost.storage.vhdx_layout import make_locator
from hvhost.storage.vhdx_resize import set_item
from hvhost.units import format_size

STEP = 1 << 20
_STRIDE = 256 << 20


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """An image file; sizes are bytes."""

    file: str
    format: str
    type: str
    size: int
    logical_sector_size: int
    physical_sector_size: int
    block_size: int | None
    identifier: str
    allocated: int
    parent: str | None
    in_use_by: int | None


@dataclass(frozen=True, slots=True)
class NewImage:
    """What a new image is to be, whatever its format; None: as the format has it."""

    fixed: bool = False
    block_size: int | None = None
    logical_sector_size: int = 512
    physical_sector_size: int = 4096

    def options(self, path: Path, size: int) -> VhdxOptions | VhdOptions | int:
        """For an image at *path*; :class:`HvHostError` for what its format cannot be."""
        match format_for(path):
            case ImageFormat.VHDX:
                return VhdxOptions(
                    size,
                    fixed=self.fixed,
                    block_size=self.block_size or VHDX_BLOCK_SIZE,
                    logical_sector_size=self.logical_sector_size,
                    physical_sector_size=self.physical_sector_size,
                )
            case ImageFormat.VHD:
                self._only_512(path)
                return VhdOptions(
                    size, fixed=self.fixed, block_size=self.block_size or VHD_BLOCK_SIZE
                )
            case ImageFormat.RAW:
                self._only_512(path)
                if self.fixed or self.block_size is not None:
                    raise HvHostError(
                        f"{path} is raw, which has no blocks and no kinds; make it a VHDX."
                    )
                return size

    def _only_512(self, path: Path) -> None:
        if self.logical_sector_size != 512:
            raise HvHostError(f"{path} can only have sectors of 512 bytes; make it a VHDX.")


def create(path: Path, size: int, new: NewImage) -> DiskInfo:
    """Make a new, empty image."""
    create_disk(path, new.options(path, size)).close()
    return info(path)


def create_differencing(path: Path, parent: Path) -> DiskInfo:
    """Make a new image that holds only the difference to *parent*."""
    if format_for(path) is not format_of(parent):
        raise HvHostError(f"{path} must be of its parent's format; name it *{parent.suffix}.")
    create_disk(path, differencing_options(path, parent)).close()
    return info(path)


def info(path: Path, image_format: ImageFormat | None = None) -> DiskInfo:
    """What the image says of itself; also of one that is in use."""
    image_format = image_format or format_of(path)
    holder = holder_of(path)
    disk: VhdxDisk | VhdDisk | RawDisk
    if image_format is ImageFormat.RAW:
        disk = RawDisk(path, read_only=True, locked=False)
    else:
        disk = open_single(path, image_format, read_only=True, locked=False)
    try:
        parent: str | None = None
        if not isinstance(disk, RawDisk) and has_parent(disk):
            parent = str(find_parent(disk, path))
        return DiskInfo(
            file=str(path),
            format=image_format.value,
            type=_type(disk),
            size=disk.size,
            logical_sector_size=disk.logical_sector_size,
            physical_sector_size=disk.physical_sector_size,
            block_size=_block_size(disk),
            identifier=str(disk.identifier),
            allocated=disk.allocated,
            parent=parent,
            in_use_by=holder,
        )
    finally:
        disk.close()


def _type(disk: VhdxDisk | VhdDisk | RawDisk) -> str:
    if isinstance(disk, RawDisk):
        return "raw"
    if isinstance(disk, VhdDisk):
        return DiskType(disk.footer.disk_type).name.lower()
    if disk.layout.has_parent:
        return "differencing"
    return "fixed" if disk.layout.leave_block_allocated else "dynamic"


def _block_size(disk: VhdxDisk | VhdDisk | RawDisk) -> int | None:
    if isinstance(disk, VhdxDisk):
        return disk.layout.block_size
    if isinstance(disk, VhdDisk) and disk.header is not None:
        return disk.header.block_size
    return None


def check(path: Path, image_format: ImageFormat | None = None) -> CheckReport:
    """Check an image and that it fits its parents; what cannot be opened is an error found."""
    image_format = image_format or format_of(path)
    try:
        disk = open_disk(path, read_only=True, image_format=image_format)
    except HvHostError as error:
        return CheckReport(str(path), image_format.value, errors=[str(error)])
    try:
        if isinstance(disk, VhdxDisk):
            return check_vhdx(disk)
        return CheckReport(str(path), image_format.value)
    finally:
        disk.close()


def resize(
    path: Path, size: int, *, image_format: ImageFormat | None = None, force: bool = False
) -> DiskInfo:
    """Grow or shrink an image; below its last partition only with *force*."""
    disk = open_disk(path, image_format=image_format)
    try:
        needed = end_of_partitions(disk) if size < disk.size else 0
        if size < needed and not force:
            raise HvHostError(
                f"{path} has partitions up to {format_size(needed)} ({needed} bytes); shrink those "
                "first, or cut them off with --force."
            )
        disk.resize(size)
    finally:
        disk.close()
    return info(path, image_format)


def convert(
    source: Path,
    destination: Path,
    new: NewImage,
    progress: Progress,
    *,
    image_format: ImageFormat | None = None,
) -> DiskInfo:
    """Copy a disk, parents and all, into a new image, whose name says its format.

    ``qemu-img`` helps with images of other formats than ours.
    """
    foreign = None if image_format is not None else foreign_format(source)
    if foreign is not None:
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".incoming-") as directory:
            middle = Path(directory) / "middle.vhdx"
            convert_foreign(source, foreign, middle)
            return convert(middle, destination, new, progress)
    disk = open_disk(source, read_only=True, image_format=image_format)
    try:
        copy = create_disk(destination, new.options(destination, disk.size))
        try:
            copy_data(disk, copy, progress)
            copy.close()
        except BaseException:
            destination.unlink()
            raise
        finally:
            copy.close()
    finally:
        disk.close()
    return info(destination)


def copy_data(source: ImageDisk, destination: Disk, progress: Progress) -> None:
    """Copy what is not zeros to a new disk."""
    buffer = bytearray(STEP)
    for offset, length in _data(source):
        progress(offset, source.size)
        view = memoryview(buffer)[:length]
        source.readv(offset, [view])
        if not only_zeros(view):
            destination.writev(offset, [view])
    progress(source.size, source.size)


def _data(disk: ImageDisk) -> Iterator[tuple[int, int]]:
    """Offset and length of each step of the disk that may have data."""
    for stride in range(0, disk.size, _STRIDE):
        length = min(_STRIDE, disk.size - stride)
        if disk.may_have_data(stride, length):
            for offset in range(stride, stride + length, STEP):
                step = min(STEP, stride + length - offset)
                if disk.may_have_data(offset, step):
                    yield offset, step


def compact(path: Path, progress: Progress, *, image_format: ImageFormat | None = None) -> DiskInfo:
    """Make a VHDX file as short as what it holds."""
    disk = open_disk(path, image_format=image_format)
    try:
        if not isinstance(disk, VhdxDisk):
            raise HvHostError(f"{path} is no VHDX; convert it to one, which leaves zeros out.")
        compact_vhdx(disk, progress)
    finally:
        disk.close()
    return info(path, image_format)


def merge(child_path: Path, progress: Progress, *, keep: bool = False) -> DiskInfo:
    """Write the difference into its parent, which becomes what the child was; the child goes.

    It can be cut off at any time, and done again: until it is finished, the child stays as it is.
    Other children of that parent no longer fit it, and say so.
    """
    child = open_single(child_path, format_of(child_path), read_only=False)
    try:
        if not has_parent(child):
            raise HvHostError(f"{child_path} has no parent; there is nothing to merge.")
        parent_path = find_parent(child, child_path)
        parent = open_disk(parent_path, image_format=format_of(child_path))
        try:
            check_parent(child, parent)
            if isinstance(child, VhdxDisk) and isinstance(parent, VhdxDisk):
                _announce(child, parent)
            _write_over(child, parent, progress)
        finally:
            parent.close()
    finally:
        child.close()
    if not keep:
        child_path.unlink()
    return info(parent_path)


def _announce(child: VhdxDisk, parent: VhdxDisk) -> None:
    """Have the child know the parent by the name it has now, and by the one it is about to get."""
    now, then = parent.journal.header.data_write_guid, uuid4()
    assert now in linkages(child)
    locator = {
        **child.layout.locator,
        "parent_linkage": _braced(now),
        "parent_linkage2": _braced(then),
    }
    set_item(child, PARENT_LOCATOR, make_locator(locator))
    parent.next_guid = then
    parent.begin()


def _braced(guid: UUID) -> str:
    return f"{{{guid}}}"


def _write_over(child: VhdxDisk | VhdDisk, parent: ImageDisk, progress: Progress) -> None:
    if parent.size < child.size:
        parent.resize(child.size)
    buffer = bytearray(STEP)
    for start, length, has_data in child.own_ranges():
        if not has_data:
            parent.unmap(start, length)
            continue
        for offset in range(start, start + length, STEP):
            progress(offset, child.size)
            view = memoryview(buffer)[: min(STEP, start + length - offset)]
            child.readv(offset, [view])
            parent.writev(offset, [view])
    if parent.size > child.size:
        parent.resize(child.size)
    parent.flush()
    progress(child.size, child.size)
