"""Panic texts as Linux writes them, of an NMI that met a processor deep in a system call."""

from __future__ import annotations

UNKNOWN_NMI = "panic nmi_panic unknown_nmi_error default_do_nmi exc_nmi end_repeat_nmi"


def nmi_text(chain: str, reason: str, depth: int) -> str:
    """The text of a panic for *reason*; *chain*: the functions between it and the code that it met.

    ``depth``: how many functions deep that code is.
    """
    frames = [f" {name}+0x{16 + at:x}/0x{64 + at:x}" for at, name in enumerate(chain.split())]
    code = "Code: 00 00 7f 1c 0f 1f 44 00 00 fb f4 <eb> fe cc cc cc cc 66 0f 1f 84 00 00 00"
    numbers = [
        f"R{at:02d}: ffff8{at:03x}0bca{at:04x} R{at + 1:02d}: {at:016x} R{at + 2:02d}: {at:016x}"
        for at in (8, 11)
    ]
    deep = [f" ext4_function_{at}+0x{at + 16:x}/0x{at + 400:x} [ext4]" for at in range(depth)]
    lines = [
        "Uhhuh. NMI received for unknown reason 00 on CPU 0.",
        f"Kernel panic - not syncing: {reason}",
        "CPU: 0 PID: 231 Comm: tar Not tainted 6.1.0-32-cloud-amd64 #1  Debian 6.1.129-1",
        "Hardware name: Microsoft Corporation Virtual Machine",
        "Call Trace:",
        " <NMI>",
        " dump_stack_lvl+0x44/0x5c",
        *frames,
        "RIP: 0010:mwait_idle+0x11/0x20",
        code,
        "RSP: 0018:ffffffff9d803e98 EFLAGS: 00000046",
        *numbers,
        " ? mwait_idle+0x11/0x20",
        " ? mwait_idle+0x11/0x20",
        " </NMI>",
        " <TASK>",
        *deep,
        " do_syscall_64+0x5b/0xc0",
        " entry_SYSCALL_64_after_hwframe+0x64/0xce",
        "RIP: 0033:0x7f1c0b5190a0",
        "RSP: 002b:00007ffd1a5c3a38 EFLAGS: 00000202 ORIG_RAX: 0000000000000001",
        " </TASK>",
        "Kernel Offset: 0x1b400000 from 0xffffffff81000000",
    ]
    return "\n".join(lines) + "\n"
