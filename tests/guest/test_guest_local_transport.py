"""The local transport on a real ``/dev/kvm``: inside a software KVM host."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvhost.guests.build import GuestImages
from hvhost.guests.initramfs import READY_LINE

SECONDS = 200


@pytest.mark.timeout(SECONDS + 60)
def test_a_guest_boots_through_the_local_transport(one: GuestImages) -> None:
    """And a command in the software KVM host sees files and standard input; its status is kept."""
    run = [
        *(sys.executable, "-m", "hvhost", "run", "--kvm", "local", "--name", "inside"),
        *("--kernel", str(one.kernel), "--initrd", str(one.initrd), "--cpus", "2"),
    ]
    script = (
        "cat; test -c /dev/kvm && test -f /etc/passwd && touch /gone || exit 1; "
        "grep Cpus_allowed_list /proc/self/status >&2; "
        f"{shlex.join(run)} </dev/null >/run/console & "
        f"for second in $(seq {SECONDS}); do"
        f" grep -q '{READY_LINE}' /run/console && break; sleep 1; done; "
        "cat /run/console; kill $!; exit 7"
    )
    done = subprocess.run(
        [sys.executable, "-m", "hvhost", "rig", "exec", "--", "sh", "-c", script],
        input=b"from outside\n",
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    console = done.stdout.decode(errors="replace")
    assert done.returncode == 7, console + done.stderr.decode()
    assert console.startswith("from outside\n")
    assert not Path("/gone").exists(), "what it writes stays in it"
    assert b"Cpus_allowed_list:\t1-" in done.stderr  # no guest on the first, see qemu.py
    assert "Hypervisor detected: Microsoft Hyper-V" in console, console + done.stderr.decode()
    assert "Vmbus version:" in console
    assert "Heartbeat IC version 3" in console
    assert READY_LINE in console
    assert "smp: Brought up 1 node, 2 CPUs" in console
