"""Synthetic model-specific registers, under the names of ``asm-generic/hyperv-tlfs.h``."""

from __future__ import annotations

HV_X64_MSR_GUEST_OS_ID = 0x40000000
HV_X64_MSR_CRASH_P0 = 0x40000100
HV_X64_MSR_CRASH_P4 = 0x40000104
HV_X64_MSR_CRASH_CTL = 0x40000105
CRASH_MSR_COUNT = 6
