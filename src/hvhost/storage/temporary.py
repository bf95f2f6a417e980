"""Drives whose writes vanish with the machine: a differencing image without a name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.paths import cache_dir
from hvhost.storage.disk import ImageDisk
from hvhost.storage.images import ImageFormat, create_disk, differencing_options, format_of


def open_temporary(path: Path, image_format: ImageFormat | None = None) -> ImageDisk:
    """A new child of the image *path*, which is only read, also by several machines at once.

    The child's file has no name any more when this returns, so that its storage is given back at
    the end of the process, whatever that is. Only a VHDX or VHD can be a parent;
    :class:`HvHostError` for others.
    """
    found = format_of(path)
    actual = image_format or found
    if actual is ImageFormat.RAW:
        raise HvHostError(
            f"{path} is raw, so no temporary image can have it as its parent; convert it to a VHDX."
        )
    if actual is not found:
        raise HvHostError(
            f"{path} is taken for a {found} image and not for {actual}; leave the format out, or "
            f"name it *.{actual}."
        )
    with tempfile.TemporaryDirectory(dir=cache_dir("temporary")) as directory:
        child = Path(directory) / f"temporary.{actual.value}"
        return create_disk(child, differencing_options(child, path.resolve()))
