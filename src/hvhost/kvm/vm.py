"""A virtual machine of KVM: memory slots, interrupt routes, events."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.transport import EventLoop, Fixup, FixupKind, Handle, OutEvent, Transport
from hvhost.kvm.vcpu import Vcpu
from hvhost.partition.cpuid import CpuidEntry

_TSS_ADDRESS = 0xFFFBD000
_IDENTITY_MAP_ADDRESS = 0xFFFBC000
_ROUTE = struct.Struct("<4I2I24x")
_CPUID = struct.Struct("<7I12x")
_CPUID_ENTRIES = 200
_IRQ_CHIP_PIN_COUNT = 24
_PIC_PINS = 8
_MSR_FILTER_RANGES = 16
_MSR_FILTER_RANGE = struct.Struct("<IIIIQ")


class SintRoute(NamedTuple):
    """An interrupt line that raises a synthetic interrupt source on a virtual processor."""

    gsi: int
    vp: int
    sint: int


class Vm:
    """One virtual machine over a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._kvm = transport.open_kvm()
        self._handle: Handle = transport.ioctl_handle(self._kvm, k.KVM_CREATE_VM)
        self._call(k.KVM_SET_TSS_ADDR, _TSS_ADDRESS)
        self._call(k.KVM_SET_IDENTITY_MAP_ADDR, bytearray(struct.pack("<Q", _IDENTITY_MAP_ADDRESS)))
        self._call(k.KVM_CREATE_IRQCHIP)
        self._call(k.KVM_CREATE_PIT2, bytearray(64))
        self._slots = 0

    def _call(
        self, request: int, argument: int | bytearray = 0, fixups: Sequence[Fixup] = ()
    ) -> int:
        return self._transport.ioctl(self._handle, request, argument, fixups)

    @property
    def transport(self) -> Transport:
        return self._transport

    def check_extension(self, capability: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 when KVM lacks it."""
        return self._transport.ioctl(self._handle, k.KVM_CHECK_EXTENSION, capability)

    def _cpuid(self, request: int) -> list[CpuidEntry]:
        buffer = bytearray(8 + _CPUID.size * _CPUID_ENTRIES)
        struct.pack_into("<I", buffer, 0, _CPUID_ENTRIES)
        self._transport.ioctl(self._kvm, request, buffer)
        count = struct.unpack_from("<I", buffer)[0]
        return [CpuidEntry(*_CPUID.unpack_from(buffer, 8 + _CPUID.size * i)) for i in range(count)]

    def supported_cpuid(self) -> list[CpuidEntry]:
        """``KVM_GET_SUPPORTED_CPUID``."""
        return self._cpuid(k.KVM_GET_SUPPORTED_CPUID)

    def supported_hyperv_cpuid(self) -> list[CpuidEntry]:
        """``KVM_GET_SUPPORTED_HV_CPUID``: which of [TLFS] chapter 2 this KVM can do."""
        return self._cpuid(k.KVM_GET_SUPPORTED_HV_CPUID)

    def enable(self, capability: k.Capability, *arguments: int) -> None:
        """``KVM_ENABLE_CAP`` on the machine."""
        buffer = bytearray(104)
        struct.pack_into("<II", buffer, 0, capability, 0)
        struct.pack_into(f"<{len(arguments)}Q", buffer, 8, *arguments)
        self._call(k.KVM_ENABLE_CAP, buffer)

    def add_memory(self, guest_address: int, size: int, backing_offset: int) -> int:
        """Back guest physical addresses with a part of the machine's memory; the slot number."""
        slot = self._slots
        self._call(
            k.KVM_SET_USER_MEMORY_REGION,
            bytearray(struct.pack("<IIQQQ", slot, 0, guest_address, size, 0)),
            [Fixup(24, FixupKind.MEMORY_ADDRESS, backing_offset)],
        )
        self._slots += 1
        return slot

    def create_vcpu(self, index: int) -> Vcpu:
        """The next virtual processor, with SynIC."""
        try:
            vcpu = Vcpu(self._transport, self._handle, index)
        except OSError as error:
            raise HvHostError(
                f"KVM cannot make virtual processor {index} ({error.strerror}); use fewer --cpus."
            ) from error
        vcpu.enable(k.Capability.HYPERV_SYNIC2)
        return vcpu

    def filter_msrs(self, first: int, count: int) -> None:
        """Send the guest's accesses to these MSRs to us instead of to KVM."""
        self.enable(k.Capability.X86_USER_SPACE_MSR, k.KVM_MSR_EXIT_REASON_FILTER)
        size = 8 + _MSR_FILTER_RANGES * _MSR_FILTER_RANGE.size
        bitmap_bytes = -(-count // 8)
        buffer = bytearray(size + bitmap_bytes)  # an all-zero bitmap denies the whole range
        flags = k.KVM_MSR_FILTER_READ | k.KVM_MSR_FILTER_WRITE
        _MSR_FILTER_RANGE.pack_into(buffer, 8, flags, count, first, 0, 0)
        self._call(k.KVM_X86_SET_MSR_FILTER, buffer, [Fixup(24, FixupKind.BUFFER_ADDRESS, size)])

    def set_routes(self, sints: Sequence[SintRoute]) -> None:
        """Replace the interrupt routes: the usual PIC and IOAPIC pins, and these."""
        entries = bytearray()
        count = 0
        for gsi in range(_IRQ_CHIP_PIN_COUNT):
            if gsi < 2 * _PIC_PINS:
                chip = gsi // _PIC_PINS
                entries += _ROUTE.pack(gsi, k.KVM_IRQ_ROUTING_IRQCHIP, 0, 0, chip, gsi % _PIC_PINS)
                count += 1
            entries += _ROUTE.pack(gsi, k.KVM_IRQ_ROUTING_IRQCHIP, 0, 0, 2, gsi)
            count += 1
        for route in sints:
            entries += _ROUTE.pack(route.gsi, k.KVM_IRQ_ROUTING_HV_SINT, 0, 0, route.vp, route.sint)
            count += 1
        self._call(k.KVM_SET_GSI_ROUTING, bytearray(struct.pack("<II", count, 0)) + entries)

    def irq_event(self, gsi: int, resample: Handle | None = None) -> OutEvent:
        """An event that raises *gsi*; *resample* is raised when the guest acknowledged it."""
        event = self._transport.out_event()
        flags = 0 if resample is None else k.KVM_IRQFD_FLAG_RESAMPLE
        fixups = [Fixup(0, FixupKind.DESCRIPTOR, event.handle)]
        if resample is not None:
            fixups.append(Fixup(12, FixupKind.DESCRIPTOR, resample))
        self._call(k.KVM_IRQFD, bytearray(struct.pack("<4I16x", 0, gsi, flags, 0)), fixups)
        return event

    def in_event(self, loop: EventLoop, callback: Callable[[], None]) -> Handle:
        """An event raised by KVM, to be given to :meth:`irq_event` and the like."""
        return self._transport.in_event(loop, callback)

    def connect_hyperv_signal(self, connection_id: int, event: Handle) -> None:
        """``KVM_HYPERV_EVENTFD``: HvCallSignalEvent on this connection raises *event*."""
        self._call(
            k.KVM_HYPERV_EVENTFD,
            bytearray(struct.pack("<III12x", connection_id, 0, 0)),
            [Fixup(4, FixupKind.DESCRIPTOR, event)],
        )

    def disconnect_hyperv_signal(self, connection_id: int) -> None:
        """Undo :meth:`connect_hyperv_signal`."""
        self._call(
            k.KVM_HYPERV_EVENTFD,
            bytearray(struct.pack("<III12x", connection_id, 0, k.KVM_HYPERV_EVENTFD_DEASSIGN)),
        )

    def coalesce_ports(self, ports: range) -> None:
        """Collect writes to I/O ports instead of leaving the guest for each."""
        zone = struct.pack("<QII", ports.start, len(ports), 1)
        self._call(k.KVM_REGISTER_COALESCED_MMIO, bytearray(zone))

    def irq_line(self, irq: int, level: int) -> None:
        """Set the level of a PIC/IOAPIC line."""
        self._call(k.KVM_IRQ_LINE, bytearray(struct.pack("<II", irq, level)))

    def clock_nanoseconds(self) -> int:
        """The machine's clock, from which its reference time counts."""
        buffer = bytearray(48)
        self._call(k.KVM_GET_CLOCK, buffer)
        return int.from_bytes(buffer[:8], "little")

    def set_clock_nanoseconds(self, nanoseconds: int) -> None:
        """Have the machine's clock go on from here; while no processor runs."""
        self._call(k.KVM_SET_CLOCK, bytearray(nanoseconds.to_bytes(8, "little")) + bytes(40))

    def close(self) -> None:
        """End the machine and give its memory back."""
        self._transport.close()
