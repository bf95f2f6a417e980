"""Which way a kernel starts."""

from __future__ import annotations

from collections.abc import Sequence

from hvhost.firmware.boot_state import BootState
from hvhost.firmware.image import KernelImage
from hvhost.firmware.layout import E820Entry
from hvhost.firmware.linux import load_linux
from hvhost.firmware.pvh import load_pvh
from hvhost.partition.memory import GuestMemory
from hvhost.wire import Buffer


def load_kernel(
    memory: GuestMemory,
    image: KernelImage,
    *,
    command_line: str,
    initrd: Buffer | None,
    e820: Sequence[E820Entry],
    rsdp_address: int,
) -> BootState:
    """Load *image* by the Linux boot protocol if it speaks it, otherwise by PVH."""
    load = load_linux if image.has_linux_entry else load_pvh
    return load(
        memory,
        image,
        command_line=command_line,
        initrd=initrd,
        e820=e820,
        rsdp_address=rsdp_address,
    )
