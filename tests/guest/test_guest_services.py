"""What the integration services bear for minutes, which no row of a verification waits for."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from pathlib import Path

import pytest

from guest.conftest import Start
from guest.helpers import Guest, wait_for
from guest.matrix import FULL, needs_full, only_in_matrix
from hvhost import Machine
from hvhost.errors import HvHostError
from hvhost.guests.build import GuestImages
from hvhost.guests.full import FullGuest, prepare_full
from hvhost.machine.model import KvpPool
from hvhost.network.addresses import Addresses
from hvhost.storage.operations import create_differencing

SIZE = 300 << 20
FULL_BOOT_SECONDS = 800.0
POOLS = "/var/lib/hyperv/.kvp_pool_"


@only_in_matrix("takes minutes")
@pytest.mark.timeout(2500)
def test_a_file_of_several_hundred_megabytes(
    images: GuestImages, start: Start, tmp_path: Path
) -> None:
    """Whole by the guest's own hash. 6 KiB a message: minutes on emulated processors."""
    if not any("fcopy" in daemon for daemon in images.daemons):
        pytest.skip(f"{images.title} has no file copy daemon")
    source, digest = tmp_path / "large", hashlib.sha256()
    with source.open("wb") as file:
        for _ in range(SIZE >> 20):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    # One processor: a daemon that is woken on another one costs an interrupt more, a message.
    guest: Guest = start(images, cpus=1, memory=1 << 30)
    small = tmp_path / "small"
    small.write_text("small")

    def taken() -> bool:
        try:
            guest.machine.copy(small, "/tmp/copied/small", create_path=True, overwrite=True)
        except HvHostError:
            return False
        return True

    wait_for("the file copy daemon", taken, 60.0)
    done = guest.machine.copy(source, "/tmp/copied/large", create_path=True)
    print(f"{SIZE >> 20} MiB at {SIZE / done.seconds / (1 << 20):.2f} MiB/s")
    assert done.copied == SIZE
    told = guest.run("sha256sum /tmp/copied/large", 600.0)
    assert told.split()[0] == digest.hexdigest()


@only_in_matrix("another guest to boot")
def test_addresses_as_the_guests_daemon_reads_them(images: GuestImages, start: Start) -> None:
    """What it writes for those who configure interfaces; nobody does in so small a guest."""
    guest = start(images)
    guest.machine.network.add("none", "net0")
    wait_for("the adapter", lambda: "eth0" in guest.run("ls /sys/class/net"), 60.0)
    wait_for("the daemon", lambda: guest.machine.info().kvp_ready, 60.0)
    wanted = Addresses(("192.0.2.5/25", "fd77::2/64"), ("192.0.2.1", "fd77::1"), ("fd77::53",))
    with pytest.raises(HvHostError, match="did not configure adapter"):
        guest.machine.network.set_ip("net0", wanted)
    told = guest.run("cd /var/lib/hyperv; cat ifcfg-eth0; cat eth0.nmconnection || true").split()
    lines = {"IPADDR0=192.0.2.5", "NETMASK0=255.255.255.128", "GATEWAY=192.0.2.1", "IPV6NETMASK=64"}
    if tuple(map(int, re.findall(r"\d+", images.release)[:2])) >= (6, 8):
        lines |= {"address1=192.0.2.5/25", "address1=fd77::2/64", "dns=fd77::53"}
    assert lines <= set(told)


@needs_full
@pytest.mark.timeout(3000)  # the first time the guest is built
@pytest.mark.parametrize("guest", FULL or ["debian-12-full"])
def test_what_a_guest_stored_outlives_its_machine_with_its_disk(guest: str, tmp_path: Path) -> None:
    """A machine, and then another one with the same disk: its own name is in pool 3, not the old.

    The first one's host forgets all about them; only the guest's files can tell.
    """
    system = prepare_full(guest)
    disk = tmp_path / "kept.vhdx"
    create_differencing(disk, system.disk)
    asyncio.run(_store(system, disk))
    asyncio.run(_find(system, disk))


def _started(system: FullGuest, disk: Path, name: str) -> asyncio.Future[Machine]:
    return asyncio.ensure_future(
        Machine.start(
            kernel=system.kernel,
            initrd=system.initrd,
            command_line=system.command_line,
            memory="1G",
            name=name,
            disks=[str(disk)],
        )
    )


async def _output(machine: Machine, script: str) -> str:
    result = await machine.execute(["sh", "-c", script], timeout=120)
    assert result.status == 0, result
    return result.text


async def _host_records(machine: Machine) -> str:
    """Pool 3 in the guest's file, once its daemon has been given it."""
    deadline = time.monotonic() + FULL_BOOT_SECONDS
    while True:
        try:
            found = await _output(machine, f"tr '\\0' ' ' <{POOLS}3")
            if f"VirtualMachineName {machine.name} " in " ".join(found.split()) + " ":
                return found
            reason = found
        except (HvHostError, AssertionError) as error:
            reason = str(error)
        assert time.monotonic() < deadline, f"pool 3 was not written: {reason}"
        await asyncio.sleep(1.0)


async def _store(system: FullGuest, disk: Path) -> None:
    async with await _started(system, disk, "first") as machine:
        await _host_records(machine)
        await machine.kvp_set("role", "web")
        await machine.kvp_set("through the daemon", "kept", KvpPool.GUEST)
        # As a program of the guest does it: 512 bytes of key, 2,048 of value.
        fields = "; ".join(
            f"printf %s {text} | dd bs={size} count=1 conv=sync 2>/dev/null"
            for text, size in (("by-a-program", 512), ("kept", 2048))
        )
        await _output(machine, f"{{ {fields}; }} >>{POOLS}1")
        assert await machine.kvp_get("by-a-program") == "kept"
        await machine.shut_down()
        assert await machine.wait_stopped(timeout=FULL_BOOT_SECONDS) == "the guest powered off"


async def _find(system: FullGuest, disk: Path) -> None:
    async with await _started(system, disk, "second") as machine:
        records = await _host_records(machine)
        assert "first" not in records.split()
        for key in ("through the daemon", "by-a-program"):
            assert await machine.kvp_get(key, KvpPool.GUEST) == "kept"
        assert "role" in (await _output(machine, f"tr '\\0' ' ' <{POOLS}0")).split()
