"""Which way a kernel starts."""

from __future__ import annotations

from collections.abc import Sequence

from hvhost.firmware.boot_state import BootState
from hvhost.firmware.content import Content
from hvhost.firmware.image import KernelImage
from hvhost.firmware.layout import E820Entry
from hvhost.firmware.linux import load_linux
from hvhost.partition.memory import GuestMemory


def load_kernel(
    memory: GuestMemory,
    image: KernelImage,
    *,
    command_line: str,
    initrd: Content | None,
    e820: Sequence[E820Entry],
    rsdp_address: int,
) -> BootState:
    """Load *image* by the Linux boot protocol if it speaks it, otherwise by PVH."""
    load = load_linux
    if not image.has_linux_entry:
        from hvhost.firmware.pvh import load_pvh

        load = load_pvh
    return load(
        memory,
        image,
        command_line=command_line,
        initrd=initrd,
        e820=e820,
        rsdp_address=rsdp_address,
    )
