"""What a process that serves a guest's disks may not do any more, by seccomp(2).

It reads and writes files, and talks to its worker over a socket that is open already. So it starts
no program and no process, opens no socket, looks into no other process, and leaves the kernel's
administration alone; such a call fails with EPERM. It still opens whatever files its user may:
people attach disks while it runs.

Numbers are those of ``asm/unistd_64.h``, structures those of ``linux/filter.h``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
from typing import Final

log = logging.getLogger(__name__)

_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_SYSCALL_BIT: Final = 0x40000000
_CLONE_THREAD: Final = 0x10000
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
# struct seccomp_data
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE, _CLONE3 = 56, 435
DENIED: Final = {
    "socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288,
    "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "ptrace": 101,
    "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_getfd": 438, "kcmp": 312,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272,
    "init_module": 175, "delete_module": 176, "finit_module": 313, "kexec_load": 246,
    "kexec_file_load": 320, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "add_key": 248, "request_key": 249, "keyctl": 250, "reboot": 169, "settimeofday": 164,
    "clock_settime": 227, "iopl": 172, "ioperm": 173, "io_uring_setup": 425,
}  # fmt: skip


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """``struct sock_filter``."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def program() -> bytes:
    """The filter: an array of ``struct sock_filter``."""
    lines = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_IF_EQUAL, _AUDIT_ARCH_X86_64, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_IF_SET, _X32_SYSCALL_BIT, 0, 1),
        _instruction(_RETURN, _KILL),
        # The C library makes threads by clone() where there is no clone3().
        _instruction(_JUMP_IF_EQUAL, _CLONE3, 0, 1),
        _instruction(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in DENIED.values():
        lines += [
            _instruction(_JUMP_IF_EQUAL, number, 0, 1),
            _instruction(_RETURN, _ERRNO | _EPERM),
        ]
    lines += [
        _instruction(_JUMP_IF_EQUAL, _CLONE, 0, 3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_JUMP_IF_SET, _CLONE_THREAD, 1, 0),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(lines)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine() -> None:
    """From now on, for this process and all its threads to come; before it has others.

    A kernel that cannot do it is no reason not to go on: a line in the log says so.
    """
    if platform.machine() != "x86_64":
        log.warning("the storage process is not confined: its filter is for x86-64")
        return
    content = program()
    filter_program = _Program(len(content) // 8, content)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_program), 0, 0
    ):
        reason = os.strerror(ctypes.get_errno())
        log.warning("the storage process is not confined: this kernel has no seccomp (%s)", reason)
