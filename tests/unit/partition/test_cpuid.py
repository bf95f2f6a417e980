from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.partition.cpuid import (
    SIGNIFICANT_INDEX,
    CpuidEntry,
    HvFeature,
    HvPartitionPrivilege,
    HvRecommendation,
    build_cpuid,
)

ONES = 0xFFFFFFFF


def vendor(name: bytes, max_leaf: int = 0x1F) -> CpuidEntry:
    ebx, edx, ecx = struct.unpack("<III", name)
    return CpuidEntry(0, eax=max_leaf, ebx=ebx, ecx=ecx, edx=edx)


INVARIANT_TSC = CpuidEntry(0x80000007, edx=1 << 8)
INTEL, AMD = vendor(b"GenuineIntel"), vendor(b"AuthenticAMD", 0xD)
# What KVM of Linux 6.1 offers, debugging and nested virtualization included.
KVM_HYPERV = [
    CpuidEntry(0x40000000, eax=0x40000082, ebx=0x756E694C, ecx=0x564B2078, edx=0x7648204D),
    CpuidEntry(0x40000001, eax=0x31237648),
    CpuidEntry(0x40000002, eax=0x3839, ebx=0xA0000),
    CpuidEntry(0x40000003, eax=0x2AFF, ebx=0x830, edx=0x80D12),
    CpuidEntry(0x40000004, eax=0x44E2C, ebx=0xFFF),
    CpuidEntry(0x40000005, eax=1024, ebx=64),
    CpuidEntry(0x40000080, ebx=0x756E694C),
    CpuidEntry(0x40000082, eax=2),
    CpuidEntry(0x4000000A, eax=0x80101, ebx=1),
]


def build(
    supported: list[CpuidEntry],
    hyperv: list[CpuidEntry] | None = None,
    *,
    vp_index: int = 0,
    processors: int = 1,
    xsave: bool = True,
    extended_hypercalls: bool = False,
) -> dict[tuple[int, int], CpuidEntry]:
    entries = build_cpuid(
        supported,
        KVM_HYPERV if hyperv is None else hyperv,
        vp_index=vp_index,
        processors=processors,
        xsave=xsave,
        extended_hypercalls=extended_hypercalls,
    )
    leaves = {(entry.function, entry.index): entry for entry in entries}
    assert len(leaves) == len(entries)
    return leaves


def everything(function: int, index: int = 0, flags: int = 0) -> CpuidEntry:
    return CpuidEntry(function, index, flags, ONES, ONES, ONES, ONES)


def features(given: CpuidEntry) -> dict[tuple[int, int], CpuidEntry]:
    return build([INTEL, INVARIANT_TSC], [given])


def test_the_hypervisor_is_hyper_v() -> None:
    leaves = build([INTEL, CpuidEntry(0x40000000, eax=0x40000001, ebx=0x4B4D564B)])
    top = leaves[0x40000000, 0]
    assert struct.pack("<III", top.ebx, top.ecx, top.edx) == b"Microsoft Hv"
    assert top.eax == 0x40000006
    assert leaves[0x40000001, 0] == CpuidEntry(0x40000001, eax=0x31237648)
    version = leaves[0x40000002, 0]
    assert (version.ebx >> 16, version.ebx & 0xFFFF, version.eax) == (10, 0, 20348)
    hypervisor = {function for function, _ in leaves if function >> 28 == 4}
    assert hypervisor == set(range(0x40000000, 0x40000007))


def test_features_are_kvms_less_debugging_plus_crash_registers() -> None:
    leaf = build([INTEL])[0x40000003, 0]
    assert leaf.eax == 0x2AFF
    assert leaf.ebx == 0x30
    assert leaf.edx == 0x80510
    without = [CpuidEntry(0x40000003, eax=0x66, ebx=0x30)]
    assert build([INTEL], without)[0x40000003, 0].edx == HvFeature.GUEST_CRASH_REGS_AVAILABLE


def test_a_guest_is_neither_root_nor_confidential_nor_debuggable() -> None:
    leaf = features(everything(0x40000003))[0x40000003, 0]
    privileges = leaf.eax | leaf.ebx << 32
    for forbidden in (
        HvPartitionPrivilege.CREATE_PARTITIONS,
        HvPartitionPrivilege.CPU_MANAGEMENT,
        HvPartitionPrivilege.ISOLATION,
        HvPartitionPrivilege.DEBUGGING,
        HvPartitionPrivilege.ACCESS_DEBUG_REGS,
        HvPartitionPrivilege.ENABLE_EXTENDED_HYPERCALLS,
    ):
        assert not privileges & forbidden
    assert not leaf.edx & (HvFeature.GUEST_DEBUGGING_AVAILABLE | HvFeature.DEBUG_REGS_AVAILABLE)
    assert not leaf.edx & (HvFeature.MWAIT_AVAILABLE | HvFeature.GUEST_IDLE_AVAILABLE)
    assert privileges & HvPartitionPrivilege.ACCESS_TSC_INVARIANT_CONTROLS
    assert leaf.edx & HvFeature.USE_DIRECT_SYNTHETIC_TIMERS


def test_only_an_invariant_tsc_is_called_one() -> None:
    given = [everything(0x40000003)]
    for leaves, called in (
        ([INTEL], False),
        ([INTEL, CpuidEntry(0x80000007, edx=ONES & ~(1 << 8))], False),
        ([INTEL, INVARIANT_TSC], True),
    ):
        privileges = build(leaves, given)[0x40000003, 0].eax
        offered = privileges & HvPartitionPrivilege.ACCESS_TSC_INVARIANT_CONTROLS
        assert bool(offered) is called


def test_extended_hypercalls_need_kvm_and_somebody_to_answer() -> None:
    bit = 1 << 20
    capable = [CpuidEntry(0x40000003, eax=0x66, ebx=0x30 | bit)]
    assert build([INTEL], capable, extended_hypercalls=True)[0x40000003, 0].ebx == 0x30 | bit
    assert build([INTEL], extended_hypercalls=True)[0x40000003, 0].ebx == 0x30


def test_recommendations_are_kvms_less_nested_virtualization() -> None:
    leaf = build([INTEL])[0x40000004, 0]
    assert leaf.eax == 0x40E2C
    assert leaf.ebx == 0xFFF
    nothing = build([INTEL], [CpuidEntry(0x40000003, eax=0x66)])[0x40000004, 0]
    assert nothing.eax == 0
    everything_kvm = [CpuidEntry(0x40000003, eax=0x66), everything(0x40000004)]
    eax = build([INTEL], everything_kvm)[0x40000004, 0].eax
    assert not eax & (HvRecommendation.ENLIGHTENED_VMCS | HvRecommendation.HYPERVISOR_IS_NESTED)


def test_limits() -> None:
    leaf = build([INTEL], processors=100)[0x40000005, 0]
    assert (leaf.eax, leaf.ebx) == (1024, 100)


@pytest.mark.parametrize("bit", [1, 2, 5, 6])
def test_kvm_without_a_mandatory_privilege(bit: int) -> None:
    with pytest.raises(HvHostError, match="cannot play Hyper-V: it lacks ACCESS_"):
        build([INTEL], [CpuidEntry(0x40000003, eax=0x66 & ~(1 << bit))])
    with pytest.raises(HvHostError, match="cannot play Hyper-V"):
        build([INTEL], [])


def test_leaf_1() -> None:
    given = everything(1)
    leaf = build([INTEL, given], vp_index=3, processors=5)[1, 0]
    assert leaf.ebx == 3 << 24 | 8 << 16 | 0xFFFF
    assert leaf.ecx == ONES & ~(1 << 5 | 1 << 27)  # VMX; OSXSAVE is the guest's to set
    assert leaf.edx == ONES
    single = build([INTEL, CpuidEntry(1, edx=ONES)])[1, 0]
    assert single.ecx == 1 << 31
    assert single.edx == ONES & ~(1 << 28)  # HTT
    assert single.ebx == 1 << 16


def test_many_processors_fit_leaf_1() -> None:
    leaf = build([INTEL, everything(1)], vp_index=300, processors=400)[1, 0]
    assert leaf.ebx >> 24 == 300 & 0xFF
    assert leaf.ebx >> 16 & 0xFF == 255


def test_no_nested_virtualization() -> None:
    leaves = build([AMD, everything(1), everything(0x80000001), everything(0x8000000A)])
    assert not leaves[1, 0].ecx & 1 << 5
    assert not leaves[0x80000001, 0].ecx & 1 << 2
    assert (0x8000000A, 0) not in leaves


def test_sgx_is_dropped() -> None:
    assert (0x12, 0) not in build([INTEL, everything(0x12)])


@pytest.mark.parametrize("processors", [1, 2, 3, 4, 5, 64, 255, 300])
def test_topology_leaf(processors: int) -> None:
    given = [INTEL, *(everything(leaf, i, 1) for leaf in (0xB, 0x1F) for i in range(3))]
    leaves = build([*given, everything(0x80000026)], vp_index=processors - 1, processors=processors)
    assert (0x1F, 0) not in leaves
    assert (0x80000026, 0) not in leaves
    thread, core, end = (leaves[0xB, index] for index in range(3))
    assert all(e.flags == SIGNIFICANT_INDEX for e in (thread, core, end))
    assert all(e.edx == processors - 1 for e in (thread, core, end))
    assert (thread.eax, thread.ebx, thread.ecx) == (0, 1, 0x100)
    assert (core.ebx, core.ecx) == (processors, 0x201)
    assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
    # The shift leaves the package number of every APIC id at 0, and is the smallest that does.
    assert (processors - 1) >> core.eax == 0
    assert core.eax == 0 or (processors - 1) >> (core.eax - 1)


def test_no_topology_leaf_on_old_processors() -> None:
    assert (0xB, 0) not in build([vendor(b"GenuineIntel", 0xA)])
    assert (0xB, 0) in build([vendor(b"GenuineIntel", 0xB)])


@pytest.mark.parametrize("function", [4, 0x8000001D])
def test_only_the_last_cache_level_is_shared(function: int) -> None:
    def cache(level: int, index: int) -> CpuidEntry:
        return CpuidEntry(function, index, 1, eax=1 | level << 5 | 0x3FFF << 14 | 0x3F << 26)

    end = CpuidEntry(function, 4, 1)
    given = [INTEL, cache(1, 0), cache(1, 1), cache(2, 2), cache(3, 3), end]
    leaves = build(given, processors=6)
    shared = [leaves[function, index].eax >> 14 & 0xFFF for index in range(4)]
    assert shared == [0, 0, 0, 7]
    cores = {leaves[function, index].eax >> 26 for index in range(4)}
    assert cores == {7 if function == 4 else 0}
    assert leaves[function, 3].eax & 0x3FFF == 1 | 3 << 5
    assert leaves[function, 4] == end


def test_amd_topology() -> None:
    given = [AMD, everything(0x80000001), everything(0x80000008), everything(0x8000001E)]
    leaves = build(given, vp_index=2, processors=3)
    assert leaves[0x80000001, 0].ecx & 1 << 1  # CmpLegacy
    assert leaves[0x80000008, 0].ecx & 0xF0FF == 2 << 12 | 2
    extended = leaves[0x8000001E, 0]
    assert (extended.eax, extended.ebx, extended.ecx) == (2, 2, 0)
    single = build(given)
    assert not single[0x80000001, 0].ecx & 1 << 1
    assert single[0x80000008, 0].ecx & 0xF0FF == 0


def test_intel_has_no_amd_topology() -> None:
    leaves = build([INTEL, everything(0x80000001), CpuidEntry(0x80000008)], processors=4)
    assert not leaves[0x80000001, 0].ecx & 1 << 1
    assert leaves[0x80000008, 0].ecx == 0


def test_without_xsave_nothing_that_needs_it_is_left() -> None:
    given = [
        AMD,
        everything(1),
        everything(7, 0, 1),
        everything(7, 1, 1),
        everything(7, 2, 1),
        everything(0x14, 1, 1),
        everything(0xD, 0, 1),
        everything(0xD, 2, 1),
        everything(0x80000001),
    ]
    leaves = build(given, xsave=False)
    assert (0xD, 0) not in leaves
    assert (0xD, 2) not in leaves
    assert leaves[1, 0].ecx == ONES & ~sum(1 << bit for bit in (5, 12, 26, 27, 28, 29))
    for bit in (5, 16, 17, 30, 31):  # AVX2, AVX-512 F, DQ, BW, VL
        assert not leaves[7, 0].ebx & 1 << bit
    assert not leaves[7, 0].ecx & (1 << 3 | 1 << 4)  # PKU, OSPKE
    assert not leaves[7, 0].edx & 1 << 24  # AMX-TILE
    assert leaves[7, 0].ebx & 1 << 29  # SHA uses SSE registers
    assert not leaves[7, 1].eax & 1 << 4  # AVX-VNNI
    assert leaves[7, 2] == everything(7, 2, 1)
    assert leaves[0x14, 1] == everything(0x14, 1, 1)
    assert not leaves[0x80000001, 0].ecx & (1 << 11 | 1 << 16)  # XOP, FMA4
    assert build(given)[0xD, 2] == everything(0xD, 2, 1)


def test_other_leaves_are_kvms() -> None:
    brand = everything(0x80000002)
    assert build([INTEL, brand, everything(0x15)])[0x80000002, 0] == brand
    assert build([INTEL, brand, everything(0x15)])[0x15, 0] == everything(0x15)


WORD = st.integers(0, ONES)
LEAF = st.sampled_from(
    [1, 4, 6, 7, 0xB, 0xD, 0x12, 0x1F, 0x40000001, 0x80000001, 0x80000008, 0x8000001D, 0x8000001E]
)


@given(
    st.lists(
        st.builds(CpuidEntry, LEAF, st.integers(0, 3), st.just(1), WORD, WORD, WORD, WORD),
        unique_by=lambda entry: (entry.function, entry.index),
    ),
    WORD,
    WORD,
    WORD,
    st.integers(1, 1024),
    st.booleans(),
)
def test_any_kvm_gives_leaves_that_fit_their_registers(
    supported: list[CpuidEntry], low: int, high: int, edx: int, processors: int, xsave: bool
) -> None:
    hyperv = [CpuidEntry(0x40000003, eax=low | 0x66, ebx=high, edx=edx), everything(0x40000004)]
    for first in (INTEL, AMD):
        leaves = build(
            [first, *supported],
            hyperv,
            vp_index=processors - 1,
            processors=processors,
            xsave=xsave,
        )
        for entry in leaves.values():
            # As the ioctl wants them: plain 32-bit words.
            struct.pack(
                "<7I",
                entry.function,
                entry.index,
                entry.flags,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
            )
        privileges = leaves[0x40000003, 0]
        assert privileges.eax & ~low & ~0x66 == 0
        assert privileges.ebx & ~high == 0
        assert privileges.edx & ~edx & ~HvFeature.GUEST_CRASH_REGS_AVAILABLE == 0


@pytest.mark.parametrize("cpu", [INTEL, AMD, vendor(b"HygonGenuine")])
def test_what_freebsd_asks_for(cpu: CpuidEntry) -> None:
    """``hyperv_identify()`` and the tests of its time and VMBus drivers, of FreeBSD 14.2."""
    leaves = build([cpu, INVARIANT_TSC])
    top, interface = leaves[0x40000000, 0], leaves[0x40000001, 0]
    assert struct.pack("<III", top.ebx, top.ecx, top.edx) == b"Microsoft Hv"
    assert top.eax >= 0x40000005
    assert interface.eax.to_bytes(4, "little") == b"Hv#1"
    privileges = leaves[0x40000003, 0].eax
    for needed in (
        HvPartitionPrivilege.ACCESS_HYPERCALL_MSRS,  # without it: no Hyper-V at all
        HvPartitionPrivilege.ACCESS_SYNIC_REGS,
        HvPartitionPrivilege.ACCESS_PARTITION_REFERENCE_COUNTER,  # its early delay
        HvPartitionPrivilege.ACCESS_PARTITION_REFERENCE_TSC,
        HvPartitionPrivilege.ACCESS_SYNTHETIC_TIMER_REGS,
        HvPartitionPrivilege.ACCESS_VP_INDEX,  # without it every CPU says 0
    ):
        assert privileges & needed, needed
    # The TSC page is only looked at on processors of these makers.
    assert leaves[0, 0] == cpu
