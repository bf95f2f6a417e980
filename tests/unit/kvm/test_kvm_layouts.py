"""Numbers and structure layouts against the system's own ``linux/kvm.h``."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from hvhost.kvm import constants as k
from hvhost.kvm import vcpu, vm
from hvhost.machine import coalesced
from hvhost.partition import processor
from hvhost.rig import layout

REQUESTS = sorted(
    name for name, value in vars(k).items() if name.startswith("KVM_") and isinstance(value, int)
)
CAPABILITIES = [f"KVM_CAP_{capability.name}" for capability in k.Capability]
EXITS = [f"KVM_EXIT_{reason.name}" for reason in k.Exit]

SIZES = [
    "struct kvm_regs",
    "struct kvm_sregs",
    "struct kvm_segment",
    "struct kvm_dtable",
    "struct kvm_cpuid2",
    "struct kvm_cpuid_entry2",
    "struct kvm_msrs",
    "struct kvm_msr_entry",
    "struct kvm_mp_state",
    "struct kvm_vcpu_events",
    "struct kvm_translation",
    "struct kvm_enable_cap",
    "struct kvm_userspace_memory_region",
    "struct kvm_irq_routing",
    "struct kvm_irq_routing_entry",
    "struct kvm_irqfd",
    "struct kvm_hyperv_eventfd",
    "struct kvm_coalesced_mmio_zone",
    "struct kvm_coalesced_mmio_ring",
    "struct kvm_coalesced_mmio",
    "struct kvm_irq_level",
    "struct kvm_clock_data",
    "struct kvm_pit_config",
    "struct kvm_msr_filter",
    "struct kvm_msr_filter_range",
]

OFFSETS = """
kvm_run immediate_exit|kvm_run exit_reason|kvm_run io|kvm_run io.direction|kvm_run io.size
kvm_run io.port|kvm_run io.count|kvm_run io.data_offset
kvm_run mmio.phys_addr|kvm_run mmio.data|kvm_run mmio.len|kvm_run mmio.is_write
kvm_run hyperv.type|kvm_run hyperv.u.synic.control|kvm_run hyperv.u.synic.evt_page
kvm_run hyperv.u.synic.msg_page|kvm_run hyperv.u.hcall.input|kvm_run hyperv.u.hcall.result
kvm_run hyperv.u.hcall.params|kvm_run msr.error|kvm_run msr.index|kvm_run msr.data
kvm_run system_event.type|kvm_run internal.suberror|kvm_run fail_entry
kvm_sregs gdt|kvm_sregs idt|kvm_sregs cr0|kvm_sregs interrupt_bitmap|kvm_sregs apic_base
kvm_sregs ldt|kvm_sregs tr|kvm_sregs ss|kvm_segment selector|kvm_segment type|kvm_segment unusable
kvm_dtable limit|kvm_regs rip|kvm_regs rflags|kvm_regs rsp|kvm_regs r8
kvm_cpuid_entry2 flags|kvm_cpuid_entry2 edx|kvm_msr_entry data|kvm_translation valid
kvm_translation physical_address|kvm_enable_cap args|kvm_userspace_memory_region userspace_addr
kvm_userspace_memory_region guest_phys_addr|kvm_userspace_memory_region memory_size
kvm_irq_routing_entry u|kvm_irq_routing_entry type|kvm_irq_routing_hv_sint vcpu
kvm_irq_routing_hv_sint sint|kvm_irq_routing_irqchip pin|kvm_irqfd gsi|kvm_irqfd flags
kvm_irqfd resamplefd|kvm_vcpu_events exception.injected|kvm_vcpu_events exception.pending
kvm_vcpu_events interrupt.injected|kvm_vcpu_events nmi.injected|kvm_vcpu_events nmi.pending
kvm_hyperv_eventfd fd|kvm_hyperv_eventfd flags|kvm_msr_filter ranges
kvm_msr_filter_range nmsrs|kvm_msr_filter_range base|kvm_msr_filter_range bitmap
kvm_coalesced_mmio_ring coalesced_mmio|kvm_coalesced_mmio len|kvm_coalesced_mmio data
kvm_coalesced_mmio_zone size|kvm_coalesced_mmio_zone pio|kvm_clock_data clock
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the system's compiler says of names, ``sizeof`` and ``offsetof``."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs a C compiler and linux/kvm.h (gcc, linux-libc-dev)")
    lines = [f'printf("{name} %llu\\n", (unsigned long long){name});' for name in REQUESTS]
    for name in CAPABILITIES + EXITS:
        lines += [f"#ifdef {name}", f'printf("{name} %d\\n", {name});', "#endif"]
    lines += [f'printf("{name} %zu\\n", sizeof({name}));' for name in SIZES]
    for pair in OFFSETS.replace("\n", "|").strip("|").split("|"):
        kind, member = pair.split(" ")
        lines.append(f'printf("{pair} %zu\\n", offsetof(struct {kind}, {member}));')
    lines += ['printf("KVM_PIO_PAGE_OFFSET %d\\n", KVM_PIO_PAGE_OFFSET);']
    lines += ['printf("KVM_COALESCED_MMIO_PAGE_OFFSET %d\\n", KVM_COALESCED_MMIO_PAGE_OFFSET);']
    body = "\n".join(lines)
    source = (
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        "#ifndef KVM_HYPERV_EVENTFD_DEASSIGN\n#define KVM_HYPERV_EVENTFD_DEASSIGN 1\n#endif\n"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    directory = tmp_path_factory.mktemp("layouts")
    (directory / "layouts.c").write_text(source)
    program = directory / "layouts"
    subprocess.run([compiler, "-o", str(program), str(directory / "layouts.c")], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    pairs = (line.rsplit(" ", 1) for line in output.splitlines())
    return {name: int(value) for name, value in pairs}


def test_numbers(header: dict[str, int]) -> None:
    assert {name: header[name] for name in REQUESTS} == {
        name: int(getattr(k, name)) for name in REQUESTS
    }


def test_capabilities_and_exits(header: dict[str, int]) -> None:
    ours = {f"KVM_CAP_{each.name}": int(each) for each in k.Capability}
    ours |= {f"KVM_EXIT_{each.name}": int(each) for each in k.Exit}
    known = {name: value for name, value in header.items() if name in ours}
    assert known == {name: ours[name] for name in known}
    assert len(known) >= len(ours) - 2, "an older header may lack the newest names, not more"


@pytest.mark.parametrize(
    ("name", "layout_of"),
    [
        ("kvm_regs", vcpu._REGS),
        ("kvm_segment", vcpu._SEGMENT),
        ("kvm_dtable", vcpu._TABLE),
        ("kvm_cpuid_entry2", vcpu._CPUID),
        ("kvm_cpuid_entry2", vm._CPUID),
        ("kvm_msr_entry", vcpu._MSR),
        ("kvm_irq_routing_entry", vm._ROUTE),
        ("kvm_msr_filter_range", vm._MSR_FILTER_RANGE),
        ("kvm_coalesced_mmio", coalesced._ENTRY),
    ],
)
def test_sizes_of_records(header: dict[str, int], name: str, layout_of: struct.Struct) -> None:
    assert layout_of.size == header[f"struct {name}"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("kvm_sregs", vcpu._SREGS_SIZE),
        ("kvm_vcpu_events", vcpu._EVENTS_SIZE),
        ("kvm_msrs", vcpu._MSR_HEADER),
        ("kvm_cpuid2", 8),
        ("kvm_enable_cap", 104),
        ("kvm_mp_state", 4),
        ("kvm_translation", struct.calcsize("<QQBBB5x")),
        ("kvm_userspace_memory_region", struct.calcsize("<IIQQQ")),
        ("kvm_irq_routing", 8),
        ("kvm_irqfd", struct.calcsize("<4I16x")),
        ("kvm_hyperv_eventfd", struct.calcsize("<III12x")),
        ("kvm_coalesced_mmio_zone", struct.calcsize("<QII")),
        ("kvm_coalesced_mmio_ring", coalesced._HEADER_SIZE),
        ("kvm_irq_level", 8),
        ("kvm_clock_data", 48),
        ("kvm_pit_config", 64),
        ("kvm_msr_filter", 8 + vm._MSR_FILTER_RANGES * vm._MSR_FILTER_RANGE.size),
    ],
)
def test_sizes_of_buffers(header: dict[str, int], name: str, size: int) -> None:
    assert size == header[f"struct {name}"]


def test_the_exit_union(header: dict[str, int]) -> None:
    """Where the processor's loop looks, by its own word and quad numbers."""
    assert header["kvm_run exit_reason"] == 4 * 2
    assert header["kvm_run immediate_exit"] == 1
    union = processor._UNION
    for first in ("io", "mmio.phys_addr", "hyperv.type", "msr.error", "fail_entry"):
        assert header[f"kvm_run {first}"] == union
    assert header["kvm_run system_event.type"] == header["kvm_run internal.suberror"] == union
    io = [
        header[f"kvm_run io.{name}"] - union
        for name in ("direction", "size", "port", "count", "data_offset")
    ]
    assert io == [0, 1, 2, 4, 8]
    assert header["kvm_run mmio.data"] == union + 8
    assert header["kvm_run mmio.is_write"] == union + 20
    synic = [header[f"kvm_run hyperv.u.synic.{n}"] for n in ("control", "evt_page", "msg_page")]
    assert synic == [8 * 6, 8 * 7, 8 * 8]
    hcall = [header[f"kvm_run hyperv.u.hcall.{n}"] for n in ("input", "result", "params")]
    assert hcall == [8 * 5, 8 * 6, 8 * 7]
    assert header["kvm_run msr.index"] == 4 * 11
    assert header["kvm_run msr.data"] == 8 * 6
    assert header["KVM_PIO_PAGE_OFFSET"] == 1
    assert header["KVM_COALESCED_MMIO_PAGE_OFFSET"] == 2


def test_special_registers(header: dict[str, int]) -> None:
    segment = header["struct kvm_segment"]
    names = vcpu._SEGMENT_NAMES
    for name in ("ss", "tr", "ldt"):
        assert header[f"kvm_sregs {name}"] == segment * names.index(name)
    assert header["kvm_sregs gdt"] == 8 * segment
    assert header["kvm_sregs idt"] == 8 * segment + 16
    assert header["kvm_sregs cr0"] == 8 * segment + 32
    assert header["kvm_sregs apic_base"] == header["kvm_sregs cr0"] + 8 * 6
    assert header["kvm_sregs interrupt_bitmap"] == header["kvm_sregs cr0"] + vcpu._CONTROL.size
    assert header["kvm_dtable limit"] == 8
    assert (header["kvm_segment selector"], header["kvm_segment type"]) == (12, 14)
    fields = list(vcpu.Segment._fields)
    assert header["kvm_segment unusable"] == 14 + fields.index("unusable") - fields.index("type")


def test_members(header: dict[str, int]) -> None:
    registers = list(vcpu.Registers._fields)
    for name in ("rip", "rflags", "rsp", "r8"):
        assert header[f"kvm_regs {name}"] == 8 * registers.index(name)
    expected = {
        "kvm_cpuid_entry2 flags": 8,
        "kvm_cpuid_entry2 edx": 24,
        "kvm_msr_entry data": 8,
        "kvm_translation physical_address": 8,
        "kvm_translation valid": 16,
        "kvm_enable_cap args": 8,
        "kvm_userspace_memory_region guest_phys_addr": 8,
        "kvm_userspace_memory_region memory_size": 16,
        "kvm_userspace_memory_region userspace_addr": 24,
        "kvm_irq_routing_entry type": 4,
        "kvm_irq_routing_entry u": 16,
        "kvm_irq_routing_hv_sint vcpu": 0,
        "kvm_irq_routing_hv_sint sint": 4,
        "kvm_irq_routing_irqchip pin": 4,
        "kvm_irqfd gsi": 4,
        "kvm_irqfd flags": 8,
        "kvm_irqfd resamplefd": 12,
        "kvm_vcpu_events exception.injected": 0,
        "kvm_vcpu_events exception.pending": 3,
        "kvm_vcpu_events interrupt.injected": 8,
        "kvm_vcpu_events nmi.injected": 12,
        "kvm_vcpu_events nmi.pending": 13,
        "kvm_hyperv_eventfd fd": 4,
        "kvm_hyperv_eventfd flags": 8,
        "kvm_msr_filter ranges": 8,
        "kvm_msr_filter_range nmsrs": 4,
        "kvm_msr_filter_range base": 8,
        "kvm_msr_filter_range bitmap": 16,
        "kvm_coalesced_mmio_ring coalesced_mmio": 8,
        "kvm_coalesced_mmio len": 8,
        "kvm_coalesced_mmio data": 16,
        "kvm_coalesced_mmio_zone size": 8,
        "kvm_coalesced_mmio_zone pio": 12,
        "kvm_clock_data clock": 0,
    }
    assert {name: header[name] for name in expected} == expected


def test_the_agents_image_of_kvm_run_holds_what_the_loop_uses(header: dict[str, int]) -> None:
    assert 4096 * (header["KVM_PIO_PAGE_OFFSET"] + 1) <= layout.RUN_IMAGE_SIZE
    # CPUID of 200 leaves, the routes of 64 processors and the MSR filter go through mailboxes.
    assert 8 + 200 * header["struct kvm_cpuid_entry2"] <= layout.PROCESSOR_BUFFER_SIZE
    routes = 40 + 2 * layout.MAXIMUM_PROCESSORS
    assert 8 + routes * header["struct kvm_irq_routing_entry"] <= layout.CONTROL_BUFFER_SIZE
    assert 8 + 200 * header["struct kvm_cpuid_entry2"] <= layout.CONTROL_BUFFER_SIZE
