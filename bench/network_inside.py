"""Runs inside a software KVM host: a guest on a tap device, under hvhost and under QEMU.

``python -m bench.network_inside KERNEL INITRD ROUNDS`` prints one JSON object: for each program
its figures, a list each: ``out`` and ``in`` in Mbit/s of TCP as iperf3 counts them, ``trip`` in
microseconds of one byte there and back. The tap device, the guest's kernel and its memory are the
same for both; QEMU's is its own virtio-net, in user space.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests.probe import ProbeClient

HOST, GUEST = "10.99.0.1", "10.99.0.2"
BOOT_SECONDS, TRANSFER_SECONDS = 180.0, 6
TRIPS, TRIP_PORT = 300, 5003
MEMORY_MIB = 512
COMMAND_LINE = "console=ttyS0 quiet"
PREPARE = f"""
set -e
[ -z "$1" ] || while read -r path parameters; do insmod /bench$path; done < /bench/modules
n=0
until [ -e /sys/class/net/eth0 ]; do n=$((n+1)); [ $n -lt 200 ]; sleep 0.1; done
ip link set eth0 up
ip address add {GUEST}/24 dev eth0
/bench/echo >/dev/null 2>&1 &
/bench/ld-linux-x86-64.so.2 --library-path /bench /bench/iperf3 -s >/dev/null 2>&1 &
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True)


@contextmanager
def hvhost(kernel: str, initrd: str, serial: Path) -> Iterator[Path]:
    """Our machine; the path of its second serial port."""
    from hvhost.manager.directory import MachineDirectory

    del serial
    machine = [
        *(sys.executable, "-m", "hvhost", "run", "--kvm", "local", "--name", "bench"),
        *("--kernel", kernel, "--initrd", initrd, "--append", COMMAND_LINE),
        *("--memory", f"{MEMORY_MIB}M", "--nic", "tap:tap0", "--detach"),
    ]
    subprocess.run(machine, check=True, stdout=sys.stderr)
    try:
        yield MachineDirectory.of("bench").serial_socket(2)
    finally:
        subprocess.run([sys.executable, "-m", "hvhost", "stop", "--force", "bench"], check=False)


@contextmanager
def qemu(kernel: str, initrd: str, serial: Path) -> Iterator[Path]:
    """QEMU's machine; the path of its second serial port."""
    process = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-M", "pc", "-accel", "kvm", "-cpu", "host"),
            *("-m", str(MEMORY_MIB), "-display", "none", "-no-reboot"),
            *("-kernel", kernel, "-initrd", initrd, "-append", COMMAND_LINE),
            *("-serial", "null", "-serial", f"unix:{serial},server=on,wait=off"),
            *("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"),
            *("-device", "virtio-net-pci,netdev=n"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    try:
        yield serial
    finally:
        process.kill()
        process.wait()


def probe(path: Path) -> ProbeClient:
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(str(path))
            break
        except OSError:
            stream.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    client = ProbeClient(stream)
    client.wait_ready(BOOT_SECONDS)
    return client


def iperf(*more: str) -> float:
    """Mbit/s of TCP that arrived."""
    done = subprocess.run(
        ["iperf3", "-c", GUEST, "-t", str(TRANSFER_SECONDS), "-J", *more],
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(done.stdout)
    if "error" in result:
        raise HvHostError(f"iperf3: {result['error']}")
    return float(result["end"]["sum_received"]["bits_per_second"]) / 1e6


def trip() -> float:
    """Microseconds of one byte to the guest's program and back, the median."""
    taken = []
    with socket.create_connection((GUEST, TRIP_PORT), timeout=20) as stream:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TRIPS):
            started = time.perf_counter()
            stream.send(b"x")
            stream.recv(1)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1e6


def await_guest() -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((GUEST, TRIP_PORT), timeout=2).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def main() -> int:
    kernel, initrd, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run("ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    run("ip", "address", "add", f"{HOST}/24", "dev", "tap0")
    run("ip", "link", "set", "tap0", "up")
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds):
            for name, machine in (("hvhost", hvhost), ("qemu", qemu)):
                with machine(kernel, initrd, Path(directory, f"serial{number}")) as serial:
                    client = probe(serial)
                    script = ["sh", "-c", PREPARE, "sh", "virtio" if name == "qemu" else ""]
                    prepared = client.run(script, 60.0)
                    if prepared.status:
                        raise HvHostError(f"the guest under {name}: {prepared.stderr!r}")
                    await_guest()
                    mine = figures.setdefault(name, {"out": [], "in": [], "trip": []})
                    mine["trip"].append(trip())
                    mine["in"].append(iperf())
                    mine["out"].append(iperf("-R"))
                    print(name, mine, file=sys.stderr, flush=True)
                    client.close()
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
