"""What a machine says of its adapters: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter; counters are the host's, from the guest's side of the cable.

    ``instance`` is the adapter's GUID on the bus. ``open``: the guest's driver uses it, over
    ``channels`` channels. ``namespace_pid`` is a process in a host-only network's namespace, 0
    where there is none.
    """

    name: str
    mac: str
    current_mac: str
    instance: str
    plug: str
    link: bool
    open: bool
    version: str | None
    mtu: int
    channels: int
    merging: bool
    namespace_pid: int
    transmitted: int
    transmitted_bytes: int
    received: int
    received_bytes: int
    transmit_errors: int
    receive_errors: int
    no_buffer: int
    filtered: int
    spoofed: int
    merged: int
    large_sends: int
