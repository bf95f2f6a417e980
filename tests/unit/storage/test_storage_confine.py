"""What a confined process may not do, tried by one."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvhost.storage.confine import DENIED, confine

_CONFINED = """
import ctypes, os, sys, threading
from hvhost.storage.confine import confine

confine()
syscall = ctypes.CDLL(None, use_errno=True).syscall
results = []

def call(number, *arguments):
    ctypes.set_errno(0)
    return ctypes.get_errno() if syscall(number, *arguments) < 0 else 0

def all_calls():
    for number in map(int, sys.argv[1:]):
        # Arguments that do no harm where the call is let through: no pointer, no descriptor.
        results.append(call(number, -1, 0, 0, 0, 0, 0) if number not in (57, 58) else call(number))

all_calls()
thread = threading.Thread(target=all_calls)  # threads can be made, and are no way out
thread.start()
thread.join()
try:
    os.fork()
    results.append(0)
except OSError as error:
    results.append(error.errno)
with open("/proc/self/status") as file:
    assert "Seccomp:\\t2" in file.read()
print(*results)
"""


def test_denied_calls_fail_in_every_thread() -> None:
    numbers = [str(number) for number in DENIED.values()]
    done = subprocess.run(
        [sys.executable, "-c", _CONFINED, *numbers], stdout=subprocess.PIPE, check=True, timeout=60
    )
    results = [int(each) for each in done.stdout.split()]
    names = [*DENIED, *DENIED, "os.fork"]
    assert {
        name: result for name, result in zip(names, results, strict=True) if result != errno.EPERM
    } == {}


def test_numbers_are_this_kernels() -> None:
    """Unconfined, a few of them do what their names say."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    if os.uname().machine != "x86_64":
        pytest.skip("numbers are those of x86-64")
    descriptor = syscall(DENIED["socket"], 1, 1, 0)
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("socket:")
    os.close(descriptor)
    assert syscall(DENIED["kill"], os.getpid(), 0) == 0


class Kernel:
    """A C library whose ``prctl`` refuses the option *refused*."""

    def __init__(self, refused: int = 0) -> None:
        self.refused, self.called = refused, list[int]()

    def prctl(self, option: int, *_: object) -> int:
        self.called.append(option)
        ctypes.set_errno(errno.EINVAL)
        return -1 if option == self.refused else 0


@pytest.mark.parametrize(
    ("machine", "refused", "called", "said"),
    [
        ("x86_64", 0, [38, 22], None),
        ("x86_64", 38, [38], "has no seccomp (Invalid argument)"),
        ("x86_64", 22, [38, 22], "has no seccomp (Invalid argument)"),
        ("aarch64", 0, [], "its filter is for x86-64"),
    ],
)
def test_a_computer_that_cannot_confine_says_so(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    machine: str,
    refused: int,
    called: list[int],
    said: str | None,
) -> None:
    """PR_SET_NO_NEW_PRIVS is 38, PR_SET_SECCOMP 22; this process is not confined by the test."""
    kernel = Kernel(refused)
    monkeypatch.setattr("hvhost.storage.confine.platform.machine", lambda: machine)
    monkeypatch.setattr("hvhost.storage.confine.ctypes.CDLL", lambda *_, **__: kernel)
    confine()
    assert kernel.called == called
    if said is None:
        assert caplog.messages == []
    else:
        (line,) = caplog.messages
        assert said in line
