"""Time and key-value pairs of the scripted guest; each fault makes one thing go wrong."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence

from hvhost.errors import HvHostError
from hvhost.machine.model import ClockSample, IpSettings, KvpPool, KvpRecord
from hvhost.verify.guest import CommandResult

NAME = "scripted"
PAGE = "hyperv_clocksource_tsc_page"
_POOL_FILE = "/var/lib/hyperv/.kvp_pool_"
_CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0"
HOST = {f"Hosting{number}": str(number) for number in range(10)} | {
    "HostName": "h",
    "PhysicalHostName": "h",
    "VirtualMachineId": "1",
    "VirtualMachineName": NAME,
}
RELEASE = "6.1.0-test-amd64"


class ScriptedServices:
    """The clocks and pools of one machine, and the :class:`Services` protocol upon them."""

    def __init__(self, faults: set[str]) -> None:
        self.faults = faults
        self.offset = 0.0  # seconds by which the guest's clock is ahead
        self.clock = "realtime"
        self.clocksource = "tsc" if "invariant" in faults else PAGE
        self.loaded = False
        self.samples = 0
        self.off = self.unbound = False
        self.paused_at: float | None = None
        self.stood = 0.0  # seconds in which the guest did not run
        self.pools: dict[int, dict[str, str]] = {}
        self.given: dict[str, str] = {}  # of pool 0
        self.new_daemon()

    # The guest.

    def new_daemon(self) -> None:
        self.pools = {number: {} for number in range(5)}
        self.pools[3] |= HOST
        if "few-records" in self.faults:
            self.pools[3] = {"VirtualMachineName": NAME}
        if "other-name" in self.faults:
            self.pools[3]["VirtualMachineName"] = "other"
        if "no-host-name" in self.faults:
            del self.pools[3]["PhysicalHostName"]
        if "not-given-again" not in self.faults:
            self.pools[0] |= self.given

    def uptime(self) -> float:
        return time.monotonic() - self.stood

    def pause(self) -> None:
        self.paused_at = time.monotonic()

    def resume(self) -> None:
        assert self.paused_at is not None
        stood, self.paused_at = time.monotonic() - self.paused_at, None
        if "clock-runs-on" not in self.faults:
            self.stood += stood
        if "no-sync-on-resume" in self.faults:
            self.offset -= 6.0

    def interrupt(self) -> int:
        """A time sample, at every look at the counters."""
        if "no-samples" in self.faults:
            return 0
        if "samples-force" in self.faults:
            self.offset = 0.0
        return 1

    def files(self) -> dict[str, str]:
        there = [PAGE, "tsc"] if "no-page" not in self.faults else ["tsc", "acpi_pm"]
        return {
            f"{_CLOCKSOURCE}/current_clocksource": self.clocksource + "\n",
            f"{_CLOCKSOURCE}/available_clocksource": " ".join(there) + " \n",
            "/sys/class/ptp/ptp0/clock_name": (
                "other\n" if "no-ptp" in self.faults else "hyperv\n"
            ),
            "/run/hvhost-chrony/refclocks.log": (
                "==\n" if "phc-unread" in self.faults else "2026 PHC0 1 N 0 -3.4e-06\n"
            ),
            "/etc/os-release": 'PRETTY_NAME="Scripted 1"\nNAME="Scripted"\n',
            f"{_POOL_FILE}0": "x\n" if self.pools[0] else "",
        }

    def read_bytes(self, path: str) -> bytes:
        return b"".join(
            each.encode().ljust(size, b"\0")
            if size == 2048
            else each.encode() + b"\0\xff" * 9 + bytes(size - len(each.encode()) - 18)
            for item in self.pools[int(path.removeprefix(_POOL_FILE))].items()
            for each, size in zip(item, (512, 2048), strict=True)
        )

    def write(self, path: str, text: str) -> bool:
        if path.endswith("current_clocksource"):
            if "clocksource-stays" not in self.faults:
                self.clocksource = text
        elif path.endswith("hv_utils/unbind"):
            if "unbind-refused" in self.faults:
                raise HvHostError(f"{path}: No such device (in the guest)")
        elif path.endswith("hv_utils/bind"):
            if "no-sync-on-open" not in self.faults:
                self.offset = 0.0
            self.new_daemon()
        else:
            return False
        return True

    def run(self, command: Sequence[str]) -> CommandResult | None:
        script = command[-1]
        if command[0] == "/usr/bin/hvhost-clock":
            self.clock = command[1]
            if "no-clock" in self.faults:
                return CommandResult(1, "/dev/ptp0: Operation not supported")
            return CommandResult(0, "4096 77\n")
        if command[0] == "kill":
            return CommandResult(0, "")
        if command == ["date", "+%s"]:
            return CommandResult(0, "1000000\n")
        if command[:2] == ["date", "-s"]:
            if "date-refused" not in self.faults:
                self.offset = int(script[1:]) - 1000000
            return CommandResult(0, "")
        if command == ["uname", "-m"]:
            return CommandResult(0, "x86_64\n")
        if command[0] != "sh":
            return None
        if "chronyd -u root" in script:
            started = "no-chrony" not in self.faults
            self.offset = 0.0 if "chrony-far" not in self.faults else 0.1
            return CommandResult(0 if started else 1, "" if started else "Fatal error")
        if script.startswith("for i in"):
            self.loaded = True
            return CommandResult(0, "5\n6\n")
        if script.startswith(("kill", "rm")):
            return CommandResult(0, "")
        if "dd bs=" in script:
            if "pool-unwritable" in self.faults:
                return CommandResult(1, "Read-only file system")
            found = re.findall(r"printf %s (.*?) \| dd", script)
            key, value = (shlex.split(each)[0] for each in found)
            self.pools[1][key] = value
            return CommandResult(0, "")
        return None

    # The host.

    def set_service(self, name: str, enabled: bool) -> None:
        assert name == "timesync"
        self.off = not enabled and "service-stays" not in self.faults
        self.unbound = enabled and "service-unbound" in self.faults

    def time_sync(self) -> float:
        if "sync-refused" in self.faults:
            raise HvHostError("the guest refused the time.")
        if "sync-ignored" not in self.faults:
            self.offset = 0.0
        return 0.001

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        if self.paused_at is not None and "paused-runs" not in self.faults:
            time.sleep(0.05)
            raise HvHostError("The guest's clock does not change; see its program.")
        ahead = round(self.offset * 1e9)
        if self.clock != "realtime":
            ahead = 3000
        elif self.loaded:
            ahead += 2_000_000 if "load-drifts" in self.faults else 5000
        error = 5_000_000 if "busy" in self.faults and self.loaded else 1000
        return [ClockSample(10**9 * n, 10**9 * n + ahead, error) for n in range(count)]

    def kvp_list(self, pool: KvpPool | None = None) -> list[KvpRecord]:
        if pool is KvpPool.AUTO:
            items = {
                "OSBuildNumber": RELEASE,
                "OSVersion": "6.1.0",
                "OSName": "Windows" if "wrong-os" in self.faults else "Scripted",
                "ProcessorArchitecture": "x86_64",
                "NetworkAddressIPv4": "",
            }
            if "no-addresses" in self.faults:
                del items["NetworkAddressIPv4"]
            return [KvpRecord(pool, key, value) for key, value in items.items()]
        return [
            KvpRecord(each, key, value)
            for each in KvpPool
            for key, value in self.pools[each.number].items()
            if pool in (None, each)
        ]

    def kvp_get(self, key: str, pool: KvpPool | None = None) -> KvpRecord:
        for record in self.kvp_list(pool):
            if record.key == key:
                value = record.value[:1000] if "cut-values" in self.faults else record.value
                if "guest-unread" in self.faults and record.pool is KvpPool.GUEST and pool is None:
                    value = ""
                return KvpRecord(record.pool, key, value)
        raise HvHostError(f"The guest has no item {key!r}.")

    def kvp_set(self, key: str, value: str, pool: KvpPool = KvpPool.EXTERNAL) -> None:
        if "set-lost" in self.faults:
            return
        self.pools[pool.number][key] = value
        if pool is KvpPool.EXTERNAL:
            self.given[key] = value

    def kvp_delete(self, key: str, pool: KvpPool = KvpPool.EXTERNAL) -> None:
        self.given.pop(key, None)
        if "delete-lost" not in self.faults:
            del self.pools[pool.number][key]

    def set_ip(self, settings: IpSettings) -> None:
        if "adapter-taken" in self.faults:
            return
        meaning = "it has no such network adapter"
        if "adapter-failed" in self.faults:
            meaning = "its daemon failed or gave no answer"
        raise HvHostError(f"The guest did not configure adapter: {meaning}.")
