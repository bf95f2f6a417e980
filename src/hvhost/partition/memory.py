"""Guest physical memory as the VMM sees it.

Every access of hvhost to guest memory goes through :class:`GuestMemory`, which checks that the
whole range lies inside one region of RAM. Guest memory changes under our hands: whoever reads a
value, reads it once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from hvhost.errors import GuestMemoryError, LocalProtocolError

PAGE_SIZE = 4096
PAGE_SHIFT = 12


class MemoryRegion(NamedTuple):
    """A contiguous piece of guest RAM.

    ``view`` is the writable byte view of the region in this process; ``backing_offset`` its place
    in the machine's backing memory (what KVM memory slots are made from), both in bytes.
    """

    guest_address: int
    view: memoryview
    backing_offset: int = 0

    @property
    def size(self) -> int:
        return len(self.view)


def _not_ram(address: int, length: int) -> GuestMemoryError:
    return GuestMemoryError(
        f"guest memory {address:#x}+{length:#x} is not RAM; the guest named a wrong address."
    )


class GuestMemory:
    """Checked, copy-free access to guest RAM by guest physical address."""

    def __init__(self, regions: Sequence[MemoryRegion]) -> None:
        self.regions: tuple[MemoryRegion, ...] = ()
        self._starts: list[int] = []
        self._views: list[memoryview] = []
        self._words: list[tuple[memoryview, memoryview]] = []
        for region in sorted(regions, key=lambda region: region.guest_address):
            self.append(region)

    def append(self, region: MemoryRegion) -> None:
        """Add RAM above all that there is; other threads may read and write meanwhile."""
        if self.regions and region.guest_address < (last := self.regions[-1]).guest_address + (
            last.size
        ):
            raise LocalProtocolError(f"RAM at {region.guest_address:#x} does not lie at the end.")
        words = region.view[: region.size & ~7]
        self.regions = (*self.regions, region)
        self._views.append(region.view)
        self._words.append((words.cast("I"), words.cast("Q")))
        self._starts.append(region.guest_address)  # last: it is what the others look at first

    @property
    def size(self) -> int:
        """Total RAM in bytes."""
        return sum(region.size for region in self.regions)

    def _find(self, address: int, length: int) -> tuple[int, int]:
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and length >= 0:
            offset = address - self._starts[index]
            if offset + length <= len(self._views[index]):
                return index, offset
        raise _not_ram(address, length)

    def view(self, address: int, length: int) -> memoryview:
        """Writable view of *length* bytes at guest physical *address*; no copy.

        :class:`GuestMemoryError` unless the range lies inside one region.
        """
        # As _find(), without a call: nearly all that hvhost does with guest memory is this.
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and length >= 0:
            offset = address - self._starts[index]
            end = offset + length
            view = self._views[index]
            if end <= len(view):
                return view[offset:end]
        raise _not_ram(address, length)

    def backing_offset(self, address: int, length: int) -> int:
        """Where in the machine's backing memory that range lies; as :meth:`view`."""
        index, offset = self._find(address, length)
        return self.regions[index].backing_offset + offset

    def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory."""
        return bytes(self.view(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy *data* into guest memory."""
        self.view(address, len(data))[:] = data

    def load32(self, address: int) -> int:
        """One aligned 32-bit load, never split (ring indices, message types)."""
        index, offset = self._find(address, 4)
        if offset & 3:
            raise GuestMemoryError(f"guest address {address:#x} is not aligned to 4 bytes.")
        return self._words[index][0][offset >> 2]

    def store32(self, address: int, value: int) -> None:
        """One aligned 32-bit store, never split."""
        index, offset = self._find(address, 4)
        if offset & 3:
            raise GuestMemoryError(f"guest address {address:#x} is not aligned to 4 bytes.")
        self._words[index][0][offset >> 2] = value

    def load64(self, address: int) -> int:
        """One aligned 64-bit load, never split."""
        index, offset = self._find(address, 8)
        if offset & 7:
            raise GuestMemoryError(f"guest address {address:#x} is not aligned to 8 bytes.")
        return self._words[index][1][offset >> 3]

    def store64(self, address: int, value: int) -> None:
        """One aligned 64-bit store, never split."""
        index, offset = self._find(address, 8)
        if offset & 7:
            raise GuestMemoryError(f"guest address {address:#x} is not aligned to 8 bytes.")
        self._words[index][1][offset >> 3] = value
