"""A disk as it is at one moment, where the host's file system lets two files share their blocks.

XFS, Btrfs and some others make such a copy at once, whatever its size (``FICLONE``, linux/fs.h).
It has a name beside the image only until it is open, since parents are found by where a child
lies; its storage is given back at the end of the process, whatever that is.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from hvhost.storage.disk import ImageDisk
from hvhost.storage.file import HostFile
from hvhost.storage.images import ImageFormat, open_disk
from hvhost.storage.raw import RawDisk
from hvhost.storage.vhdx import VhdxDisk

log = logging.getLogger(__name__)


class SharedCopy:
    """A second file for what the image of *disk* holds; close it, opened or not."""

    def __init__(self, disk: ImageDisk, file: HostFile) -> None:
        self._disk, self._file = disk, file
        self._descriptor, name = tempfile.mkstemp(
            prefix=f".{file.path.name}-", suffix=file.path.suffix, dir=file.path.parent
        )
        self._path: Path | None = Path(name)

    @classmethod
    def prepare(cls, disk: ImageDisk) -> SharedCopy | None:
        """``None`` where the file system cannot; by the thread that uses the disk.

        What takes time is done here, so that :meth:`take` finds little left.
        """
        file = getattr(disk, "file", None)
        if not isinstance(file, HostFile) or file.is_device:
            return None
        try:
            copy = cls(disk, file)
        except OSError:  # its directory is read-only, or gone
            return None
        try:
            file.share_with(copy._descriptor)
        except OSError:
            copy.close()
            return None
        return copy

    def take(self) -> bool:
        """Hold what the disk holds now; between two of its commands. False if that failed.

        A format may keep in memory a part of what was written, so that is flushed first.
        """
        try:
            self._disk.flush()
            self._file.share_with(self._descriptor)
        except OSError as error:
            log.warning("%s: no copy that shares its blocks: %s", self._file.name, error)
            return False
        return True

    def open(self) -> ImageDisk:
        """The disk as it was when it was taken; for another thread than that of the disk itself.

        :class:`OSError` or :class:`hvhost.errors.HvHostError` if it cannot be read.
        """
        disk, path = self._disk, self._path
        assert path is not None
        if isinstance(disk, RawDisk):
            return RawDisk(path, logical_sector_size=disk.logical_sector_size, locked=False)
        kind = ImageFormat.VHDX if isinstance(disk, VhdxDisk) else ImageFormat.VHD
        return open_disk(path, image_format=kind, locked=False)

    def close(self) -> None:
        """Remove its name; what was opened stays open."""
        if self._path is not None:
            os.close(self._descriptor)
            self._path.unlink(missing_ok=True)
            self._path = None
