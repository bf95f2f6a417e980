"""The rows that this release can prove, each in its module, in the order that boots least often.

``lsvmbus`` and ``smp`` leave the guest as it was; ``heartbeat`` ends with a hung guest, which is
what ``nmi`` begins with; ``shutdown`` ends with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hvhost.verify.rows import (
    accurate_time,
    fibre_channel,
    filecopy,
    heartbeat,
    hvsocket,
    kvp,
    live_backup,
    lsvmbus,
    memory,
    mmio_gap,
    network,
    nmi,
    offloads,
    pae,
    shutdown,
    smp,
    static_ip,
    storage,
    time_sync,
    trim,
    vhdx_resize,
    vlan,
    vrss,
    wwn,
)
from hvhost.verify.session import Session


@dataclass(frozen=True, slots=True)
class Proof:
    """How a row is proved: *prove* yields evidence and raises ``RowFailed``; seconds it may take.

    ``seconds`` includes the boots the row may need. ``complete``: the proof is made for the
    complete guests (``debian-12-full``), the others for those of an initramfs.
    """

    row_id: str
    prove: Callable[[Session], Iterator[str]]
    seconds: float
    complete: bool = False


PROOFS: tuple[Proof, ...] = (
    Proof("lsvmbus", lsvmbus.prove, 180.0),
    Proof("smp", smp.prove, 240.0),
    Proof("kvp", kvp.prove, 240.0),
    Proof("time-sync", time_sync.prove, 240.0),
    Proof("accurate-time", accurate_time.prove, 300.0),
    Proof("file-copy", filecopy.prove, 300.0),
    Proof("hvsocket", hvsocket.prove, 420.0),
    Proof("mmio-gap", mmio_gap.prove, 240.0),
    Proof("memory-resize", memory.prove_memory_resize, 420.0),
    Proof("hot-add", memory.prove_hot_add, 420.0),
    Proof("ballooning", memory.prove_ballooning, 420.0),
    Proof("pae", pae.prove, 600.0),
    Proof("storage", storage.prove, 300.0),
    Proof("live-backup", live_backup.prove, 300.0),
    Proof("trim", trim.prove, 300.0),
    Proof("vhdx-resize", vhdx_resize.prove, 300.0),
    Proof("fibre-channel", fibre_channel.prove, 300.0),
    Proof("wwn", wwn.prove, 300.0),
    Proof("network", network.prove, 300.0),
    Proof("jumbo-frames", network.prove_jumbo, 240.0),
    Proof("offloads", offloads.prove, 300.0),
    Proof("lro", offloads.prove_lro, 300.0),
    Proof("vrss", vrss.prove, 300.0),
    Proof("vlan", vlan.prove, 300.0),
    Proof("static-ip", static_ip.prove, 900.0, complete=True),
    Proof("heartbeat", heartbeat.prove, 420.0),
    Proof("nmi", nmi.prove, 300.0),
    Proof("shutdown", shutdown.prove, 420.0),
)
