"""What kernels do to their machine: many CPUs, much memory, drivers that come and go, resets."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.conftest import Start
from guest.helpers import BOOT_SECONDS, Guest, tell, wait_for
from hvhost.errors import HvHostError
from hvhost.firmware.extract import cached_vmlinux
from hvhost.firmware.image import ImageKind, open_kernel
from hvhost.guests.build import GuestImages
from hvhost.machine.model import HeartbeatStatus, MachineState, ProcessorState, ShutdownAction
from hvhost.verify.contract import HV_HEART_BEAT_GUID
from hvhost.verify.sysfs import GuestDevice, read_devices

GIB = 1 << 30
RFLAGS_IF = 1 << 9


def heartbeat(guest: Guest) -> GuestDevice:
    (device,) = (
        device
        for device in read_devices(guest.probe)
        if device.interface_type == HV_HEART_BEAT_GUID
    )
    return device


def channel_state(guest: Guest, name: str) -> str:
    (channel,) = (each for each in guest.machine.info().channels if each.name == name)
    return channel.state


def edited(kernel: Path, target: Path, offset: int, content: bytes) -> Path:
    data = bytearray(kernel.read_bytes())
    data[offset : offset + len(content)] = content
    target.write_bytes(data)
    return target


def test_a_kernel_entered_by_pvh(one: GuestImages, start: Start, tmp_path: Path) -> None:
    vmlinux = cached_vmlinux(one.kernel, open_kernel(one.kernel))
    if open_kernel(vmlinux).pvh_entry is None:
        pytest.skip("this kernel has no PVH note")
    # A virtual entry point, as FreeBSD's kernel has it, leaves nothing but PVH.
    entry = struct.pack("<Q", 0xFFFFFFFF81000000)
    pvh = edited(vmlinux, tmp_path / "vmlinux", 24, entry)
    assert not open_kernel(pvh).has_linux_entry
    guest: Guest = start(one, kernel=pvh)
    assert guest.run("uname -r").strip() == one.release
    guest.await_heartbeat(HeartbeatStatus.OK)


def test_a_kernel_that_decompresses_itself(one: GuestImages, start: Start, tmp_path: Path) -> None:
    # A header without payload_length (0x24c) keeps it from being extracted on the host.
    compressed = edited(one.kernel, tmp_path / "vmlinuz", 0x24C, bytes(4))
    started = time.monotonic()
    guest: Guest = start(one, kernel=compressed)
    assert guest.run("uname -r").strip() == one.release
    assert time.monotonic() - started < BOOT_SECONDS


@pytest.fixture(scope="module")
def guests() -> Iterator[dict[str, Guest]]:
    """The guest of :func:`guest`, by what it boots, while it is well."""
    there: dict[str, Guest] = {}
    yield there
    for guest in there.values():
        guest.machine.kill()


def await_services(guest: Guest) -> None:
    guest.await_heartbeat(HeartbeatStatus.OK)
    wait_for("the shutdown service", lambda: guest.machine.info().shutdown_ready)


def is_well(guest: Guest) -> bool:
    try:
        await_services(guest)
        return guest.run("echo well") == "well\n"
    except (HvHostError, AssertionError):
        return False


@pytest.fixture
def guest(images: GuestImages, guests: dict[str, Guest]) -> Iterator[Guest]:
    """A guest in which one test after another does its work, begun anew when one left it unwell.

    It boots from a plain vmlinux; all others here boot as distributions have them.
    """
    kernel = cached_vmlinux(images.kernel, open_kernel(images.kernel))
    if str(kernel) not in guests:
        for other in guests.values():
            other.machine.kill()
        guests.clear()
        guests[str(kernel)] = Guest.start(images, kernel=kernel, cpus=4, memory=6 * GIB)
    guest = guests[str(kernel)]
    await_services(guest)
    yield guest
    if not is_well(guest):
        tell(guest.machine)
        del guests[str(kernel)]
        guest.machine.kill()


def test_much_memory_and_many_processors(guest: Guest, images: GuestImages) -> None:
    assert open_kernel(Path(guest.machine.info().kernel)).kind is ImageKind.ELF64
    assert guest.run("uname -r").strip() == images.release
    total = re.search(r"MemTotal:\s+(\d+) kB", guest.run("cat /proc/meminfo"))
    assert total is not None
    assert 5.7 * GIB < int(total[1]) * 1024 <= 6 * GIB
    places = re.findall(r"(?m)^([0-9a-f]+)-[0-9a-f]+ : System RAM", guest.run("cat /proc/iomem"))
    assert max(int(place, 16) for place in places) >= 4 * GIB
    # The kernel hands out memory from its upper end, so this is above 4 GiB.
    guest.run(
        "dd if=/dev/urandom of=/tmp/a bs=1M count=16 && cp /tmp/a /tmp/b && cmp /tmp/a /tmp/b"
    )
    assert guest.run("nproc") == "4\n"
    online = guest.run("cat /sys/devices/system/cpu/online")
    assert online == "0-3\n"
    # Every processor runs a process of its own: IPIs and timers work on each.
    for cpu in range(4):
        assert guest.run(f"taskset {1 << cpu:x} sh -c 'sleep 0.1; echo here'") == "here\n"
    assert len(guest.machine.processors()) == 4


def test_the_driver_is_unbound_and_bound_again(guest: Guest) -> None:
    """The channel closes and opens again, and heartbeats come back."""
    device = heartbeat(guest)
    driver = f"/sys/bus/vmbus/drivers/{device.driver}"
    for _ in range(3):
        guest.probe.write(f"{driver}/unbind", device.interface_instance)
        wait_for("closed", lambda: channel_state(guest, "heartbeat") != "open")
        assert guest.machine.info().heartbeat is HeartbeatStatus.NO_DRIVER
        guest.probe.write(f"{driver}/bind", device.interface_instance)
        guest.await_heartbeat(HeartbeatStatus.OK)
        assert len(guest.machine.heartbeat_round_trips(5)) == 5
    assert heartbeat(guest).interface_instance == device.interface_instance


def test_the_module_is_unloaded_and_loaded_again(guest: Guest, images: GuestImages) -> None:
    tree = images.modules
    assert tree is not None
    if tree.is_builtin("hv_utils"):
        pytest.skip("hv_utils is built into this kernel")
    # Daemons keep it in use.
    guest.run("killall -9 hv_kvp_daemon hv_vss_daemon hv_fcopy_daemon chronyd; rmmod hv_utils")
    wait_for("closed", lambda: channel_state(guest, "shutdown") != "open")
    info = guest.machine.info()
    assert not info.shutdown_ready
    assert info.heartbeat is HeartbeatStatus.NO_DRIVER
    guest.run("modprobe hv_utils")
    guest.await_heartbeat(HeartbeatStatus.OK)
    wait_for("the shutdown service", lambda: guest.machine.info().shutdown_ready)
    assert [event for event in guest.machine.events(0, 0.0) if event.kind == "fault"] == []


def test_a_hung_guest_is_noticed_and_reset(guest: Guest) -> None:
    boots = guest.machine.info().boots
    for vp in guest.machine.processors():
        assert vp.state in (ProcessorState.RUNNING, ProcessorState.HALTED)
    hung = guest.machine.hang()
    assert [vp.index for vp in hung] == [0, 1, 2, 3]
    info = guest.await_heartbeat(HeartbeatStatus.NO_CONTACT, 20.0)
    assert info.state is MachineState.RUNNING
    assert guest.machine.processors() == hung, "they spin where they were left"
    for vp in hung:
        assert (vp.state, vp.ring, vp.rflags & RFLAGS_IF) == (ProcessorState.RUNNING, 0, 0)
    guest.machine.reset()
    guest.booted_again(boots + 1)
    guest.await_heartbeat(HeartbeatStatus.OK)


def test_a_guest_reboots_again_and_again(guest: Guest) -> None:
    boots = guest.machine.info().boots
    seen = {guest.run("cat /proc/sys/kernel/random/boot_id")}
    guest.machine.shut_down(ShutdownAction.REBOOT)
    guest.booted_again(boots + 1)
    seen.add(guest.run("cat /proc/sys/kernel/random/boot_id"))
    guest.run("(sleep 0.2; reboot -f) </dev/null >/dev/null 2>&1 &")
    guest.booted_again(boots + 2)
    seen.add(guest.run("cat /proc/sys/kernel/random/boot_id"))
    assert len(seen) == 3
    kinds = [event.kind for event in guest.machine.events(0, 0.0)]
    assert kinds.count("reset") == boots + 1, "each boot but the first is told"
    assert kinds.count("fault") == 0
