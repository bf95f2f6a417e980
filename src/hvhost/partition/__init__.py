"""What the hypervisor itself gives: CPUID, MSRs, SynIC, hypercalls, memory map, VP loop."""
