"""Image files by their paths: which format, opening with all parents, making new ones.

The format is known by the file's name where that ends in a format's suffix. Only names that say
nothing are looked into, and then a file is raw only if it is told to be: a guest decides what is in
its raw disk, and could make it look like an image that names files of the host as its parents.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from hvhost.errors import DiskError, HvHostError
from hvhost.storage.disk import ImageDisk
from hvhost.storage.file import HostFile, read_exactly
from hvhost.storage.foreign import foreign_format
from hvhost.storage.raw import RawDisk
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhd_format import FOOTER_COOKIE, FOOTER_SIZE
from hvhost.storage.vhd_parent import parent_paths
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from hvhost.storage.vhdx_format import FILE_IDENTIFIER_SIGNATURE

MAXIMUM_CHAIN = 64


class ImageFormat(StrEnum):
    """Formats of image files."""

    VHDX = "vhdx"
    VHD = "vhd"
    RAW = "raw"


_SUFFIXES = {
    ".vhdx": ImageFormat.VHDX,
    ".avhdx": ImageFormat.VHDX,
    ".vhd": ImageFormat.VHD,
    ".avhd": ImageFormat.VHD,
    ".raw": ImageFormat.RAW,
    ".img": ImageFormat.RAW,
    ".iso": ImageFormat.RAW,
}


def format_of(path: Path) -> ImageFormat:
    """The format of an existing image or block device; :class:`HvHostError` if nobody can know."""
    if path.is_block_device():
        return ImageFormat.RAW
    by_name = _SUFFIXES.get(path.suffix.lower())
    if by_name is not None:
        return by_name
    file = HostFile(path, read_only=True, locked=False)
    try:
        start = bytes(read_exactly(file, 0, 8)) if file.size() >= FOOTER_SIZE else b""
        end = bytes(read_exactly(file, file.size() - FOOTER_SIZE, 8)) if start else b""
    finally:
        file.close()
    if start == FILE_IDENTIFIER_SIGNATURE:
        return ImageFormat.VHDX
    if FOOTER_COOKIE in (start, end):
        return ImageFormat.VHD
    other = foreign_format(path)
    if other is not None:
        raise HvHostError(
            f"{path} is a {other} image; make a VHDX of it with `hvhost disk convert {path} "
            "NEW.vhdx`, or run a machine with it as it is by adding ,temporary."
        )
    raise HvHostError(
        f"{path} may be a raw image, but nothing says so; name the format (raw), or name the file "
        "*.img."
    )


def format_for(path: Path) -> ImageFormat:
    """The format that a new file's name asks for."""
    by_name = _SUFFIXES.get(path.suffix.lower())
    if by_name is None:
        raise HvHostError(f"{path} does not say its format; name it *.vhdx, *.vhd or *.img.")
    return by_name


def open_disk(
    path: Path,
    *,
    read_only: bool = False,
    image_format: ImageFormat | None = None,
    locked: bool = True,
) -> ImageDisk:
    """Open an image with all its parents, which are open for reading then.

    :class:`DiskError` for a damaged one, :class:`HvHostError` if it or a parent is in use,
    :class:`OSError` as the host says.
    """
    return _open(path, image_format or format_of(path), (), read_only=read_only, locked=locked)


def _open(
    path: Path,
    image_format: ImageFormat,
    children: tuple[tuple[int, int], ...],
    *,
    read_only: bool,
    locked: bool,
) -> ImageDisk:
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    if key in children:
        raise DiskError(f"{path} is, in the end, its own parent; the chain is damaged.")
    if len(children) >= MAXIMUM_CHAIN:
        raise DiskError(f"{path} is the parent of more than {MAXIMUM_CHAIN} images; merge some.")
    if image_format is ImageFormat.RAW:
        return RawDisk(path, read_only=read_only, locked=locked)
    disk = open_single(path, image_format, read_only=read_only, locked=locked)
    try:
        if has_parent(disk):
            above = find_parent(disk, path)
            chain = (*children, key)
            parent = _open(above, image_format, chain, read_only=True, locked=locked)
            disk.attach(parent)
            check_parent(disk, parent)
    except BaseException:
        disk.close()
        raise
    return disk


def open_single(
    path: Path, image_format: ImageFormat, *, read_only: bool, locked: bool = True
) -> VhdxDisk | VhdDisk:
    """A VHDX or VHD without its parents: only what is its own can be read."""
    file = HostFile(path, read_only=read_only, locked=locked)
    try:
        if image_format is ImageFormat.VHDX:
            return VhdxDisk(file, read_only=read_only)
        return VhdDisk(file, read_only=read_only)
    except BaseException:
        file.close()
        raise


def has_parent(disk: VhdxDisk | VhdDisk) -> bool:
    """Whether it is a differencing disk."""
    return disk.layout.has_parent if isinstance(disk, VhdxDisk) else disk.has_parent


def find_parent(disk: VhdxDisk | VhdDisk, path: Path) -> Path:
    """The file of the parent: where the image says, or of that name beside it."""
    if isinstance(disk, VhdxDisk):
        locator = disk.layout.locator
        named = [locator.get(key, "") for key in ("relative_path", "absolute_win32_path")]
    else:
        named = parent_paths(disk)
    named = [each for each in named if each and "\0" not in each]
    candidates = [path.parent / each.replace("\\", "/") for each in named]
    candidates += [path.parent / each.replace("\\", "/").rpartition("/")[2] for each in named]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = named[0] if named else "of no name"
    raise DiskError(f"{path} needs its parent {wanted}, which is not there; bring it back.")


def linkages(disk: VhdxDisk) -> list[UUID]:
    """What the data of the parent may be known by, [MS-VHDX] 2.6.2.6.3."""
    found = []
    for key in ("parent_linkage", "parent_linkage2"):
        try:
            found.append(UUID(disk.layout.locator.get(key, "")))
        except ValueError:
            continue
    return found


def check_parent(disk: VhdxDisk | VhdDisk, parent: ImageDisk | None) -> None:
    """:class:`DiskError` if *parent* is not the one, or has changed since."""
    if isinstance(disk, VhdxDisk) and isinstance(parent, VhdxDisk):
        if parent.journal.header.data_write_guid in linkages(disk):
            return
    elif (
        isinstance(disk, VhdDisk)
        and isinstance(parent, VhdDisk)
        and disk.header is not None
        and disk.header.parent_unique_id == parent.footer.unique_id
    ):
        return
    name = parent.file.name if isinstance(parent, VhdxDisk | VhdDisk) else "what it names"
    raise DiskError(
        f"{disk.file.name} does not fit its parent {name}, which is another or has changed since; "
        "restore the parent as it was."
    )


def create_disk(path: Path, options: VhdxOptions | VhdOptions | int) -> ImageDisk:
    """A new image, open; a number is the size of a raw one.

    :class:`FileExistsError` if there is a file already.
    """
    if isinstance(options, int):
        return RawDisk.create(path, options)
    options.check()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
    os.close(descriptor)
    try:
        file = HostFile(path, read_only=False)
        try:
            if isinstance(options, VhdxOptions):
                create_vhdx(file, options)
                differs = bool(options.locator)
            else:
                create_vhd(file, options)
                differs = options.parent is not None
        finally:
            file.close()
        image_format = ImageFormat.VHDX if isinstance(options, VhdxOptions) else ImageFormat.VHD
        if differs:
            return _open(path, image_format, (), read_only=False, locked=True)
        return open_single(path, image_format, read_only=False)
    except BaseException:
        path.unlink()
        raise


def differencing_options(
    path: Path, parent_path: Path, *, same_disk: bool = False
) -> VhdxOptions | VhdOptions:
    """What a new image at *path* must be to hold only the difference to *parent_path*.

    With *same_disk* a guest takes it for the parent: for a checkpoint of a disk in use. A VHD's
    identifier is also what children know their parent by, so it cannot be another's.
    """
    image_format = format_of(parent_path)
    parent = open_disk(parent_path, read_only=True, image_format=image_format)
    try:
        relative = ".\\" + os.path.relpath(parent_path, path.parent).replace("/", "\\")
        absolute = str(parent_path.resolve()).replace("/", "\\")
        if "\\" in parent_path.name:
            raise HvHostError(f"{parent_path} has a backslash in its name; rename it first.")
        if isinstance(parent, VhdxDisk):
            # Both keys are there from the start: a merge changes them in place.
            return VhdxOptions(
                parent.size,
                block_size=2 << 20,
                logical_sector_size=parent.logical_sector_size,
                physical_sector_size=parent.physical_sector_size,
                identifier=parent.identifier if same_disk else None,
                locator={
                    "parent_linkage": f"{{{parent.journal.header.data_write_guid}}}",
                    "parent_linkage2": f"{{{UUID(int=0)}}}",
                    "relative_path": relative,
                    "absolute_win32_path": absolute,
                },
            )
        if isinstance(parent, VhdDisk) and not same_disk:
            return VhdOptions(
                parent.size, parent=VhdParent(parent.footer.unique_id, relative, absolute)
            )
    finally:
        parent.close()
    if same_disk:
        raise HvHostError(f"{parent_path} is no VHDX, so it has no checkpoints; convert it first.")
    raise HvHostError(
        f"{parent_path} is raw, and only VHDX and VHD images can be parents; convert it first."
    )
