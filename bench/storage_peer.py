"""fio in a guest in a software KVM host, beside QEMU's virtio disks: same device, same run."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import software_host
from bench.measurement import Measurement
from bench.peer import program, write_initrd
from hvhost.guests.build import prepare_guest

DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi")
PEERS = ("virtio-blk", "virtio-scsi")


def storage_peer(rounds: int) -> list[Measurement]:
    """Transfers a second, and for each second of processor that the host's program used.

    A round takes minutes, so half as many are made.
    """
    images = prepare_guest("debian-12", progress=lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        write_initrd(images, initrd, DRIVERS, program("fio"))
        figures: dict[str, dict[str, list[tuple[float, float]]]] = software_host.figures(
            "bench.storage_inside", str(images.kernel), str(initrd), str(max(1, rounds // 2))
        )
    return list(_measurements(figures))


def _measurements(
    figures: dict[str, dict[str, list[tuple[float, float]]]],
) -> Iterator[Measurement]:
    for job, taken in figures["hvhost"].items():
        for name, unit in (("", "IOPS"), (", host", "IOPS per CPU-second")):
            ours = _value(taken, unit)
            for peer in PEERS:
                beside = _value(figures[peer][job], unit)
                yield Measurement("storage-peer", job + name, ours, unit, f"QEMU {peer}", beside)


def _value(taken: list[tuple[float, float]], unit: str) -> float:
    """The median of what was measured, each with the processor's time beside it."""
    if unit == "IOPS":
        return statistics.median(rate for rate, _ in taken)
    return statistics.median(rate / max(load, 0.01) for rate, load in taken)
