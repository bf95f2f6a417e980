"""What a machine's processes take from this computer, as its kernel counts it."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

from hvhost.units import KIB

_TIMES = (13, 14)  # utime and stime
_GUEST_TIME = 42
_RIG_MEMORY, _BLOCK = "/memfd:hvhost-rig", 512
_UCRED = struct.Struct("=iII")


def _cpu_seconds(process: Path, *fields: int) -> float:
    """The sum of *fields* of ``/proc/PID/stat``, counted from 0, which are in 1/100 s."""
    # The command in parentheses may hold spaces; fields are counted after it.
    values = (process / "stat").read_text().rpartition(")")[2].split()
    return sum(int(values[field - 2]) for field in fields) / 100


def emulator_seconds(rig: Path) -> float | None:
    """CPU seconds of the emulator behind the socket *rig*: its VPs' and what else it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(rig))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    keeper = _UCRED.unpack(credentials)[0]
    try:
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return sum(_cpu_seconds(Path("/proc", child), *_TIMES) for child in children)
    except FileNotFoundError:
        return None  # just gone, or this kernel does not list children


def guest_seconds(pid: int) -> float:
    """CPU seconds that the threads of *pid* spent in guest code."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(_cpu_seconds(task, _GUEST_TIME) for task in tasks.iterdir())


def memory_held(pid: int) -> int:
    """Bytes of this computer's memory behind the guest of the worker *pid*."""
    process = Path(f"/proc/{pid}")
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(_RIG_MEMORY):
                return link.stat().st_blocks * _BLOCK
    status = (process / "status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * KIB
