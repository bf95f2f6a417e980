"""Coalesced port writes (``KVM_CAP_COALESCED_PIO``): the guest's output without an exit each."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from hvhost.kvm.constants import Capability
from hvhost.kvm.vm import Vm

_ENTRY = struct.Struct("<QIIQ")  # struct kvm_coalesced_mmio: port, length, is port, data
_HEADER_SIZE = 8


class CoalescedPorts:
    """The machine's ring of port writes that KVM has not left the guest for."""

    def __init__(self, vm: Vm, ports: Sequence[range]) -> None:
        self._transport = vm.transport
        self._active = bool(ports) and vm.check_extension(Capability.COALESCED_PIO) > 0
        if not self._active:
            return
        for zone in ports:
            vm.coalesce_ports(zone)
        self._ring = vm.transport.coalesced_ring()
        self._indices = self._ring[:_HEADER_SIZE].cast("I")
        self._capacity = (len(self._ring) - _HEADER_SIZE) // _ENTRY.size

    def refresh(self) -> None:
        """Bring the ring up to date while no processor exits."""
        if self._active:
            self._transport.drain_coalesced()

    def drain(self, write: Callable[[int, int, int], None]) -> None:
        """Give every write (port, size in bytes, value) to *write*, in order, each once."""
        if not self._active:
            return
        indices = self._indices
        first, last = indices[0] % self._capacity, indices[1] % self._capacity
        while first != last:
            port, length, _, data = _ENTRY.unpack_from(
                self._ring, _HEADER_SIZE + first * _ENTRY.size
            )
            first = (first + 1) % self._capacity
            indices[0] = first
            write(port, length, data & ((1 << 8 * length) - 1))
            last = indices[1] % self._capacity
