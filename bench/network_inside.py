"""Runs inside a software KVM host: a guest on a tap device, under hvhost and under QEMU.

``python -m bench.network_inside KERNEL INITRD ROUNDS`` prints one JSON object: for each program
its figures, a list each: ``out`` and ``in`` in Mbit/s of TCP as iperf3 counts them, ``trip`` in
microseconds of one byte there and back. The tap device, the guest's kernel and its memory are the
same for both; QEMU's is its own virtio-net, in user space. ``loop`` is no guest at all but another
network namespace, behind :mod:`bench.tap_loop`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from bench.inside_guests import LINKER, Start, hvhost, qemu
from hvhost.errors import HvHostError

HOST, GUEST = "10.99.0.1", "10.99.0.2"
TRANSFER_SECONDS = 6
TRIPS, TRIP_PORT = 300, 5003
START_SECONDS = 60.0
#: QEMU's guest often does not answer at all there: how long it is waited for (it takes 20 s), and
#: how often it is started.
PEER_BOOT_SECONDS = 90.0
PEER_ATTEMPTS = 4
OUR_NIC = ["--nic", "tap:tap0"]
QEMU_NIC = [
    *("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=off"),
    *("-device", "virtio-net-pci,netdev=n"),
]
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


@contextlib.contextmanager
def far_end() -> Iterator[None]:
    """iperf3 at the guest's address in a network namespace, with a plain loop on the way there."""
    with contextlib.ExitStack() as stack:

        def begin(*words: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        far = begin("unshare", "-n", "sh", "-c", "echo; exec sleep infinity")
        loop = begin(sys.executable, "-m", "bench.tap_loop", "tap0", "tap1")
        assert far.stdout is not None and loop.stdout is not None
        assert far.stdout.readline() and loop.stdout.readline()
        run("ip", "neighbour", "flush", "dev", "tap0")  # of the guest that was here before
        run("ip", "link", "set", "tap1", "netns", str(far.pid))
        there = ("nsenter", "-n", "-t", str(far.pid))
        run(*there, "ip", "address", "add", f"{GUEST}/24", "dev", "tap1")
        run(*there, "ip", "link", "set", "tap1", "up")
        begin(*there, "iperf3", "-s")
        yield


def measure(start: Start, kernel: str, initrd: str, devices: list[str]) -> dict[str, float]:
    """One boot's figures."""
    with start(kernel, initrd, devices) as machine:
        machine.run(PREPARE)
        await_echo()
        return {"trip": trip(), "in": iperf(), "out": iperf("-R")}


def main() -> int:
    kernel, initrd, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run("ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
    run("ip", "address", "add", f"{HOST}/24", "dev", "tap0")
    run("ip", "link", "set", "tap0", "up")
    figures: dict[str, dict[str, list[float]]] = {}
    peer = functools.partial(qemu, boot_seconds=PEER_BOOT_SECONDS)

    def note(name: str, found: dict[str, float]) -> None:
        print(name, found, file=sys.stderr, flush=True)
        for key, value in found.items():
            figures.setdefault(name, {}).setdefault(key, []).append(value)

    for _ in range(rounds):
        note("hvhost", measure(hvhost, kernel, initrd, OUR_NIC))
        for attempt in range(1, PEER_ATTEMPTS + 1):
            try:
                note("qemu", measure(peer, kernel, initrd, QEMU_NIC))
                break
            except (OSError, HvHostError) as error:
                print(f"QEMU, attempt {attempt}: {error}", file=sys.stderr, flush=True)
        with far_end():
            note("loop", {"in": iperf(), "out": iperf("-R")})
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
