"""A complete Debian, built from packages, boots from Hyper-V storage alone.

Building and booting it takes minutes on emulated processors, so it is not among the tests that
always run: ``HVHOST_TEST_FULL`` names the guests, as ``make test-matrix`` does.
"""

from __future__ import annotations

import asyncio
import os

import pytest

from hvhost import Machine
from hvhost.machine.model import HeartbeatStatus

FULL = [name for name in os.environ.get("HVHOST_TEST_FULL", "").split(",") if name]
BOOT_SECONDS = 400.0

pytestmark = pytest.mark.skipif(
    not FULL, reason="takes minutes; HVHOST_TEST_FULL=debian-12-full (make test-matrix) runs it"
)


@pytest.mark.timeout(1500)  # the first time it is built
@pytest.mark.parametrize("guest", FULL)
def test_a_complete_debian_boots_from_its_disk(guest: str) -> None:
    async def scenario() -> None:
        async with await Machine.start(guest=guest, memory="1G") as machine:
            await machine.console.expect(r"hvhost-guest login: ", timeout=BOOT_SECONDS)
            machine.console.send_line("root")
            await machine.console.expect(r"root@hvhost-guest:~# ", timeout=120)
            assert (await machine.info()).heartbeat is HeartbeatStatus.OK

            async def output(script: str) -> str:
                result = await machine.execute(["sh", "-c", script], timeout=120)
                assert result.status == 0, result
                return result.text

            assert await output("cat /proc/1/comm") == "systemd"
            assert await output("findmnt -no FSTYPE /") == "ext4"
            disk = await output("readlink -f /sys/class/block/$(findmnt -no SOURCE / | cut -c6-)")
            assert "VMBUS" in disk.upper(), "the root is on Hyper-V storage"
            assert await output("systemctl list-units --failed --plain --no-legend") == ""
            assert await output("systemctl is-active hv-kvp-daemon hv-vss-daemon chrony") == (
                "active\nactive\nactive"
            )
            await machine.shut_down()
            assert await machine.wait_stopped(timeout=180) == "the guest powered off"

    asyncio.run(scenario())
