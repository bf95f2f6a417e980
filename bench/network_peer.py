"""A guest on a tap device in a software KVM host, beside QEMU's virtio-net: same tap, same run."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import software_host
from bench.measurement import Measurement
from hvhost.compiler import build_static
from hvhost.errors import HvHostError
from hvhost.guests import cpio
from hvhost.guests.build import GuestImages, prepare_guest
from hvhost.rig.image import module_entries

ECHO = Path(__file__).with_name("echo.c")


def _iperf3() -> list[cpio.Entry]:
    """This computer's iperf3 with its libraries."""
    program = shutil.which("iperf3")
    if program is None:
        raise HvHostError("iperf3 is not on this computer; run `apt-get install iperf3`.")
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+) \(0x", listed)
    return [
        cpio.file(f"bench/{Path(each).name}", Path(each).read_bytes(), 0o755)
        for each in (program, *libraries)
    ]


def _initrd(images: GuestImages, path: Path) -> None:
    """The guest's own initramfs, and behind it what the measurement needs."""
    if images.modules is None:
        raise HvHostError("the guest's modules are not at hand.")
    virtio = module_entries(images.modules, dict.fromkeys(("virtio_pci", "virtio_net"), ""))
    entries = [
        cpio.directory("bench"),
        cpio.file("bench/echo", build_static(ECHO).read_bytes(), 0o755),
        *_iperf3(),
        *(replace(each, name=f"bench/{each.name}") for each in virtio),
    ]
    path.write_bytes(images.initrd.read_bytes() + cpio.archive(entries))


def network_peer(rounds: int) -> list[Measurement]:
    """TCP both ways and round trips of one byte, under hvhost's local transport and under QEMU."""
    images = prepare_guest("debian-12", progress=lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        _initrd(images, initrd)
        figures: dict[str, dict[str, list[float]]] = software_host.figures(
            "bench.network_inside", str(images.kernel), str(initrd), str(rounds)
        )
    ours, peers = figures["hvhost"], figures.get("qemu", {})
    return [
        Measurement(
            "network-peer",
            title,
            statistics.median(ours[key]),
            unit,
            "QEMU virtio-net",
            statistics.median(peers[key]) if peers.get(key) else None,
        )
        for key, title, unit in (
            ("in", "TCP to the guest", "Mbit/s"),
            ("out", "TCP from the guest", "Mbit/s"),
            ("trip", "one byte there and back", "µs"),
        )
    ]
