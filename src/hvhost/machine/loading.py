"""From a kernel's file to a board that can run it.

Copying the kernel takes about as long as importing what a board is made of, so both are done at
the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hvhost.errors import HvHostError
from hvhost.firmware.boot import load_kernel
from hvhost.firmware.boot_state import BootState
from hvhost.firmware.content import FileContent
from hvhost.firmware.image import KernelImage
from hvhost.firmware.layout import ACPI_ADDRESS, memory_layout
from hvhost.kvm.transport import Transport
from hvhost.machine.config import MachineConfig
from hvhost.partition.memory import GuestMemory, MemoryRegion

if TYPE_CHECKING:
    from hvhost.machine.board import Board


class Loading:
    """A kernel and its initrd on their way into *memory*, on a thread of their own."""

    rsdp_address = ACPI_ADDRESS

    def __init__(self, config: MachineConfig, kernel: KernelImage, memory: memoryview) -> None:
        """:class:`HvHostError` or ``OSError`` for what cannot even begin."""
        self.layout = memory_layout(
            config.memory,
            low_mmio_bytes=config.low_mmio,
            high_mmio_bytes=config.high_mmio,
            hot_add_bytes=config.backing - config.memory,
        )
        self.memory = GuestMemory(
            [
                MemoryRegion(
                    region.guest_address,
                    memory[region.backing_offset : region.backing_offset + region.size],
                    region.backing_offset,
                )
                for region in self.layout.regions
            ]
        )
        self._command_line = config.command_line
        self._kernel = kernel
        self._initrd = FileContent(Path(config.initrd)) if config.initrd else None
        self._result: BootState | BaseException | None = None
        self._thread = threading.Thread(target=self._load, name="loading")
        self._thread.start()

    def _load(self) -> None:
        try:
            self._result = load_kernel(
                self.memory,
                self._kernel,
                command_line=self._command_line,
                initrd=self._initrd,
                e820=self.layout.e820,
                rsdp_address=self.rsdp_address,
            )
        except BaseException as error:
            self._result = error

    def boot_state(self) -> BootState:
        """The registers to start with once all is in memory; raises what went wrong."""
        self.end()
        if not isinstance(self._result, BootState):
            assert self._result is not None
            raise self._result
        return self._result

    def end(self) -> None:
        """Wait until nothing is written into memory any more."""
        self._thread.join()


def build_board(
    config: MachineConfig, kernel: KernelImage, connect: Callable[[], Transport]
) -> Board:
    """A board on a transport of its own; :class:`HvHostError` when that is not possible."""
    try:
        transport = connect()
        try:
            loading = Loading(config, kernel, transport.memory)
            try:
                from hvhost.machine.board import Board

                return Board(config, transport, loading)
            finally:
                loading.end()
        except BaseException:
            transport.close()
            raise
    except OSError as error:
        raise not_built(config, error) from error


def not_built(config: MachineConfig, error: OSError) -> HvHostError:
    """What to tell when the computer refuses what a machine needs."""
    return HvHostError(
        f"machine {config.name!r} could not be built ({error}); "
        "run `hvhost doctor` to see what this computer can do."
    )
