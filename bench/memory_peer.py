"""A guest's memory taken and given in a software KVM host, beside QEMU's balloons: same run."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from bench import software_host
from bench.measurement import Measurement
from bench.peer import write_initrd
from hvhost.guests.build import prepare_guest
from hvhost.rig.qemu import find_qemu

PEERS = ("QEMU hv-balloon", "QEMU virtio-balloon")


def memory_peer(rounds: int) -> list[Measurement]:
    """GiB/s of hot-add, inflate and deflate under the local transport, beside each of QEMU's.

    A figure that a peer has not is without a ratio: virtio-balloon adds no memory.
    """
    del rounds

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    images = prepare_guest("debian-12", progress=say)
    found = find_qemu(say)  # the system's may be too old for hv-balloon
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        write_initrd(images, initrd, ("virtio_pci", "virtio_balloon"), [])
        figures: dict[str, dict[str, float]] = software_host.figures(
            "bench.memory_inside",
            *(str(images.kernel), str(initrd), json.dumps([found.program, *found.options])),
        )
    return [
        Measurement("memory-peer", name, value, "GiB/s", peer, figures.get(peer, {}).get(name))
        for name, value in figures["hvhost"].items()
        for peer in PEERS
    ]
