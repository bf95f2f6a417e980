"""What a guest carries to be measured beside QEMU: programs of this computer, virtio drivers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests import cpio
from hvhost.guests.build import GuestImages
from hvhost.rig.image import module_entries


def program(name: str) -> list[cpio.Entry]:
    """This computer's program of the package *name*, with its libraries, for ``/bench``."""
    path = shutil.which(name)
    if path is None:
        raise HvHostError(f"{name} is not on this computer; run `apt-get install {name}`.")
    listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    return [
        cpio.file(f"bench/{Path(each).name}", Path(each).read_bytes(), 0o755)
        for each in (path, *re.findall(r"(/\S+) \(0x", listed))
    ]


def write_initrd(
    images: GuestImages, path: Path, drivers: Iterable[str], entries: Iterable[cpio.Entry]
) -> None:
    """The guest's own initramfs, and behind it *entries* and the virtio *drivers*."""
    if images.modules is None:
        raise HvHostError("the guest's modules are not at hand.")
    modules = module_entries(images.modules, dict.fromkeys(drivers, ""))
    added = [
        cpio.directory("bench"),
        *entries,
        *(replace(each, name=f"bench/{each.name}") for each in modules),
    ]
    path.write_bytes(images.initrd.read_bytes() + cpio.archive(added))
