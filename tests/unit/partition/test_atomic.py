"""Bits that a guest clears do not come back because the host sets their neighbours."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time

import pytest

from hvhost.partition import atomic
from hvhost.partition.atomic import SharedBytes


def test_bits_are_added() -> None:
    memory = bytearray(b"\x01\x02\x04")
    shared = SharedBytes(memoryview(memory)[1:])
    shared.set_bits(0, 0x81)
    assert memory == b"\x01\x83\x04"
    shared.set_bits(0, 0x83)
    assert memory == b"\x01\x83\x04"
    shared.set_bits(1, 0x10)
    assert memory == b"\x01\x83\x14"
    for index in (2, -1):
        with pytest.raises(IndexError):
            shared.set_bits(index, 1)
    assert memory == b"\x01\x83\x14"


def test_where_no_code_may_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_locked_or", lambda: None)
    memory = bytearray(b"\x10")
    SharedBytes(memoryview(memory)).set_bits(0, 1)
    assert memory == b"\x11"


_GUEST = """
import ctypes, mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 4096)
# lock btrl $0, (%rdi); jnc back; inc %rax; cmp %rsi, %rax; jne back; ret -- counts bit 0's settings
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("31c0 f00fba3700 73f9 48ffc0 4839f0 75f1 c3"))
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
take = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)(address)
print("ready", flush=True)
take(ctypes.addressof(ctypes.c_char.from_buffer(memory)), int(sys.argv[2]))
print("took", flush=True)
"""


def test_a_guest_on_another_processor_sees_each_bit_once() -> None:
    """The host sets bit 0 whenever the guest took it, and bit 1 all the time."""
    count = 3000
    descriptor = os.memfd_create("flags")
    os.ftruncate(descriptor, 4096)
    memory = mmap.mmap(descriptor, 4096)
    view = memoryview(memory)[:1]
    shared = SharedBytes(view)
    guest = subprocess.Popen(
        [sys.executable, "-c", _GUEST, str(descriptor), str(count)],
        pass_fds=[descriptor],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert guest.stdout is not None
    try:
        assert guest.stdout.readline() == "ready\n"
        given, deadline = 0, time.monotonic() + 30
        while given < count:
            assert time.monotonic() < deadline, "the guest took more than it was given"
            shared.set_bits(0, 2)
            if not view[0] & 1:
                given += 1
                shared.set_bits(0, 1)
        assert guest.stdout.readline() == "took\n"
        assert guest.wait(60) == 0 and view[0] == 2, "a bit came back"
    finally:
        guest.kill()
        guest.wait()
        guest.stdout.close()
        os.close(descriptor)
