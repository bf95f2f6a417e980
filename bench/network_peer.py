"""A guest on a tap device in a software KVM host, beside QEMU's virtio-net: same tap, same run."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from bench import software_host
from bench.measurement import Measurement
from bench.peer import program, write_initrd
from hvhost.compiler import build_static
from hvhost.guests import cpio
from hvhost.guests.build import prepare_guest

ECHO = Path(__file__).with_name("echo.c")


def network_peer(rounds: int) -> list[Measurement]:
    """TCP both ways and round trips of one byte, under hvhost's local transport and under QEMU."""
    images = prepare_guest("debian-12", progress=lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        echo = cpio.file("bench/echo", build_static(ECHO).read_bytes(), 0o755)
        write_initrd(images, initrd, ("virtio_pci", "virtio_net"), [echo, *program("iperf3")])
        figures: dict[str, dict[str, list[float]]] = software_host.figures(
            "bench.network_inside", str(images.kernel), str(initrd), str(rounds)
        )
    return [
        Measurement(
            "network-peer",
            title,
            statistics.median(figures["hvhost"][key]),
            unit,
            beside,
            statistics.median(found) if (found := figures.get(peer, {}).get(key)) else None,
        )
        for key, title, unit, peer, beside in (
            ("in", "TCP to the guest", "Mbit/s", "qemu", "QEMU virtio-net"),
            ("out", "TCP from the guest", "Mbit/s", "qemu", "QEMU virtio-net"),
            ("trip", "one byte there and back", "µs", "qemu", "QEMU virtio-net"),
            ("in", "TCP to the guest", "Mbit/s", "loop", "plain loop, no guest"),
            ("out", "TCP from the guest", "Mbit/s", "loop", "plain loop, no guest"),
        )
    ]
