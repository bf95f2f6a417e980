"""What the fuzzer of kernel images runs.

The only exception a file may cause is :class:`hvhost.errors.HvHostError`.
"""

from __future__ import annotations

import contextlib

from hvhost.errors import HvHostError
from hvhost.firmware.boot import load_kernel
from hvhost.firmware.extract import extract_vmlinux
from hvhost.firmware.image import ImageKind, parse_kernel
from hvhost.firmware.layout import memory_layout
from hvhost.partition.memory import GuestMemory, MemoryRegion

_LAYOUT = memory_layout(24 << 20)
_MEMORY = GuestMemory(
    [
        MemoryRegion(region.guest_address, memoryview(bytearray(region.size)))
        for region in _LAYOUT.regions
    ]
)


def fuzz_images(data: bytes) -> None:
    """Parse, extract and load *data* as a kernel."""
    try:
        image = parse_kernel(data, "fuzz")
    except HvHostError:
        return
    if image.kind is ImageKind.BZIMAGE:
        try:
            vmlinux = extract_vmlinux(image)
        except HvHostError:
            pass
        else:
            fuzz_images(vmlinux)
    with contextlib.suppress(HvHostError):
        load_kernel(
            _MEMORY,
            image,
            command_line="console=ttyS0",
            initrd=b"initrd",
            e820=_LAYOUT.e820,
            rsdp_address=0xE0000,
        )
