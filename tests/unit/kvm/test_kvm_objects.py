"""Vm and Vcpu: what they ask of KVM, over a KVM in memory."""

from __future__ import annotations

import errno
import struct

import pytest
from fake_transport import HYPERV_ENTRIES, INTEL_ENTRIES, FakeTransport
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Capability
from hvhost.kvm.transport import Fixup, FixupKind
from hvhost.kvm.vcpu import Registers, Segment, SpecialRegisters, Vcpu
from hvhost.kvm.vm import SintRoute, Vm
from hvhost.machine.loop import Loop
from hvhost.partition.cpuid import CpuidEntry

U64 = st.integers(0, 2**64 - 1)


def vm_and_vcpu() -> tuple[FakeTransport, Vm, Vcpu]:
    transport = FakeTransport(1 << 20)
    vm = Vm(transport)
    return transport, vm, vm.create_vcpu(0)


def test_a_machine_has_the_chips_of_a_pc() -> None:
    transport = FakeTransport(1 << 20)
    Vm(transport)
    assert [call.request for call in transport.calls] == [
        k.KVM_CREATE_VM,
        k.KVM_SET_TSS_ADDR,
        k.KVM_SET_IDENTITY_MAP_ADDR,
        k.KVM_CREATE_IRQCHIP,
        k.KVM_CREATE_PIT2,
    ]
    tss, identity = (call.argument for call in transport.calls[1:3])
    assert tss == 0xFFFBD000
    assert identity == struct.pack("<Q", 0xFFFBC000)


def test_cpuid_comes_and_goes() -> None:
    transport, vm, vcpu = vm_and_vcpu()
    assert vm.supported_cpuid() == INTEL_ENTRIES
    assert vm.supported_hyperv_cpuid() == HYPERV_ENTRIES
    entries = [CpuidEntry(1, 2, 3, 4, 5, 6, 7), CpuidEntry(0x40000000, eax=0xFFFFFFFF)]
    vcpu.set_cpuid(entries)
    assert transport.vcpus[0].cpuid == entries


def test_memory_slots_are_numbered() -> None:
    transport, vm, _ = vm_and_vcpu()
    assert vm.add_memory(0, 0x10000, 0) == 0
    assert vm.add_memory(1 << 32, 0x20000, 0x10000) == 1
    assert transport.slots == {0: (0, 0x10000, 0), 1: (1 << 32, 0x20000, 0x10000)}


def test_a_slot_that_kvm_refuses_is_used_again() -> None:
    transport, vm, _ = vm_and_vcpu()
    transport.failures[k.KVM_SET_USER_MEMORY_REGION] = errno.EEXIST
    with pytest.raises(OSError, match="exists"):
        vm.add_memory(0, 0x10000, 0)
    transport.failures.clear()
    assert vm.add_memory(0, 0x10000, 0) == 0


def test_processors_have_a_synic() -> None:
    transport, _, _ = vm_and_vcpu()
    assert transport.vcpus[0].enabled == [Capability.HYPERV_SYNIC2]


def test_too_many_processors_are_a_sentence() -> None:
    transport, vm, _ = vm_and_vcpu()
    transport.failures[k.KVM_CREATE_VCPU] = errno.EINVAL
    with pytest.raises(HvHostError, match=r"cannot make virtual processor 1 .*use fewer --cpus"):
        vm.create_vcpu(1)


def test_capabilities_with_arguments() -> None:
    transport, vm, _ = vm_and_vcpu()
    vm.enable(Capability.X86_USER_SPACE_MSR, 4)
    argument = transport.calls[-1].argument
    assert isinstance(argument, bytes)
    assert struct.unpack_from("<IIQQ", argument) == (188, 0, 4, 0)
    transport.capabilities[Capability.HYPERV_EVENTFD] = 3
    assert vm.check_extension(Capability.HYPERV_EVENTFD) == 3
    assert vm.check_extension(Capability.HYPERV_SEND_IPI) == 0


@pytest.mark.parametrize(("count", "bitmap_bytes"), [(1, 1), (6, 1), (8, 1), (9, 2)])
def test_the_msr_filter_denies_a_range(count: int, bitmap_bytes: int) -> None:
    transport, vm, _ = vm_and_vcpu()
    vm.filter_msrs(0x40000100, count)
    assert transport.filtered == (0x40000100, count)
    enable, call = transport.calls[-2:]
    assert isinstance(enable.argument, bytes)
    assert struct.unpack_from("<IIQ", enable.argument) == (
        Capability.X86_USER_SPACE_MSR,
        0,
        k.KVM_MSR_EXIT_REASON_FILTER,
    )
    assert isinstance(call.argument, bytes)
    size = 8 + 16 * 24
    assert struct.unpack_from("<I", call.argument) == (0,), "everything else is allowed"
    assert struct.unpack_from("<I", call.argument, 8) == (3,), "reads and writes"
    assert call.argument[size:] == bytes(bitmap_bytes)
    assert call.fixups == (Fixup(24, FixupKind.BUFFER_ADDRESS, size),)


def test_routes_keep_the_pins_of_a_pc() -> None:
    transport, vm, _ = vm_and_vcpu()
    vm.set_routes([SintRoute(32, 0, 2), SintRoute(33, 1, 2)])
    pins = {route[:2] + route[4:] for route in transport.routes}
    assert (4, k.KVM_IRQ_ROUTING_IRQCHIP, 0, 4) in pins, "COM1 at the first PIC"
    assert (12, k.KVM_IRQ_ROUTING_IRQCHIP, 1, 4) in pins, "the second PIC"
    assert (23, k.KVM_IRQ_ROUTING_IRQCHIP, 2, 23) in pins, "the last pin of the IOAPIC"
    assert len([route for route in transport.routes if route[1] == 1]) == 16 + 24
    assert [route for route in transport.routes if route[1] == k.KVM_IRQ_ROUTING_HV_SINT] == [
        (32, 4, 0, 0, 0, 2),
        (33, 4, 0, 0, 1, 2),
    ]


def test_interrupt_lines() -> None:
    transport, vm, _ = vm_and_vcpu()
    loop = Loop()
    taken: list[int] = []
    acknowledged = vm.in_event(loop, lambda: taken.append(1))
    line = vm.irq_event(33, resample=acknowledged)
    line.trigger()
    assert transport.irqs[33].raised == 1
    assert transport.resamples == {33: acknowledged}
    plain = vm.irq_event(4)
    plain.trigger()
    assert 4 not in transport.resamples
    transport.raise_event(acknowledged)
    loop.call_soon_threadsafe(loop.stop)
    loop.run()
    assert taken == [1]
    vm.close()
    loop.close()


def test_signals_are_connected_and_disconnected() -> None:
    transport, vm, _ = vm_and_vcpu()
    loop = Loop()
    event = vm.in_event(loop, lambda: None)
    vm.connect_hyperv_signal(0x2001, event)
    assert transport.signals == {0x2001: event}
    vm.disconnect_hyperv_signal(0x2001)
    assert not transport.signals
    vm.close()
    loop.close()


def test_small_calls() -> None:
    transport, vm, vcpu = vm_and_vcpu()
    vm.coalesce_ports(range(0x3F8, 0x3FA))
    assert transport.coalesced_ports == [0x3F8, 0x3F9]
    vm.irq_line(4, 1)
    assert transport.calls[-1].argument == struct.pack("<II", 4, 1)
    assert vm.clock_nanoseconds() == 123456789
    vcpu.nmi()
    assert transport.vcpus[0].nmis == 1
    vcpu.set_mp_state(3)
    assert (vcpu.mp_state(), transport.vcpus[0].mp_state) == (3, 3)
    vm.close()
    assert transport.closed == 1
    assert not transport.handles


@given(st.lists(U64, min_size=18, max_size=18))
def test_registers_round_trip(values: list[int]) -> None:
    transport, _, vcpu = vm_and_vcpu()
    registers = Registers(*values)
    vcpu.set_registers(registers)
    assert vcpu.registers() == registers
    assert struct.unpack("<18Q", transport.vcpus[0].regs) == tuple(values)


SEGMENTS = st.builds(
    Segment,
    U64,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    *([st.integers(0, 255)] * 10),
)


@given(
    st.lists(SEGMENTS, min_size=8, max_size=8),
    st.tuples(U64, st.integers(0, 0xFFFF)),
    st.tuples(U64, st.integers(0, 0xFFFF)),
    st.lists(U64, min_size=7, max_size=7),
    st.binary(min_size=32, max_size=32),
)
def test_special_registers_round_trip(
    segments: list[Segment],
    gdt: tuple[int, int],
    idt: tuple[int, int],
    control: list[int],
    bitmap: bytes,
) -> None:
    transport, _, vcpu = vm_and_vcpu()
    cr0, cr2, cr3, cr4, cr8, efer, base = control
    special = SpecialRegisters(
        tuple(segments), gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, base, bitmap
    )
    vcpu.set_special_registers(special)
    assert vcpu.special_registers() == special
    raw = transport.vcpus[0].sregs
    assert len(raw) == 312
    assert struct.unpack_from("<QH", raw, 8 * 24) == gdt
    assert struct.unpack_from("<7Q", raw, 8 * 24 + 32) == tuple(control)
    assert raw[-32:] == bitmap


def test_one_segment_of_many() -> None:
    _, _, vcpu = vm_and_vcpu()
    special = vcpu.special_registers()
    code = special.segment("cs")._replace(selector=0x10, l=1)
    changed = special.with_segments(cs=code)
    assert changed.segment("cs") == code
    assert changed.segment("ds") == special.segment("ds")
    assert changed.segments.index(code) == 0


def test_msrs() -> None:
    _, _, vcpu = vm_and_vcpu()
    vcpu.set_msrs([(0x40000000, 7), (0xC0000082, 2**64 - 1)])
    assert vcpu.msrs([0xC0000082, 0x40000000]) == [2**64 - 1, 7]
    with pytest.raises(OSError, match="does not know MSR 0x999"):
        vcpu.msrs([0x40000000, 0x999])
    with pytest.raises(OSError, match="refuses MSR 0x998"):
        vcpu.set_msrs([(0x40000000, 8), (0x998, 1)])
    assert vcpu.msrs([0x40000000]) == [8]
    assert vcpu.msrs([]) == []


def test_events_are_as_kvm_gives_them() -> None:
    transport, _, vcpu = vm_and_vcpu()
    transport.vcpus[0].events = bytes(range(64))
    events = vcpu.events()
    assert events == bytes(range(64))
    events[0] = 0xFF
    vcpu.set_events(events)
    assert transport.vcpus[0].events == bytes([0xFF, *range(1, 64)])


def test_translation() -> None:
    transport, _, vcpu = vm_and_vcpu()
    transport.tables[0xFFFFFFFF81000000] = 0x1000000
    assert vcpu.translate(0xFFFFFFFF81000123) == 0x1000123
    assert vcpu.translate(0xFFFFFFFF82000000) is None
    transport.tables[0x5000] = 0
    assert vcpu.translate(0x5000) == 0, "page 0 is a page"
