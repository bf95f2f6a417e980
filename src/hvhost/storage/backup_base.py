"""Incremental backups: what an earlier backup holds already, and what is different now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from hvhost.errors import HvHostError
from hvhost.storage.buffers import only_zeros
from hvhost.storage.disk import Disk, ImageDisk

if TYPE_CHECKING:
    from hvhost.storage.block import DiskUnit
    from hvhost.storage.controller import Drive

MANIFEST: Final = "backup.json"
#: Bytes that are compared, and stored if they differ, as one.
GRAIN: Final = 4096


@dataclass(frozen=True, slots=True)
class Base:
    """An earlier backup: its directory, and the file of each disk by address."""

    path: Path
    files: dict[str, Path]


def find_base(directory: Path, machine: str, drives: list[Drive]) -> Base | None:
    """The newest whole backup of *machine* in *directory* that holds at least one of its disks.

    A disk is the same if its place, its identifier and its sizes are.
    """
    for manifest in sorted(directory.glob(f"{machine}-*/{MANIFEST}"), reverse=True):
        try:
            content = json.loads(manifest.read_text())
            if content["machine"]["name"] != machine:
                continue
            files = dict(_same(manifest.parent, content["disks"], drives))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # somebody else's file of that name
        if files:
            return Base(manifest.parent, files)
    return None


def _same(
    path: Path, disks: list[dict[str, Any]], drives: list[Drive]
) -> Iterator[tuple[str, Path]]:
    known = {str(each["address"]): each for each in disks}
    for drive in drives:
        entry = known.get(drive.address)
        if entry is None:
            continue
        disk, file = cast("DiskUnit", drive.unit).disk, path / Path(str(entry["file"])).name
        if (
            entry["size"] == disk.size
            and entry["sector_size"] == disk.logical_sector_size
            and UUID(entry["identifier"]) == disk.identifier
            and file.is_file()
        ):
            yield drive.address, file


def open_base(file: Path) -> ImageDisk:
    """The earlier copy, to be compared with; :class:`HvHostError` if its chain is broken."""
    from hvhost.storage.images import open_disk

    try:
        return open_disk(file, read_only=True)
    except HvHostError as error:
        raise HvHostError(
            f"The earlier backup {file} cannot be built on: {error} Without --incremental the "
            "backup needs no other."
        ) from error


class Difference:
    """Takes a disk's content, all of it once, and stores in *target* what *base* has not.

    *target* is a child of *base*'s file. For one thread at a time.
    """

    def __init__(self, base: ImageDisk, target: Disk) -> None:
        self.base, self.target = base, target
        self.stored = 0
        self._buffer = bytearray()

    def put(self, offset: int, data: memoryview) -> None:
        """The disk has *data* at *offset*."""
        if len(self._buffer) < len(data):
            self._buffer = bytearray(len(data))
        old = memoryview(self._buffer)[: len(data)]
        self.base.readv(offset, [old])
        if old == data:
            return
        start: int | None = None
        for place in range(0, len(data), GRAIN):
            end = place + GRAIN
            differs = old[place:end] != data[place:end]
            if differs and start is None:
                start = place
            elif not differs and start is not None:
                self._store(offset + start, data[start:place])
                start = None
        if start is not None:
            self._store(offset + start, data[start:])

    def put_zeros(self, offset: int, length: int) -> None:
        """The disk has zeros there."""
        step = 1 << 20
        for place in range(offset, offset + length, step):
            count = min(step, offset + length - place)
            if self.base.may_have_data(place, count):
                self.put(place, memoryview(bytes(count)))

    def _store(self, offset: int, data: memoryview) -> None:
        self.target.writev(offset, [data])
        self.stored += len(data)


class Whole:
    """Takes a disk's content and stores it in the empty disk *target*, without its zeros."""

    def __init__(self, target: Disk) -> None:
        self.target = target
        self.stored = 0

    def put(self, offset: int, data: memoryview) -> None:
        """The disk has *data* at *offset*."""
        if not only_zeros(data):
            self.target.writev(offset, [data])
            self.stored += len(data)

    def put_zeros(self, offset: int, length: int) -> None:
        """The disk has zeros there, and so has *target*."""


Keeper = Difference | Whole
