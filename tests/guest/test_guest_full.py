"""A complete Debian, built from packages, boots from Hyper-V storage alone; another kernel follows.

Building and booting it takes minutes on emulated processors, so it is not among the tests that
always run: ``HVHOST_TEST_FULL`` names the guests, as ``make test-matrix`` does.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from guest.helpers import command, wait_for
from guest.matrix import FULL, needs_full
from hvhost import Machine
from hvhost.guests.full import prepare_full
from hvhost.machine.backup_model import BackupInfo, BackupState
from hvhost.machine.model import HeartbeatStatus
from hvhost.manager.client import MachineClient

BOOT_SECONDS = 900.0  # two minutes on a quiet computer; a busy one takes five times that

pytestmark = needs_full


async def output(machine: Machine, script: str) -> str:
    """What a shell script in the guest says; it succeeds."""
    result = await machine.execute(["sh", "-c", script], timeout=600)
    assert result.status == 0, result
    return result.text


async def await_login(machine: Machine) -> None:
    await machine.console.expect(r"hvhost-guest login: ", timeout=BOOT_SECONDS)


@pytest.mark.timeout(3600)  # the first time it is built
@pytest.mark.parametrize("guest", FULL)
def test_a_complete_debian_boots_from_its_disk(guest: str) -> None:
    async def scenario() -> None:
        async with await Machine.start(guest=guest, memory="1G") as machine:
            await await_login(machine)
            machine.console.send_line("root")
            await machine.console.expect(r"root@hvhost-guest:~# ", timeout=300)
            assert (await machine.info()).heartbeat is HeartbeatStatus.OK

            assert await output(machine, "cat /proc/1/comm") == "systemd"
            assert await output(machine, "findmnt -no FSTYPE /") == "ext4"
            disk = await output(
                machine, "readlink -f /sys/class/block/$(findmnt -no SOURCE / | cut -c6-)"
            )
            assert "VMBUS" in disk.upper(), "the root is on Hyper-V storage"
            assert await output(machine, "systemctl list-units --failed --plain --no-legend") == ""
            assert await output(
                machine, "systemctl is-active hv-kvp-daemon hv-vss-daemon chrony"
            ) == ("active\nactive\nactive")
            await machine.shut_down()
            assert await machine.wait_stopped(timeout=600) == "the guest powered off"

    asyncio.run(scenario())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guest", FULL)
def test_a_hung_guest_leaves_its_memory_on_its_disk(guest: str) -> None:
    """NMI, panic, crash kernel (which meets a bus that another kernel used), dump, restart."""

    async def scenario() -> None:
        append = "crashkernel=192M unknown_nmi_panic=1"
        async with await Machine.start(guest=guest, memory="1G", command_line=append) as machine:
            await await_login(machine)
            assert await output(machine, "cat /sys/kernel/kexec_crash_loaded; sync") == "1"
            await machine.nmi()
            await await_login(machine)
            told = await output(
                machine,
                "cd /var/crash/2* && dump=$(ls dump.*) "
                "&& makedumpfile -R /tmp/core <$dump >/tmp/log "
                "&& makedumpfile --dump-dmesg /tmp/core /tmp/told >/tmp/log && cat /tmp/told",
            )
            assert re.search(r"Kernel panic - not syncing: .*NMI", told), told[-2000:]

    asyncio.run(scenario())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guest", FULL)
def test_a_backup_whose_command_is_killed_thaws_the_guest_and_boots(
    guest: str, tmp_path: Path
) -> None:
    """Killed as soon as it freezes the guest's file systems; the worker finishes the backup."""

    async def wait(what: str, condition: Callable[[], object]) -> None:
        await asyncio.to_thread(wait_for, what, condition, 900.0)

    async def back_up() -> BackupInfo:
        async with await Machine.start(guest=guest, memory="1G") as machine:
            await await_login(machine)
            await output(machine, "echo before > /root/before")  # which nobody writes back

            def progress() -> BackupInfo:
                path = "/v1/machine/backup"
                return MachineClient(machine.name).ask("GET", path, BackupInfo)

            words = ("backup", machine.name, tmp_path, "--allow-same-volume")
            killed = subprocess.Popen(command(*words))
            await wait("the backup", lambda: list(tmp_path.glob("*.partial")))
            killed.send_signal(signal.SIGKILL)
            assert killed.wait() == -signal.SIGKILL
            assert not progress().over
            await wait("the copy", lambda: progress().state is not BackupState.FREEZING)
            await output(machine, "echo after > /root/after && sync")  # a frozen system would wait
            log = await output(machine, "journalctl -o cat | grep 'VSS: op='")
            assert (log.count("FREEZE: succeeded"), log.count("THAW: succeeded")) == (1, 1), log
            await wait("the backup's end", lambda: progress().over)
            return progress()

    async def boot(disk: Path) -> None:
        system = prepare_full(guest)
        async with await Machine.start(
            kernel=system.kernel,
            initrd=system.initrd,
            command_line=system.command_line,
            memory="1G",
            disks=[str(disk)],
        ) as machine:
            await await_login(machine)
            assert await output(machine, "cat /root/before; ls /root") == "before\nbefore"
            checked = await output(
                machine,
                "cat /run/initramfs/fsck.log; journalctl -b -o cat -t systemd-fsck; true",
            )
            assert "clean" in checked and "recover" not in checked, checked
            assert "recover" not in await output(machine, "dmesg | grep EXT4")
            assert await output(machine, "systemctl list-units --failed --plain --no-legend") == ""

    done = asyncio.run(back_up())
    assert (done.error, done.warning) == (None, None)
    asyncio.run(boot(Path(done.path, "scsi0-0.vhdx")))


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("guest", FULL)
def test_a_kernel_starts_another(guest: str) -> None:
    """kexec: the first kernel gives the bus back (UNLOAD), the second negotiates it anew."""

    async def scenario() -> None:
        async with await Machine.start(guest=guest, memory="1G") as machine:
            await await_login(machine)
            boot_id = "/proc/sys/kernel/random/boot_id"
            before = await output(machine, f"cat {boot_id}")
            await output(
                machine,
                "release=$(uname -r); kexec -l /boot/vmlinuz-$release "
                "--initrd=/boot/initrd.img-$release --reuse-cmdline",
            )
            await output(machine, "systemctl --no-block kexec")
            await await_login(machine)
            assert await output(machine, f"cat {boot_id}") != before
            assert await output(machine, "systemctl is-active hv-kvp-daemon") == "active"
            await machine.shut_down()
            assert await machine.wait_stopped(timeout=180) == "the guest powered off"
            kinds = [event.kind async for event in machine.events()]
            assert kinds.count("bus") == 2
            assert "reset" not in kinds

    asyncio.run(scenario())
