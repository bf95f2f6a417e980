"""What CPUID tells a guest: the processor KVM offers, dressed as a Hyper-V guest's.

Sources: [TLFS] chapter 2 (leaves 0x40000000 to 0x40000006) with the names of its privilege
structures; Intel SDM volume 2 and AMD APM volume 3 for the architectural leaves.

Hyper-V features are KVM's own list (``KVM_GET_SUPPORTED_HV_CPUID``) less what a guest may not
have: nothing is promised that KVM does not do, except the crash registers, which hvhost itself
serves.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from hvhost.errors import HvHostError

SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

HYPERVISOR_VENDOR = b"Microsoft Hv"
HYPERVISOR_INTERFACE = b"Hv#1"
# Windows Server 2022, 10.0.20348.1 in the guest's log.
HOST_BUILD, HOST_MAJOR, HOST_MINOR, HOST_SERVICE_NUMBER = 20348, 10, 0, 1


class CpuidEntry(NamedTuple):
    """One leaf as in ``struct kvm_cpuid_entry2``; *index* counts only with SIGNIFICANT_INDEX."""

    function: int
    index: int = 0  # type: ignore[assignment] # not the tuple's method
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class HypervisorLeaf(IntEnum):
    """[TLFS] 2.4."""

    VENDOR_AND_MAX_FUNCTION = 0x40000000
    INTERFACE = 0x40000001
    VERSION = 0x40000002
    FEATURES = 0x40000003
    ENLIGHTENMENT_INFORMATION = 0x40000004
    IMPLEMENTATION_LIMITS = 0x40000005
    HARDWARE_FEATURES = 0x40000006


class HvPartitionPrivilege:
    """HV_PARTITION_PRIVILEGE_MASK ([TLFS] 4.2.2): leaf 0x40000003, EAX (low) and EBX (high)."""

    ACCESS_VP_RUN_TIME_REG = 1 << 0
    ACCESS_PARTITION_REFERENCE_COUNTER = 1 << 1
    ACCESS_SYNIC_REGS = 1 << 2
    ACCESS_SYNTHETIC_TIMER_REGS = 1 << 3
    ACCESS_INTR_CTRL_REGS = 1 << 4
    ACCESS_HYPERCALL_MSRS = 1 << 5
    ACCESS_VP_INDEX = 1 << 6
    ACCESS_RESET_REG = 1 << 7
    ACCESS_STATS_REG = 1 << 8
    ACCESS_PARTITION_REFERENCE_TSC = 1 << 9
    ACCESS_GUEST_IDLE_REG = 1 << 10
    ACCESS_FREQUENCY_REGS = 1 << 11
    ACCESS_DEBUG_REGS = 1 << 12
    ACCESS_REENLIGHTENMENT_CONTROLS = 1 << 13
    ACCESS_ROOT_SCHEDULER_REG = 1 << 14
    ACCESS_TSC_INVARIANT_CONTROLS = 1 << 15
    CREATE_PARTITIONS = 1 << 32
    ACCESS_PARTITION_ID = 1 << 33
    ACCESS_MEMORY_POOL = 1 << 34
    POST_MESSAGES = 1 << 36
    SIGNAL_EVENTS = 1 << 37
    CREATE_PORT = 1 << 38
    CONNECT_PORT = 1 << 39
    ACCESS_STATS = 1 << 40
    DEBUGGING = 1 << 43
    CPU_MANAGEMENT = 1 << 44
    ACCESS_VSM = 1 << 48
    ACCESS_VP_REGISTERS = 1 << 49
    ENABLE_EXTENDED_HYPERCALLS = 1 << 52
    START_VIRTUAL_PROCESSOR = 1 << 53
    ISOLATION = 1 << 54


class HvFeature:
    """Leaf 0x40000003, EDX: what the hypervisor offers beyond privileges."""

    MWAIT_AVAILABLE = 1 << 0
    GUEST_DEBUGGING_AVAILABLE = 1 << 1
    PERFORMANCE_MONITOR_AVAILABLE = 1 << 2
    CPU_DYNAMIC_PARTITIONING_AVAILABLE = 1 << 3
    XMM_REGISTERS_FOR_FAST_HYPERCALL_AVAILABLE = 1 << 4
    GUEST_IDLE_AVAILABLE = 1 << 5
    HYPERVISOR_SLEEP_STATE_AVAILABLE = 1 << 6
    NUMA_DISTANCE_QUERY_AVAILABLE = 1 << 7
    FREQUENCY_REGS_AVAILABLE = 1 << 8
    SYNTHETIC_MACHINE_CHECK_AVAILABLE = 1 << 9
    GUEST_CRASH_REGS_AVAILABLE = 1 << 10
    DEBUG_REGS_AVAILABLE = 1 << 11
    NPIEP1_AVAILABLE = 1 << 12
    DISABLE_HYPERVISOR_AVAILABLE = 1 << 13
    EXTENDED_GVA_RANGES_FOR_FLUSH_VIRTUAL_ADDRESS_LIST_AVAILABLE = 1 << 14
    XMM_REGISTERS_FOR_FAST_HYPERCALL_OUTPUT_AVAILABLE = 1 << 15
    SINT_POLLING_MODE_AVAILABLE = 1 << 17
    HYPERCALL_MSR_LOCK_AVAILABLE = 1 << 18
    USE_DIRECT_SYNTHETIC_TIMERS = 1 << 19


class HvRecommendation:
    """Leaf 0x40000004, EAX: what the guest had better do."""

    HYPERCALL_FOR_ADDRESS_SPACE_SWITCH = 1 << 0
    HYPERCALL_FOR_LOCAL_FLUSH = 1 << 1
    HYPERCALL_FOR_REMOTE_FLUSH = 1 << 2
    MSRS_FOR_APIC_ACCESS = 1 << 3
    MSR_FOR_SYSTEM_RESET = 1 << 4
    RELAXED_TIMING = 1 << 5
    DMA_REMAPPING = 1 << 6
    INTERRUPT_REMAPPING = 1 << 7
    DEPRECATE_AUTO_EOI = 1 << 9
    SYNTHETIC_CLUSTER_IPI_HYPERCALL = 1 << 10
    EX_PROCESSOR_MASKS = 1 << 11
    HYPERVISOR_IS_NESTED = 1 << 12
    INT_FOR_MBEC_SYSTEM_CALLS = 1 << 13
    ENLIGHTENED_VMCS = 1 << 14
    SYNCED_TIMELINE = 1 << 15
    DIRECT_LOCAL_FLUSH_ENTIRE = 1 << 17
    NO_NON_ARCHITECTURAL_CORE_SHARING = 1 << 18


class HvHardwareFeature:
    """Leaf 0x40000006, EAX: hardware the hypervisor makes use of."""

    APIC_OVERLAY_ASSIST = 1 << 0
    MSR_BITMAPS = 1 << 1
    ARCHITECTURAL_PERFORMANCE_COUNTERS = 1 << 2
    SECOND_LEVEL_ADDRESS_TRANSLATION = 1 << 3


# Without these no guest finds the bus: Linux wants the hypercall page and VP index, both guests
# the SynIC, and FreeBSD panics in its early delay without the reference counter.
REQUIRED_PRIVILEGES = (
    HvPartitionPrivilege.ACCESS_PARTITION_REFERENCE_COUNTER
    | HvPartitionPrivilege.ACCESS_SYNIC_REGS
    | HvPartitionPrivilege.ACCESS_HYPERCALL_MSRS
    | HvPartitionPrivilege.ACCESS_VP_INDEX
)
# What a child partition may have at all. CREATE_PARTITIONS or CPU_MANAGEMENT would make Linux
# believe it is the root partition; ISOLATION a confidential VM.
GUEST_PRIVILEGES = (
    REQUIRED_PRIVILEGES
    | HvPartitionPrivilege.ACCESS_VP_RUN_TIME_REG
    | HvPartitionPrivilege.ACCESS_SYNTHETIC_TIMER_REGS
    | HvPartitionPrivilege.ACCESS_INTR_CTRL_REGS
    | HvPartitionPrivilege.ACCESS_RESET_REG
    | HvPartitionPrivilege.ACCESS_PARTITION_REFERENCE_TSC
    | HvPartitionPrivilege.ACCESS_FREQUENCY_REGS
    | HvPartitionPrivilege.ACCESS_REENLIGHTENMENT_CONTROLS
    | HvPartitionPrivilege.ACCESS_TSC_INVARIANT_CONTROLS
    | HvPartitionPrivilege.POST_MESSAGES
    | HvPartitionPrivilege.SIGNAL_EVENTS
)
GUEST_FEATURES = (
    HvFeature.XMM_REGISTERS_FOR_FAST_HYPERCALL_AVAILABLE
    | HvFeature.FREQUENCY_REGS_AVAILABLE
    | HvFeature.EXTENDED_GVA_RANGES_FOR_FLUSH_VIRTUAL_ADDRESS_LIST_AVAILABLE
    | HvFeature.XMM_REGISTERS_FOR_FAST_HYPERCALL_OUTPUT_AVAILABLE
    | HvFeature.USE_DIRECT_SYNTHETIC_TIMERS
)
GUEST_RECOMMENDATIONS = (
    HvRecommendation.HYPERCALL_FOR_REMOTE_FLUSH
    | HvRecommendation.MSRS_FOR_APIC_ACCESS
    | HvRecommendation.RELAXED_TIMING
    | HvRecommendation.DEPRECATE_AUTO_EOI
    | HvRecommendation.SYNTHETIC_CLUSTER_IPI_HYPERCALL
    | HvRecommendation.EX_PROCESSOR_MASKS
    | HvRecommendation.NO_NON_ARCHITECTURAL_CORE_SHARING
)


# Leaf 1, ECX, and the other architectural bits that are changed here.
_LEAF1_ECX_VMX = 1 << 5
_LEAF1_ECX_FMA = 1 << 12
_LEAF1_ECX_XSAVE = 1 << 26
_LEAF1_ECX_OSXSAVE = 1 << 27
_LEAF1_ECX_AVX = 1 << 28
_LEAF1_ECX_F16C = 1 << 29
_LEAF1_ECX_HYPERVISOR = 1 << 31
_LEAF1_EDX_HTT = 1 << 28
_EXTENDED1_ECX_CMP_LEGACY = 1 << 1
_EXTENDED1_ECX_SVM = 1 << 2
_EXTENDED1_ECX_TOPOLOGY_EXTENSIONS = 1 << 22
_LEAF_POWER, _POWER_EDX_INVARIANT_TSC = 0x80000007, 1 << 8
_LEAF_SVM, _LEAF_XSAVE, _LEAF_SGX = 0x8000000A, 0xD, 0x12
_LEAF_TOPOLOGY, _LEAF_TOPOLOGY_V2, _LEAF_AMD_TOPOLOGY_V2 = 0xB, 0x1F, 0x80000026

# Everything that needs XSAVE to be enabled: AVX and its kin, MPX, PKU, AMX.
_LEAF1_ECX_NEEDING_XSAVE = (
    _LEAF1_ECX_FMA | _LEAF1_ECX_XSAVE | _LEAF1_ECX_OSXSAVE | _LEAF1_ECX_AVX | _LEAF1_ECX_F16C
)


def _bits(*positions: int) -> int:
    return sum(1 << position for position in positions)


_LEAF7_EBX_NEEDING_XSAVE = _bits(5, 14, 16, 17, 21, 26, 27, 28, 30, 31)
_LEAF7_ECX_NEEDING_XSAVE = _bits(1, 3, 4, 6, 9, 10, 11, 12, 14)
_LEAF7_EDX_NEEDING_XSAVE = _bits(2, 3, 8, 22, 23, 24, 25)
_LEAF7_1_EAX_NEEDING_XSAVE = _bits(0, 1, 2, 4, 5, 21, 23)
_LEAF7_1_EDX_NEEDING_XSAVE = _bits(4, 5, 8, 10, 19)
_EXTENDED1_ECX_NEEDING_XSAVE = _bits(11, 15, 16)


def build_cpuid(
    supported: Sequence[CpuidEntry],
    hyperv: Sequence[CpuidEntry],
    *,
    vp_index: int,
    processors: int,
    xsave: bool = True,
    extended_hypercalls: bool = False,
) -> list[CpuidEntry]:
    """The leaves of VP *vp_index* of *processors*, for ``KVM_SET_CPUID2``.

    *supported* and *hyperv* are what ``KVM_GET_SUPPORTED_CPUID`` and
    ``KVM_GET_SUPPORTED_HV_CPUID`` gave. APIC ids are VP indices; all processors are cores of one
    package. *xsave* false hides XSAVE and all that builds on it (emulated processors get it
    wrong); *extended_hypercalls* says that somebody answers hypercalls from 0x8001 on.
    :class:`HvHostError` if KVM lacks what every guest needs.
    """
    amd = any(
        entry.function == 0 and _vendor(entry) in (b"AuthenticAMD", b"HygonGenuine")
        for entry in supported
    )
    max_leaf = max((entry.eax for entry in supported if entry.function == 0), default=0)
    entries = []
    for entry in supported:
        adapted = _adapt(entry, vp_index, processors, amd=amd)
        if adapted is not None and not xsave:
            adapted = _without_xsave(adapted)
        if adapted is not None:
            entries.append(adapted)
    if max_leaf >= _LEAF_TOPOLOGY:
        entries += _topology(vp_index, processors)
    invariant_tsc = any(
        entry.function == _LEAF_POWER and entry.edx & _POWER_EDX_INVARIANT_TSC
        for entry in supported
    )
    entries += _hypervisor_leaves(hyperv, processors, extended_hypercalls, invariant_tsc)
    return entries


def address_bits(supported: Sequence[CpuidEntry]) -> int:
    """Bits of a physical address of these processors: leaf 0x80000008, EAX; 36 where it is none."""
    for entry in supported:
        if entry.function == 0x80000008:
            return entry.eax & 0xFF
    return 36


def _vendor(leaf0: CpuidEntry) -> bytes:
    return struct.pack("<III", leaf0.ebx, leaf0.edx, leaf0.ecx)


def _apic_id_bits(processors: int) -> int:
    """Bits of an APIC id that tell the processors of a package apart."""
    return max(0, processors - 1).bit_length()


def _adapt(entry: CpuidEntry, vp_index: int, processors: int, *, amd: bool) -> CpuidEntry | None:
    function = entry.function
    id_bits = _apic_id_bits(processors)
    if 0x40000000 <= function <= 0x4000FFFF:
        return None
    if function in (_LEAF_TOPOLOGY, _LEAF_TOPOLOGY_V2, _LEAF_AMD_TOPOLOGY_V2):
        return None
    if function in (_LEAF_SVM, _LEAF_SGX):
        return None
    if function == 1:
        logical = min(1 << id_bits, 255)
        return entry._replace(
            ebx=entry.ebx & 0xFFFF | logical << 16 | (vp_index & 0xFF) << 24,
            ecx=entry.ecx & ~(_LEAF1_ECX_VMX | _LEAF1_ECX_OSXSAVE) | _LEAF1_ECX_HYPERVISOR,
            edx=_with(entry.edx, _LEAF1_EDX_HTT, processors > 1),
        )
    if function in (4, 0x8000001D):
        # Cache parameters: only the last level is shared. Intel also puts the cores here.
        level = entry.eax >> 5 & 7
        if not entry.eax & 0x1F:
            return entry  # the end of the list
        sharing = min((1 << id_bits) - 1, 0xFFF) if level >= 3 else 0
        cores = min((1 << id_bits) - 1, 0x3F) if function == 4 else 0
        return entry._replace(eax=entry.eax & 0x3FFF | sharing << 14 | cores << 26)
    if function == 0x80000001:
        ecx = _with(entry.ecx & ~_EXTENDED1_ECX_SVM, _EXTENDED1_ECX_CMP_LEGACY, amd)
        if processors == 1:
            ecx &= ~_EXTENDED1_ECX_CMP_LEGACY
        return entry._replace(ecx=ecx)
    if function == 0x80000008 and amd:
        cores = min(processors - 1, 0xFF)
        return entry._replace(ecx=entry.ecx & ~0xF0FF | cores | min(id_bits, 15) << 12)
    if function == 0x8000001E:
        # Extended APIC id; core id with one thread per core; one node per package.
        return entry._replace(eax=vp_index, ebx=vp_index & 0xFF, ecx=0, edx=0)
    return entry


def _with(value: int, bit: int, on: bool) -> int:
    return value | bit if on else value & ~bit


def _without_xsave(entry: CpuidEntry) -> CpuidEntry | None:
    if entry.function == _LEAF_XSAVE:
        return None
    if entry.function == 1:
        return entry._replace(ecx=entry.ecx & ~_LEAF1_ECX_NEEDING_XSAVE)
    if entry.function == 7 and entry.index == 0:
        return entry._replace(
            ebx=entry.ebx & ~_LEAF7_EBX_NEEDING_XSAVE,
            ecx=entry.ecx & ~_LEAF7_ECX_NEEDING_XSAVE,
            edx=entry.edx & ~_LEAF7_EDX_NEEDING_XSAVE,
        )
    if entry.function == 7 and entry.index == 1:
        return entry._replace(
            eax=entry.eax & ~_LEAF7_1_EAX_NEEDING_XSAVE,
            edx=entry.edx & ~_LEAF7_1_EDX_NEEDING_XSAVE,
        )
    if entry.function == 0x80000001:
        return entry._replace(ecx=entry.ecx & ~_EXTENDED1_ECX_NEEDING_XSAVE)
    return entry


def _topology(vp_index: int, processors: int) -> list[CpuidEntry]:
    """Leaf 0xb: one thread per core, all cores in one package, and the end of the list."""
    thread, core = 1, 2
    levels = ((thread, 0, 1), (core, _apic_id_bits(processors), processors))
    entries = [
        CpuidEntry(
            _LEAF_TOPOLOGY,
            index,
            SIGNIFICANT_INDEX,
            eax=shift,
            ebx=count & 0xFFFF,
            ecx=index | level << 8,
            edx=vp_index,
        )
        for index, (level, shift, count) in enumerate(levels)
    ]
    entries.append(CpuidEntry(_LEAF_TOPOLOGY, 2, SIGNIFICANT_INDEX, ecx=2, edx=vp_index))
    return entries


def _hypervisor_leaves(
    hyperv: Sequence[CpuidEntry],
    processors: int,
    extended_hypercalls: bool,
    invariant_tsc: bool,
) -> list[CpuidEntry]:
    given = {entry.function: entry for entry in hyperv}
    none = CpuidEntry(0)
    features = given.get(HypervisorLeaf.FEATURES, none)
    offered = features.eax | features.ebx << 32
    if missing := REQUIRED_PRIVILEGES & ~offered:
        flags = vars(HvPartitionPrivilege).items()
        names = ", ".join(name for name, bit in flags if isinstance(bit, int) and bit & missing)
        raise HvHostError(
            f"this KVM cannot play Hyper-V: it lacks {names}; "
            "use a newer kernel, or --kvm rig to run on a KVM in software."
        )
    allowed = GUEST_PRIVILEGES
    if extended_hypercalls:
        allowed |= HvPartitionPrivilege.ENABLE_EXTENDED_HYPERCALLS
    if not invariant_tsc:
        # KVM offers the control everywhere; with it Linux would trust a TSC that may change its
        # rate, and keep time by it instead of by the reference TSC page.
        allowed &= ~HvPartitionPrivilege.ACCESS_TSC_INVARIANT_CONTROLS
    privileges = offered & allowed
    recommendations = given.get(HypervisorLeaf.ENLIGHTENMENT_INFORMATION, none)
    limits = given.get(HypervisorLeaf.IMPLEMENTATION_LIMITS, none)
    vendor = struct.unpack("<III", HYPERVISOR_VENDOR)
    return [
        CpuidEntry(
            HypervisorLeaf.VENDOR_AND_MAX_FUNCTION,
            eax=HypervisorLeaf.HARDWARE_FEATURES,
            ebx=vendor[0],
            ecx=vendor[1],
            edx=vendor[2],
        ),
        CpuidEntry(HypervisorLeaf.INTERFACE, eax=int.from_bytes(HYPERVISOR_INTERFACE, "little")),
        CpuidEntry(
            HypervisorLeaf.VERSION,
            eax=HOST_BUILD,
            ebx=HOST_MAJOR << 16 | HOST_MINOR,
            edx=HOST_SERVICE_NUMBER,
        ),
        CpuidEntry(
            HypervisorLeaf.FEATURES,
            eax=privileges & 0xFFFFFFFF,
            ebx=privileges >> 32,
            edx=features.edx & GUEST_FEATURES | HvFeature.GUEST_CRASH_REGS_AVAILABLE,
        ),
        CpuidEntry(
            HypervisorLeaf.ENLIGHTENMENT_INFORMATION,
            eax=recommendations.eax & GUEST_RECOMMENDATIONS,
            ebx=recommendations.ebx,
        ),
        CpuidEntry(
            HypervisorLeaf.IMPLEMENTATION_LIMITS,
            eax=max(limits.eax, processors),
            ebx=max(limits.ebx, processors),
            ecx=limits.ecx,
        ),
        CpuidEntry(
            HypervisorLeaf.HARDWARE_FEATURES,
            eax=HvHardwareFeature.MSR_BITMAPS | HvHardwareFeature.SECOND_LEVEL_ADDRESS_TRANSLATION,
        ),
    ]
