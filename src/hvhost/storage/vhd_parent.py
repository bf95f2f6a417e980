"""How a differencing VHD names its parent."""

from __future__ import annotations

from hvhost.storage.file import read_exactly
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_format import ABSOLUTE_PATH, LOCATORS, RELATIVE_PATH, ParentLocator

_MAXIMUM_PATH = 65536


def parent_paths(disk: VhdDisk) -> list[str]:
    """Paths as Windows writes them: the relative one, the absolute one, the plain name."""
    if disk.header is None:
        return []
    found: dict[bytes, str] = {}
    for number in range(LOCATORS):
        place = number * ParentLocator.wire_size()
        locator = ParentLocator.unpack(disk.header.locators, place)
        end = locator.platform_data_offset + locator.platform_data_length
        if locator.platform_data_length <= _MAXIMUM_PATH and end <= disk.file.size():
            data = read_exactly(
                disk.file, locator.platform_data_offset, locator.platform_data_length
            )
            found.setdefault(locator.platform_code, data.decode("utf-16-le", "replace"))
    name = disk.header.parent_unicode_name.decode("utf-16-be", "replace").partition("\0")[0]
    return [found.get(RELATIVE_PATH, ""), found.get(ABSOLUTE_PATH, ""), name]
