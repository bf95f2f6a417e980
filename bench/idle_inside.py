"""Runs inside a software KVM host: how often a worker wakes up while its guest does nothing.

``python -m bench.idle_inside KERNEL INITRD`` prints one JSON object, wake-ups a second: ``plain``
as people have it, ``silent`` with the services switched off that do something by the clock, and
``adapter`` as ``silent``, with a network adapter that is up.
"""

from __future__ import annotations

import json
import sys
import time

from bench.inside_guests import Started, hvhost
from bench.measurement import wake_ups_a_second
from bench.network_inside import AWAIT_INTERFACE, run
from hvhost.manager.client import MachineClient

SECONDS = 20.0
#: The tail of a boot, or of a service that is taken away.
SETTLE_SECONDS = 5.0
BY_THE_CLOCK = ("heartbeat", "timesync")
TAP = "tap0"
# Else both ends of the cable look for routers and neighbours for minutes: that is not idle.
QUIET = "echo 1 > /proc/sys/net/ipv6/conf/{0}/disable_ipv6; ip link set {0} up"
PREPARE = AWAIT_INTERFACE + QUIET.format("eth0")


def settled(machine: Started) -> float:
    """Of all threads but the processor's, and what that left the guest for."""
    time.sleep(SETTLE_SECONDS)
    exits = exits_so_far()
    others = wake_ups_a_second(machine.pid, SECONDS)
    return others + (exits_so_far() - exits) / SECONDS


def exits_so_far() -> int:
    return sum(MachineClient("bench").info().exits.values())


def silence() -> None:
    for name in BY_THE_CLOCK:
        MachineClient("bench").set_service(name, False)


def main() -> int:
    kernel, initrd = sys.argv[1:]
    run("ip", "tuntap", "add", TAP, "mode", "tap", "vnet_hdr")
    run("sh", "-c", QUIET.format(TAP))
    figures = {}
    with hvhost(kernel, initrd, []) as machine:
        figures["plain"] = settled(machine)
        silence()
        figures["silent"] = settled(machine)
    with hvhost(kernel, initrd, ["--nic", f"tap:{TAP}"]) as machine:
        machine.run(PREPARE)
        silence()
        figures["adapter"] = settled(machine)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
