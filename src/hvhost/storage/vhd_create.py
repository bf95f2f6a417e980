"""New VHD files."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID, uuid4

from hvhost.errors import HvHostError
from hvhost.storage.file import ImageFile, write_all
from hvhost.storage.vhd_format import (
    ABSOLUTE_PATH,
    CREATOR_APPLICATION,
    CREATOR_HOST_OS,
    CREATOR_VERSION,
    DEFAULT_BLOCK_SIZE,
    DYNAMIC_COOKIE,
    DYNAMIC_HEADER_SIZE,
    EPOCH,
    FOOTER_COOKIE,
    FOOTER_SIZE,
    MAXIMUM_BLOCK_SIZE,
    MAXIMUM_SIZE,
    NO_OFFSET,
    RELATIVE_PATH,
    SECTOR,
    UNUSED_BLOCK,
    VERSION,
    DiskType,
    DynamicHeader,
    Footer,
    ParentLocator,
    geometry,
    packed,
)

_LOCATOR_SPACE = 2048


@dataclass(frozen=True, slots=True)
class VhdParent:
    """What a differencing VHD knows of its parent; paths as Windows writes them."""

    unique_id: bytes
    relative_path: str
    absolute_path: str


@dataclass(frozen=True, slots=True)
class VhdOptions:
    """What a new VHD is to be. Sizes are bytes."""

    size: int
    fixed: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    parent: VhdParent | None = None

    def check(self) -> None:
        """:class:`HvHostError` for what no VHD can be."""
        block = self.block_size
        if not 0 < self.size <= MAXIMUM_SIZE or self.size % SECTOR:
            raise HvHostError(
                f"a VHD of {self.size} bytes cannot be; name a multiple of 512 up to 2040G, "
                "or make it a VHDX."
            )
        if not SECTOR * 8 <= block <= MAXIMUM_BLOCK_SIZE or block & (block - 1):
            raise HvHostError(
                f"a block of {block} bytes cannot be; name a power of two up to 256M."
            )


def create_vhd(file: ImageFile, options: VhdOptions, new_guid: Callable[[], UUID] = uuid4) -> None:
    """Make the empty *file* a VHD; it is on stable storage when this returns."""
    options.check()
    kind = DiskType.DYNAMIC
    if options.parent is not None:
        kind = DiskType.DIFFERENCING
    elif options.fixed:
        kind = DiskType.FIXED
    cylinders, heads, sectors = geometry(options.size)
    footer = packed(
        Footer(
            cookie=FOOTER_COOKIE,
            features=2,  # a bit that is always set
            version=VERSION,
            data_offset=NO_OFFSET if kind is DiskType.FIXED else FOOTER_SIZE,
            timestamp=max(0, int(time.time()) - EPOCH),
            creator_application=CREATOR_APPLICATION,
            creator_version=CREATOR_VERSION,
            creator_host_os=CREATOR_HOST_OS,
            original_size=options.size,
            current_size=options.size,
            cylinders=cylinders,
            heads=heads,
            sectors_per_track=sectors,
            disk_type=kind,
            checksum=0,
            unique_id=new_guid().bytes,
        )
    )
    if kind is DiskType.FIXED:
        file.reserve(0, options.size)
        write_all(file, options.size, footer)
        file.flush()
        return
    table_offset = FOOTER_SIZE + DYNAMIC_HEADER_SIZE
    entries = -(-options.size // options.block_size)
    table_size = -(-4 * entries // SECTOR) * SECTOR
    locators_at = table_offset + table_size
    names, locators, unicode_name = _locators(options.parent, locators_at)
    header = DynamicHeader(
        cookie=DYNAMIC_COOKIE,
        data_offset=NO_OFFSET,
        table_offset=table_offset,
        header_version=VERSION,
        maximum_table_entries=entries,
        block_size=options.block_size,
        checksum=0,
        parent_unique_id=options.parent.unique_id if options.parent is not None else bytes(16),
        parent_unicode_name=unicode_name,
        locators=locators,
    )
    table = array("I", [UNUSED_BLOCK]) * (table_size // 4)
    write_all(file, FOOTER_SIZE, packed(header))
    write_all(file, table_offset, table.tobytes() + names)
    write_all(file, locators_at + len(names), footer)
    write_all(file, 0, footer)
    file.flush()


def _locators(parent: VhdParent | None, place: int) -> tuple[bytes, bytes, bytes]:
    """Paths to write at *place*, the locators that name them, and the parent's plain name."""
    if parent is None:
        return b"", bytes(192), bytes(512)
    paths, locators = b"", b""
    for code, path in (
        (RELATIVE_PATH, parent.relative_path),
        (ABSOLUTE_PATH, parent.absolute_path),
    ):
        data = path.encode("utf-16-le")
        if len(data) > _LOCATOR_SPACE:
            raise HvHostError(f"{path} is too long a path for a VHD; shorten it.")
        # Programs disagree whether the space is in sectors or bytes: Windows writes bytes.
        locators += ParentLocator(code, _LOCATOR_SPACE, len(data), 0, place + len(paths)).pack()
        paths += data.ljust(_LOCATOR_SPACE, b"\0")
    name = parent.relative_path.rpartition("\\")[2].encode("utf-16-be")[:510]
    return paths, locators.ljust(192, b"\0"), name.ljust(512, b"\0")
