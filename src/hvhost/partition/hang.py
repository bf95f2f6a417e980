"""Debug: make a guest hang the way real guests hang, in ring 0 with interrupts off.

Every processor is taken to a two-byte jump to itself inside the guest's own kernel text and left
to run there. It answers nothing but a non-maskable interrupt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvhost.errors import GuestMemoryError, HvHostError
from hvhost.kvm.constants import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE
from hvhost.kvm.vcpu import SpecialRegisters, Vcpu
from hvhost.partition.memory import PAGE_SIZE, GuestMemory
from hvhost.partition.processor import Processor

MSR_LSTAR = 0xC0000082
MSR_IA32_SYSENTER_EIP = 0x176
RFLAGS_IF = 1 << 9
CR4_PAE, CR4_LA57 = 1 << 5, 1 << 12
EFER_LMA = 1 << 10
_PRESENT = 1
_LARGE = 1 << 7
_NO_EXECUTE = 1 << 63
_ADDRESS = 0xFFFFFFFFFF000
_PAE_TABLE = 0xFFFFFFE0
_PAGE_OFFSET_32 = 1 << 31  # kernels lie above, wherever they split the address space
_SELF_JUMP = b"\xeb\xfe"
_SEARCH = 4 << 20
_ATTEMPTS = 400
_RING_SECONDS = 0.005
_CHECK_SECONDS = 0.2


def executable_page(special: SpecialRegisters, memory: GuestMemory, address: int) -> int | None:
    """Where the page of a linear address lies in guest memory, None if no code may run there.

    Walks the guest's page tables ([AMD64] volume 2, 5.3 and 5.2.3). :class:`GuestMemoryError` if
    they lie outside memory.
    """
    if special.efer & EFER_LMA:
        table, top = special.cr3 & _ADDRESS, 48 if special.cr4 & CR4_LA57 else 39
    elif special.cr4 & CR4_PAE:
        table, top = special.cr3 & _PAE_TABLE, 30  # four entries, aligned to their size
    else:
        return None
    for shift in range(top, 11, -9):
        index = address >> shift & 511
        entry = int.from_bytes(memory.read(table + 8 * index, 8), "little")
        if not entry & _PRESENT or entry & _NO_EXECUTE:
            return None
        table = entry & _ADDRESS
        if shift in (21, 30) and entry & _LARGE:
            offset = (1 << shift) - 1
            return table & ~offset | address & offset & ~(PAGE_SIZE - 1)
    return table


def find_self_jump(vcpu: Vcpu, memory: GuestMemory) -> int | None:
    """Linear address of a self-jump in the kernel text around the system call entry."""
    special = vcpu.special_registers()
    if special.efer & EFER_LMA:
        entry = vcpu.msrs([MSR_LSTAR])[0]
        in_kernel = entry >> 63
    else:
        entry = vcpu.msrs([MSR_IA32_SYSENTER_EIP])[0]
        in_kernel = entry & _PAGE_OFFSET_32
    if not in_kernel:
        return None
    page = entry & ~(PAGE_SIZE - 1)
    for direction in (1, -1):
        for distance in range(0, _SEARCH, PAGE_SIZE):
            address = page + direction * distance
            try:
                physical = executable_page(special, memory, address)
                if physical is None:
                    break  # the end of the text
                place = memory.read(physical, PAGE_SIZE).find(_SELF_JUMP)
            except GuestMemoryError:
                break
            if place >= 0:
                return address + place
    return None


def _taking_event(vcpu: Vcpu) -> bool:
    """Whether an interrupt, exception or NMI is on its way in, which no cleared flag stops."""
    # struct kvm_vcpu_events: exception.injected and .pending, interrupt.injected, nmi.injected
    # and .pending ([linux] arch/x86/include/uapi/asm/kvm.h)
    events = vcpu.events()
    return any(events[offset] for offset in (0, 3, 8, 12, 13))


def _hang_now(vcpu: Vcpu, memory: GuestMemory) -> int | None:
    """Take a processor to the jump if it is quietly in ring 0; None if it is not."""
    if vcpu.mp_state() not in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED):
        return 0  # not started by the guest: nothing to hang
    special = vcpu.special_registers()
    if special.segment("cs").selector & 3 or _taking_event(vcpu):
        return None
    target = find_self_jump(vcpu, memory)
    if target is None:
        return None
    registers = vcpu.registers()
    vcpu.set_registers(registers._replace(rip=target, rflags=registers.rflags & ~RFLAGS_IF))
    vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
    return target


def hang(processors: Sequence[Processor], memory: GuestMemory) -> list[int]:
    """Hang every processor; the addresses where they spin, 0 for those never started.

    :class:`HvHostError` if one could not be caught in ring 0, or does not stay on its jump.
    """
    targets = []
    for processor in processors:
        vcpu = processor.vcpu
        for _ in range(_ATTEMPTS):
            target = processor.call(lambda vcpu=vcpu: _hang_now(vcpu, memory))  # type: ignore[misc]
            if target is not None:
                break
            time.sleep(_RING_SECONDS)
        else:
            raise HvHostError(
                f"virtual processor {vcpu.index} was never caught in the guest's kernel, so it "
                "could not be hung; wait until the guest has booted and try again."
            )
        targets.append(target)
    time.sleep(_CHECK_SECONDS)
    for processor, target in zip(processors, targets, strict=True):
        if not target:
            continue
        registers = processor.call(processor.vcpu.registers)
        if registers.rip != target or registers.rflags & RFLAGS_IF:
            raise HvHostError(
                f"virtual processor {processor.vcpu.index} left its jump at {target:#x} for "
                f"{registers.rip:#x}; the guest was not hung."
            )
    return targets
