"""What the fuzzers of disk formats run: a damaged image in, nothing but an error may come out.

Apart from the other targets: these need no guest.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import cache

from hvhost.errors import HvHostError
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhd_format import DYNAMIC_HEADER_SIZE, DynamicHeader, Footer, packed
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_check import check_vhdx
from hvhost.storage.vhdx_create import (
    BAT_OFFSET,
    LOG_OFFSET,
    METADATA_OFFSET,
    VhdxOptions,
    create_vhdx,
)
from hvhost.storage.vhdx_format import (
    HEADER_OFFSETS,
    HEADER_SIZE,
    METADATA_TABLE_SIZE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    with_checksum,
)
from hvhost.wire import Buffer
from simulated.image_files import MemoryFile

MIB = 1 << 20
LIMIT = 64 * MIB
# Where damage is worth most, in a VHDX and in a VHD.
VHDX_PLACES = (
    *HEADER_OFFSETS,
    *REGION_TABLE_OFFSETS,
    LOG_OFFSET,
    LOG_OFFSET + MIB // 2,
    METADATA_OFFSET,
    METADATA_OFFSET + METADATA_TABLE_SIZE,
    BAT_OFFSET,
    BAT_OFFSET + 4096 * 8,  # the entry of the first sector bitmap
)
VHD_PLACES = (0, 512, 512 + DYNAMIC_HEADER_SIZE)


class SmallFile(MemoryFile):
    """A file on a computer with little storage."""

    def truncate(self, size: int) -> None:
        if size > LIMIT:
            raise OSError(errno.ENOSPC, "no space left")
        super().truncate(size)


@cache
def _vhdx(kind: int) -> bytes:
    """Images to damage: fixed, dynamic, differencing; the last two with their logs in use."""
    file = MemoryFile()
    locator = {"parent_linkage": "x", "relative_path": "y"} if kind == 2 else {}
    create_vhdx(file, VhdxOptions(4 * MIB, fixed=kind == 0, block_size=MIB, locator=locator))
    disk = VhdxDisk(file)
    disk.writev(0, [memoryview(bytes([1]) * 4096)])
    disk.writev(2 * MIB, [memoryview(bytes([1]) * MIB)])
    disk.flush()
    if kind == 0:
        disk.close()
    return bytes(file.content)


@cache
def _vhd(kind: int) -> bytes:
    """The same as VHD."""
    file = MemoryFile()
    parent = VhdParent(bytes(16), ".\\a.vhd", "\\b\\a.vhd") if kind == 2 else None
    create_vhd(file, VhdOptions(4 * MIB, fixed=kind == 0, block_size=MIB, parent=parent))
    disk = VhdDisk(file)
    disk.writev(0, [memoryview(bytes([1]) * 4096)])
    disk.close()
    return bytes(file.content)


def _damaged(content: bytes, places: tuple[int, ...], data: bytes) -> bytearray:
    """Each 3 bytes of *data* say where, and the next one how many bytes to take from there on."""
    damaged = bytearray(content)
    position = 0
    while position + 4 <= len(data):
        place = places[data[position] % len(places)]
        place += int.from_bytes(data[position + 1 : position + 3], "little") % 4096
        count = data[position + 3] % 32
        piece = data[position + 4 : position + 4 + count]
        damaged[place : place + len(piece)] = piece
        position += 4 + count
    return damaged


def fuzz_vhdx(data: Buffer) -> None:
    """*data* as damage to a VHDX; with right checksums half of the time."""
    raw = bytes(data)
    first = raw[0] if raw else 0
    content = _damaged(_vhdx(first % 3), VHDX_PLACES, raw[1:])
    if first & 4:
        for offset in HEADER_OFFSETS:
            _seal(content, offset, HEADER_SIZE)
        for offset in REGION_TABLE_OFFSETS:
            _seal(content, offset, REGION_TABLE_SIZE)
        for offset in (LOG_OFFSET, LOG_OFFSET + MIB // 2):
            length = int.from_bytes(content[offset + 8 : offset + 12], "little")
            if 4096 <= length <= MIB // 2:
                _seal(content, offset, length)
    if first & 8:
        del content[int.from_bytes(raw[1:4], "little") % len(content) :]

    def opened(file: MemoryFile, read_only: bool) -> VhdxDisk:
        disk = VhdxDisk(file, read_only=read_only)
        check_vhdx(disk)
        return disk

    _use(opened, content)


def _seal(content: bytearray, offset: int, size: int) -> None:
    content[offset : offset + size] = with_checksum(bytes(content[offset : offset + size]), size)


def fuzz_vhd(data: Buffer) -> None:
    """*data* as damage to a VHD; with right checksums half of the time."""
    raw = bytes(data)
    first = raw[0] if raw else 0
    kind = first % 3
    original = _vhd(kind)
    places = VHD_PLACES if kind else (len(original) - 512,)
    content = _damaged(original, places, raw[1:])
    if first & 4:
        for offset in (len(original) - 512, 0) if kind else (len(original) - 512,):
            content[offset : offset + 512] = packed(Footer.unpack(content, offset))
        content[512:1536] = packed(DynamicHeader.unpack(content, 512))
    if first & 8:
        del content[int.from_bytes(raw[1:4], "little") % len(content) :]
    _use(lambda file, read_only: VhdDisk(file, read_only=read_only), content)


def _use(opened: Callable[[MemoryFile, bool], VhdxDisk | VhdDisk], content: bytearray) -> None:
    for read_only in (True, False):
        file = SmallFile(content)
        try:
            disk = opened(file, read_only)
            end = disk.size - disk.logical_sector_size
            buffer = memoryview(bytearray(disk.logical_sector_size))
            disk.readv(0, [buffer])
            disk.readv(end, [buffer])
            assert disk.may_have_data(0, 4096) in (True, False)
            if not read_only:
                disk.writev(end, [buffer])
                disk.unmap(0, disk.logical_sector_size)
                disk.resize(8 * MIB)
            disk.close()
        except (HvHostError, OSError):
            pass
        if read_only:
            assert file.content == content
