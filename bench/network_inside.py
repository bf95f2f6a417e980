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
import time

from bench.inside_guests import LINKER, Start, hvhost, qemu
from hvhost.errors import HvHostError

HOST, GUEST = "10.99.0.1", "10.99.0.2"
TRANSFER_SECONDS = 6
TRIPS, TRIP_PORT = 300, 5003
START_SECONDS = 60.0
MACHINES: dict[str, tuple[Start, list[str]]] = {
    "hvhost": (hvhost, ["--nic", "tap:tap0"]),
    "qemu": (
        qemu,
        [
            *("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"),
            *("-device", "virtio-net-pci,netdev=n"),
        ],
    ),
}
#: In a guest: until its driver has made the interface, or a failure.
AWAIT_INTERFACE = """
set -e
n=0
until [ -e /sys/class/net/eth0 ]; do n=$((n+1)); [ $n -lt 200 ]; sleep 0.1; done
"""
PREPARE = f"""{AWAIT_INTERFACE}
ip link set eth0 up
ip address add {GUEST}/24 dev eth0
setsid /bench/echo </dev/null >/dev/null 2>&1 &
setsid {LINKER} /bench/iperf3 -s </dev/null >/dev/null 2>&1 &
"""


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def iperf(*more: str) -> float:
    """Mbit/s of TCP that arrived."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = subprocess.run(
            ["iperf3", "-c", GUEST, "-t", str(TRANSFER_SECONDS), "-J", *more],
            capture_output=True,
            text=True,
            check=False,
        )
        result = json.loads(done.stdout)
        if "error" not in result:
            return float(result["end"]["sum_received"]["bits_per_second"]) / 1e6
        # The guest's iperf3 may not listen yet.
        if "unable to connect" not in result["error"] or time.monotonic() > deadline:
            raise HvHostError(f"iperf3: {result['error']}")
        time.sleep(0.5)


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


def await_echo() -> None:
    """Until the guest's program listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((GUEST, TRIP_PORT), timeout=5).close()
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
    for _ in range(rounds):
        for name, (start, devices) in MACHINES.items():
            with start(kernel, initrd, devices) as machine:
                machine.run(PREPARE)
                await_echo()
                mine = figures.setdefault(name, {"out": [], "in": [], "trip": []})
                mine["trip"].append(trip())
                mine["in"].append(iperf())
                mine["out"].append(iperf("-R"))
                print(name, mine, file=sys.stderr, flush=True)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
