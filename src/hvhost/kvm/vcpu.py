"""A virtual processor of KVM: registers, MSRs, events, and the run itself.

All methods but :meth:`Vcpu.kick` belong to the thread that runs the processor.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hvhost.kvm import constants as k
from hvhost.kvm.transport import Handle, Transport
from hvhost.partition.cpuid import CpuidEntry

_REGS = struct.Struct("<18Q")
_SEGMENT = struct.Struct("<QIHBBBBBBBBBB")
_TABLE = struct.Struct("<QH6x")
_CONTROL = struct.Struct("<7Q")
_CPUID = struct.Struct("<7I12x")
_SREGS_SIZE = 312
_SEGMENT_NAMES = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_MSR_HEADER = 8
_MSR = struct.Struct("<IIQ")
_EVENTS_SIZE = 64


class Registers(NamedTuple):
    """``struct kvm_regs``."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


class Segment(NamedTuple):
    """``struct kvm_segment``."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the architecture's own name
    g: int
    avl: int = 0
    unusable: int = 0
    padding: int = 0


class SpecialRegisters(NamedTuple):
    """``struct kvm_sregs`` without the interrupt bitmap, which is kept as it was."""

    segments: tuple[Segment, ...]
    gdt: tuple[int, int]
    idt: tuple[int, int]
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: bytes

    def segment(self, name: str) -> Segment:
        return self.segments[_SEGMENT_NAMES.index(name)]

    def with_segments(self, **changes: Segment) -> SpecialRegisters:
        segments = [
            changes.get(name, segment)
            for name, segment in zip(_SEGMENT_NAMES, self.segments, strict=True)
        ]
        return self._replace(segments=tuple(segments))


class Vcpu:
    """One virtual processor; ``run_state`` is its ``struct kvm_run``."""

    def __init__(self, transport: Transport, vm: Handle, index: int) -> None:
        self._transport = transport
        self.index = index
        self._handle = transport.ioctl_handle(vm, k.KVM_CREATE_VCPU, index)
        self.run_state = transport.start_processor(index, self._handle)

    def enable(self, capability: k.Capability, *arguments: int) -> None:
        """``KVM_ENABLE_CAP``."""
        buffer = bytearray(104)
        struct.pack_into("<II", buffer, 0, capability, 0)
        struct.pack_into(f"<{len(arguments)}Q", buffer, 8, *arguments)
        self._transport.ioctl(self._handle, k.KVM_ENABLE_CAP, buffer)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """``KVM_SET_CPUID2``."""
        buffer = bytearray(struct.pack("<II", len(entries), 0))
        for e in entries:
            buffer += _CPUID.pack(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        self._transport.ioctl(self._handle, k.KVM_SET_CPUID2, buffer)

    def run(self) -> int:
        """Run the guest until something needs us; 0, or a positive errno."""
        return self._transport.run(self.index)

    def kick(self) -> None:
        """Make :meth:`run` return EINTR; from any thread."""
        self._transport.kick(self.index)

    def registers(self) -> Registers:
        buffer = bytearray(_REGS.size)
        self._transport.ioctl(self._handle, k.KVM_GET_REGS, buffer)
        return Registers(*_REGS.unpack(buffer))

    def set_registers(self, registers: Registers) -> None:
        self._transport.ioctl(self._handle, k.KVM_SET_REGS, bytearray(_REGS.pack(*registers)))

    def special_registers(self) -> SpecialRegisters:
        buffer = bytearray(_SREGS_SIZE)
        self._transport.ioctl(self._handle, k.KVM_GET_SREGS, buffer)
        size = _SEGMENT.size
        segments = tuple(Segment(*_SEGMENT.unpack_from(buffer, size * i)) for i in range(8))
        offset = size * 8
        gdt = _TABLE.unpack_from(buffer, offset)
        idt = _TABLE.unpack_from(buffer, offset + _TABLE.size)
        offset += 2 * _TABLE.size
        control = _CONTROL.unpack_from(buffer, offset)
        bitmap = bytes(buffer[offset + _CONTROL.size :])
        cr0, cr2, cr3, cr4, cr8, efer, base = control
        return SpecialRegisters(segments, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, base, bitmap)

    def set_special_registers(self, s: SpecialRegisters) -> None:
        buffer = bytearray()
        for g in s.segments:
            buffer += _SEGMENT.pack(*g)
        buffer += _TABLE.pack(*s.gdt) + _TABLE.pack(*s.idt)
        buffer += _CONTROL.pack(s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base)
        buffer += s.interrupt_bitmap
        self._transport.ioctl(self._handle, k.KVM_SET_SREGS, buffer)

    def msrs(self, indices: Sequence[int]) -> list[int]:
        """Values of model-specific registers, in the order asked."""
        buffer = bytearray(_MSR_HEADER + _MSR.size * len(indices))
        struct.pack_into("<I", buffer, 0, len(indices))
        for i, index in enumerate(indices):
            _MSR.pack_into(buffer, _MSR_HEADER + _MSR.size * i, index, 0, 0)
        read = self._transport.ioctl(self._handle, k.KVM_GET_MSRS, buffer)
        if read != len(indices):
            raise OSError(22, f"KVM does not know MSR {indices[read]:#x}")
        return [
            _MSR.unpack_from(buffer, _MSR_HEADER + _MSR.size * i)[2] for i in range(len(indices))
        ]

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> None:
        """Write model-specific registers; pairs of index and value."""
        pairs = list(values)
        buffer = bytearray(struct.pack("<II", len(pairs), 0))
        for index, value in pairs:
            buffer += _MSR.pack(index, 0, value)
        written = self._transport.ioctl(self._handle, k.KVM_SET_MSRS, buffer)
        if written != len(pairs):
            raise OSError(22, f"KVM refuses MSR {pairs[written][0]:#x}")

    def mp_state(self) -> int:
        buffer = bytearray(4)
        self._transport.ioctl(self._handle, k.KVM_GET_MP_STATE, buffer)
        return int.from_bytes(buffer, "little")

    def set_mp_state(self, state: int) -> None:
        self._transport.ioctl(
            self._handle, k.KVM_SET_MP_STATE, bytearray(state.to_bytes(4, "little"))
        )

    def nmi(self) -> None:
        """Inject a non-maskable interrupt."""
        self._transport.ioctl(self._handle, k.KVM_NMI)

    def events(self) -> bytearray:
        """``struct kvm_vcpu_events``, as KVM gives it."""
        buffer = bytearray(_EVENTS_SIZE)
        self._transport.ioctl(self._handle, k.KVM_GET_VCPU_EVENTS, buffer)
        return buffer

    def set_events(self, events: bytearray) -> None:
        self._transport.ioctl(self._handle, k.KVM_SET_VCPU_EVENTS, events)

    def translate(self, linear_address: int) -> int | None:
        """Guest physical address behind a linear one, or None if not mapped."""
        buffer = bytearray(struct.pack("<QQBBB5x", linear_address, 0, 0, 0, 0))
        self._transport.ioctl(self._handle, k.KVM_TRANSLATE, buffer)
        _, physical, valid, _, _ = struct.unpack("<QQBBB5x", buffer)
        return int(physical) if valid else None
