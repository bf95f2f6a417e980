"""Runs inside a software KVM host: fio in a guest, on one block device behind three kinds of disk.

``python -m bench.storage_inside KERNEL INITRD ROUNDS`` prints one JSON object: for each kind of
disk and each of :data:`JOBS`, a list of pairs: transfers a second as fio in the guest counts them,
and seconds of processor that the host's program used in a second of that, without what its guest
used. hvhost has one machine, QEMU another with both of its disks; device, kernel and memory are the
same, and both go through the host's page cache, which holds all of it. It is a loop device, because
the files there are in a tmpfs, which cannot tell whether a read would wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.inside_guests import LINKER, Start, Started, hvhost, qemu
from hvhost.errors import HvHostError

FILE, DEVICE, SIZE_MIB = Path("/var/tmp/bench-disk.img"), "/dev/loop0", 128
#: What fio does, by a name for it: the pattern, the bytes of a transfer, how many are under way.
JOBS: dict[str, tuple[str, int, int]] = {
    "read 4 KiB, depth 1": ("randread", 4 << 10, 1),
    "read 4 KiB, depth 32": ("randread", 4 << 10, 32),
    "write 4 KiB, depth 32": ("randwrite", 4 << 10, 32),
    "read 1 MiB, depth 4": ("read", 1 << 20, 4),
}
RUN_SECONDS, MEASURED_SECONDS, WAIT_SECONDS = 9, 5.0, 180.0
_LOOKS = 450  # five a second at most
#: Program, words for the disk, and what the disk is in the guest.
MACHINES: tuple[tuple[Start, list[str], dict[str, str]], ...] = (
    (hvhost, ["--disk", DEVICE], {"hvhost": "sda"}),
    (
        qemu,
        [
            *("-drive", f"file={DEVICE},format=raw,if=none,id=blk,file.locking=off"),
            *("-drive", f"file={DEVICE},format=raw,if=none,id=scsi,file.locking=off"),
            *("-device", "virtio-blk-pci,drive=blk"),
            *("-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,drive=scsi,bus=bus.0"),
        ],
        {"virtio-blk": "vda", "virtio-scsi": "sda"},
    ),
)
_TICKS = os.sysconf("SC_CLK_TCK")


def processor_seconds(pid: int) -> float:
    """What a program used in all its threads, without what ran in a guest (``proc(5)``)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, guest = (int(fields[number]) for number in (11, 12, 40))
    return (user + system - guest) / _TICKS


def measure(machine: Started, disk: str, pattern: str, size: int, depth: int) -> list[float]:
    """Transfers a second, and seconds of processor in each."""
    words = (
        f"--name=bench --filename=/dev/{disk} --direct=1 --ioengine=libaio --thread --rw={pattern}"
        f" --bs={size} --iodepth={depth} --time_based --runtime={RUN_SECONDS}"
        " --disk_util=0 --output-format=json --output=/tmp/fio.json"
    )
    fio = f"{LINKER} /bench/fio {words} >/tmp/fio.log 2>&1; echo $? >/tmp/fio.status"
    # Begun is what has moved something.
    counters = f"cat /sys/block/{disk}/stat"
    machine.run(
        f"set -e; rm -f /tmp/fio.*; before=$({counters});"
        f" setsid sh -c '{fio}' </dev/null >/dev/null 2>&1 &"
        f' n=0; while [ "$({counters})" = "$before" ]; do n=$((n+1)); [ $n -lt {_LOOKS} ];'
        " sleep 0.2; done; sleep 1",
        WAIT_SECONDS,
    )
    start, used = time.perf_counter(), processor_seconds(machine.pid)
    time.sleep(MEASURED_SECONDS)
    load = (processor_seconds(machine.pid) - used) / (time.perf_counter() - start)
    told = machine.run(
        f"set -e; n=0; until [ -s /tmp/fio.status ]; do n=$((n+1)); [ $n -lt {_LOOKS} ];"
        " sleep 0.2; done; cat /tmp/fio.json",
        WAIT_SECONDS,
    )
    try:
        job = json.loads(told[told.index("{") :])["jobs"][0]
    except ValueError:
        said = machine.run("cat /tmp/fio.status /tmp/fio.log; tail -c 300 /tmp/fio.json")
        raise HvHostError(f"fio on {disk} did not tell what it measured: {said}") from None
    if job["error"]:
        raise HvHostError(f"fio in the guest ended with error {job['error']} on {disk}.")
    return [float(job["write" if "write" in pattern else "read"]["iops"]), load]


def main() -> int:
    kernel, initrd, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    content = os.urandom(1 << 20)
    with FILE.open("wb") as file:
        for _ in range(SIZE_MIB):
            file.write(content)
    subprocess.run(["losetup", DEVICE, FILE], check=True)
    figures: dict[str, dict[str, list[list[float]]]] = {}
    for _ in range(rounds):
        for start, devices, disks in MACHINES:
            with start(kernel, initrd, devices) as machine:
                machine.run("modprobe -q sd_mod; true")
                for kind, disk in disks.items():
                    machine.run(
                        f"n=0; until [ -e /sys/block/{disk} ]; do n=$((n+1)); [ $n -lt 300 ] ||"
                        " exit 1; sleep 0.1; done"
                    )
                    for name, job in JOBS.items():
                        taken = measure(machine, disk, *job)
                        figures.setdefault(kind, {}).setdefault(name, []).append(taken)
                        print(kind, name, *taken, file=sys.stderr, flush=True)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
