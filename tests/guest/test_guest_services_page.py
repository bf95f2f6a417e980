"""What docs/services.md and docs/sockets.md have people type does what they say, with a real guest.

And what no page can show: that each service can be switched off and on while the guest runs.
``make test-matrix`` runs this; it takes minutes on emulated processors.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest import pages
from guest.helpers import hvhost, wait_for
from guest.matrix import only_in_matrix
from hvhost.machine.model import HeartbeatStatus
from hvhost.manager.client import MachineClient

GUEST = "debian-12"  # has all daemons
NAME = "demo"  # the pages' word
inside = functools.partial(pages.inside, NAME)
POOL = "/var/lib/hyperv/.kvp_pool_0"
DEVICES = "/sys/bus/vmbus/devices"
pytestmark = [
    only_in_matrix("minutes on emulated processors"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[MachineClient]:
    """The machine that all pages speak of, with its drivers and daemons."""
    with pages.ended(NAME):
        pages.do(["run", "--name", NAME, "--guest", GUEST, "--cpus", "2", "--detach"])
        client = MachineClient(NAME)
        wait_for("the daemons", lambda: client.info().kvp_ready, pages.BOOT_SECONDS)
        yield client


def test_time(demo: MachineClient) -> None:
    (sync,) = pages.commands("services.md", "Time")
    inside("date -s @$(($(date +%s) - 3600))")
    pages.do(sync)
    assert abs(time.time() - int(inside("date +%s"))) < 10


def test_the_console_costs_no_exit_for_each_character(demo: MachineClient) -> None:
    """KVM keeps writes to the port until a processor leaves for something else (coalesced PIO)."""
    characters = 20_000

    def exits() -> Counter[str]:
        return Counter({why: n for why, n in demo.info().exits.items() if " 0x3f" in why})

    def sent() -> int:
        """What the guest's driver has given to the port, as it counts it."""
        (port,) = re.findall(r"^0:.* tx:(\d+)", inside("cat /proc/tty/driver/serial"), re.M)
        return int(port)

    exits_before, sent_before = exits(), sent()
    inside(f"head -c {characters} /dev/zero | tr '\\0' x >/dev/ttyS0")
    wait_for("the characters", lambda: sent() - sent_before >= characters, 120.0)
    cost = exits() - exits_before
    # For each 16, which fit the port's buffer, the driver asks the port three or four times.
    assert cost.total() < characters / 2, cost
    assert cost["out 0x3f8"] < characters / 100, cost


def test_pause(demo: MachineClient) -> None:
    pause, resume = pages.commands("services.md", "Pause")
    pages.do(pause)
    for words in (["exec", NAME, "--", "true"], ["kvp", NAME, "list"], ["time", NAME, "sync"]):
        refused = hvhost(*words)
        assert refused.returncode == 1, words
        assert f"'{NAME}' is paused; `hvhost resume {NAME}`" in refused.stderr
    pages.do(resume)
    assert inside("echo on") == "on\n"


def pool() -> list[tuple[str, str]]:
    """The guest's file of what it was told: 512 bytes of a key, 2,048 of its value, and so on.

    Behind a string's NUL lies whatever its daemon had in its memory.
    """
    data = bytes.fromhex(inside(f"od -An -v -tx1 <{POOL}"))
    records = [data[start : start + 2560] for start in range(0, len(data), 2560)]
    texts = [(each[:512].split(b"\0")[0], each[512:].split(b"\0")[0]) for each in records]
    return [(key.decode(), value.decode()) for key, value in texts]


def test_key_value_pairs(demo: MachineClient) -> None:
    words = pages.commands("services.md", "Key-value pairs")
    said = {}
    for each in words:
        said[each[2]] = pages.do(each)
        if each[2] == "set":
            assert ("role", "web") in pool()
        if each[-1] == "--json":
            items = json.loads(said["list"])
            assert {"pool": "external", "key": "role", "value": "web"} in items
            assert {"VirtualMachineName"} <= {each["key"] for each in items}
        elif each[-1] == "auto":
            assert "OSName" in said["list"] and "role" not in said["list"]
    assert said["get"] == "Debian\n"
    assert "role" not in dict(pool())


def test_commands(demo: MachineClient) -> None:
    (words,) = pages.commands("sockets.md", "Commands")
    assert len(pages.do(words).splitlines()) == 3
    result = hvhost("exec", NAME, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 7)


def test_files(demo: MachineClient, tmp_path: Path) -> None:
    (words,) = pages.commands("sockets.md", "Files")
    (tmp_path / words[2]).write_text("[app]\n")

    def taken() -> bool:  # the daemon registers in its own time
        return not hvhost(*words, cwd=tmp_path).returncode

    wait_for("the file copy daemon", taken, pages.BOOT_SECONDS)
    assert inside(f"cat {words[3]}{words[2]}") == "[app]\n"


def test_every_service_is_switched_off_and_on(demo: MachineClient) -> None:
    """Off: gone from the guest's bus, and said so. On: its driver takes it anew."""
    listing, disable = pages.commands("sockets.md", "Services")
    pages.do(listing)
    names = {each["name"] for each in json.loads(pages.do([*listing, "--json"]))}
    assert names == {"heartbeat", "shutdown", "timesync", "kvp", "file-copy", "vss", "sockets"}
    instances = {each.name: each.interface_instance for each in demo.info().channels}
    for name in sorted(names - {"sockets"}):
        device = f"{DEVICES}/{instances[name]}"

        def driver(device: str = device) -> str:
            return inside(f"ls -d {device} || echo gone; readlink {device}/driver || true")

        assert driver().endswith("/hv_utils\n")
        switch = [name if word == disable[-1] else word for word in disable]
        pages.do(switch)
        wait_for(f"{name} to go", lambda driver=driver: driver() == "gone\n", 90)  # type: ignore[misc]
        pages.do([word.replace("--disable", "--enable") for word in switch])
        wait_for(f"{name} to come", lambda driver=driver: driver().endswith("/hv_utils\n"), 90)  # type: ignore[misc]
    wait_for("the heartbeat", lambda: demo.info().heartbeat is HeartbeatStatus.OK)
    wait_for("the services", lambda: demo.info().shutdown_ready and demo.info().timesync_ready)
    wait_for("the daemons", lambda: demo.info().kvp_ready and demo.info().file_copy_ready)
    pages.do(["services", NAME, "--disable", "sockets"])
    refused = hvhost("services", NAME, "--disable", "socks")
    assert refused.returncode == 1 and "There is no service 'socks'" in refused.stderr
    assert inside("echo by the serial line") == "by the serial line\n"
    pages.do(["services", NAME, "--enable", "sockets"])


def test_the_example_in_python() -> None:
    code = pages.block("sockets.md", "Streams: Hyper-V sockets", "python")
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"from the guest: \d+\.\d+\S*\n", result.stdout), result.stdout
