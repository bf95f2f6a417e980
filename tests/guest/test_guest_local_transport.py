"""The local transport on a real ``/dev/kvm``: inside a software KVM host."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from guest.matrix import only_in_matrix
from hvhost.guests.build import GuestImages
from hvhost.guests.initramfs import READY_LINE

SECONDS = 200
DISK_BYTES = 1 << 20
WRITTEN = "written by the guest"
ROOT = Path(__file__).parents[2]
TRANSPORT_TESTS = Path("tests/unit/kvm/test_kvm_transports.py")


def in_software_host(script: str, seconds: float) -> subprocess.CompletedProcess[bytes]:
    """What *script* does in a software KVM host, whose standard input is a line of ours."""
    return subprocess.run(
        [sys.executable, "-m", "hvhost", "rig", "exec", "--", "sh", "-c", script],
        input=b"from outside\n",
        capture_output=True,
        timeout=seconds,
        check=False,
    )


@pytest.mark.timeout(SECONDS + 60)
def test_a_guest_boots_through_the_local_transport(one: GuestImages) -> None:
    """And a command in the software KVM host sees files and standard input; its status is kept."""
    hvhost = shlex.join([sys.executable, "-m", "hvhost"])
    run = ["run", "--kvm", "local", "--name", "inside", "--cpus", "2"]
    images = ["--kernel", str(one.kernel), "--initrd", str(one.initrd)]
    script = (
        "cat; test -c /dev/kvm && test -f /etc/passwd && touch /gone || exit 1; "
        "grep Cpus_allowed_list /proc/self/status >&2; "
        f"{hvhost} {shlex.join([*run, *images])} </dev/null >/run/console & "
        # On the console a message of the kernel may stand in the middle of that line.
        f"until {hvhost} exec inside -- dmesg 2>/dev/null | grep -q '{READY_LINE}'; do"
        " sleep 1; done; "
        "cat /run/console; kill $!; exit 7"
    )
    done = in_software_host(script, SECONDS)
    console = done.stdout.decode(errors="replace")
    assert done.returncode == 7, console + done.stderr.decode()
    assert console.startswith("from outside\n")
    assert not Path("/gone").exists(), "what it writes stays in it"
    assert b"Cpus_allowed_list:\t1-" in done.stderr  # no guest on the first, see qemu.py
    assert "Hypervisor detected: Microsoft Hyper-V" in console, console + done.stderr.decode()
    assert "Vmbus version:" in console
    assert "Heartbeat IC version 3" in console
    assert "smp: Brought up 1 node, 2 CPUs" in console


@only_in_matrix("minutes")
@pytest.mark.timeout(900)
def test_disks_of_a_guest_on_a_real_kvm_are_served_by_a_process(one: GuestImages) -> None:
    """``--storage-process`` where guest memory is a file of ours and KVM wakes the process itself.

    What the guest reads and writes is told by its own programs and by the image.
    """
    hvhost = shlex.join([sys.executable, "-m", "hvhost"])
    script = f"""
        set -e
        head -c {DISK_BYTES} /dev/urandom >/run/disk.img
        sha256sum </run/disk.img
        {hvhost} run --kvm local --name inside --kernel {one.kernel} --initrd {one.initrd} \
            --disk /run/disk.img --storage-process --detach >&2
        for second in $(seq 100); do
            {hvhost} exec inside -- test -b /dev/sda 2>/dev/null && break; sleep 1; done
        {hvhost} exec inside -- sh -c 'sha256sum </dev/sda'
        {hvhost} exec inside -- sh -c 'echo {WRITTEN} | dd of=/dev/sda bs=4096 conv=sync,fsync' >&2
        head -n 1 /run/disk.img
        for process in /proc/[0-9]*; do
            tr '\\0' ' ' <$process/cmdline 2>/dev/null |
                grep -o 'hvhost.storage.proces[s]' || :; done
        {hvhost} stop --force inside >&2
    """
    done = in_software_host(script, 800)
    told = done.stdout.decode(errors="replace").splitlines()
    assert done.returncode == 0, (told, done.stderr.decode())
    digest, seen, written, *processes = told
    assert seen == digest, "the guest reads what is in the image"
    assert written == WRITTEN
    assert processes == ["hvhost.storage.process"]


def tests_of_the_local_transport() -> list[str]:
    """Those that are skipped where no ``/dev/kvm`` makes machines, without those of the rig."""
    source = (ROOT / TRANSPORT_TESTS).read_text()
    of_each = re.findall(r"^def (test_\w+)\(transport: Any\)", source, re.MULTILINE)
    alone = re.findall(r"^@needs_kvm\ndef (test_\w+)\(\)", source, re.MULTILINE)
    assert len(of_each) > 10 and len(alone) > 2
    return [*(f"{name}[local]" for name in of_each), *alone]


@only_in_matrix("minutes")
@pytest.mark.timeout(1800)
def test_the_local_transport_does_with_a_real_kvm_what_its_tests_say() -> None:
    names = tests_of_the_local_transport()
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    words += ["-o", "timeout=600", "--junitxml=/run/report.xml"]
    words += [f"{TRANSPORT_TESTS}::{name}" for name in names]
    script = f"cd {ROOT} && {shlex.join(words)} >&2; cat /run/report.xml"
    done = in_software_host(script, 1700)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0 and done.stdout, said
    ran = {
        case.get("name", ""): list(case)
        for case in ElementTree.fromstring(done.stdout).iter("testcase")
    }
    assert sorted(ran) == sorted(names), said
    unwell = {name: [part.tag for part in parts] for name, parts in ran.items() if parts}
    assert not unwell, f"{unwell} have failed or been skipped: {said}"
