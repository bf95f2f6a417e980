"""What docs/network.md has people type for a complete guest does what it says.

One guest for all of it, since its start takes minutes on emulated processors: ``HVHOST_TEST_FULL``
has it run, as ``make test-matrix`` does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from guest.helpers import hvhost, wait_for
from guest.matrix import needs_full
from guest.pages import block, commands, do, ended, inside
from hvhost.guests.full import prepare_full

PAGE = "network.md"
NAME = "demo"  # the page's word
BOOT_SECONDS = 900.0
HOST_KEYS = "ls /etc/ssh | grep ssh_host_ || true"
ADDRESSES = "ip -o address show scope global; ip route show default; resolvectl dns"


def shell_lines(heading: str) -> list[list[str]]:
    return [line.split() for line in block(PAGE, heading).splitlines()]


def ssh(words: list[str], key: Path, script: str) -> subprocess.CompletedProcess[str]:
    """The page's ssh with a key of ours; nothing of whoever runs the test is used or asked."""
    options = ["BatchMode=yes", "ConnectTimeout=120", "IdentitiesOnly=yes", f"IdentityFile={key}"]
    options += ["UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null", "LogLevel=ERROR"]
    return subprocess.run(
        [words[0], "-F", "none", *(f"-o{option}" for option in options), *words[1:], script],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        check=False,
    )


def come_in(directory: Path, copy: list[str], connect: list[str]) -> None:
    """Copy a key into the guest and be in it; whoever has none does not come in."""
    key = directory / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    assert inside(NAME, HOST_KEYS) == "", "keys that were built in would be those of all machines"

    def refused() -> bool:
        tried = ssh(connect, key, "true")
        assert tried.returncode, "root, who has no password, came in without a key"
        return "Permission denied" in tried.stderr

    wait_for("sshd behind the port", refused, 300.0)
    assert inside(NAME, HOST_KEYS).split() == ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"]

    assert copy[3] == "~/.ssh/id_ed25519.pub"
    copy = [*copy[:3], f"{key}.pub", *copy[4:]][1:]
    wait_for("the file copy daemon", lambda: not hvhost(*copy).returncode, 300.0)
    assert inside(NAME, f"cat {copy[3]}") == key.with_suffix(".pub").read_text()
    seen = ssh(connect, key, "cat /proc/sys/kernel/random/boot_id; id -un; echo $SSH_CONNECTION")
    assert seen.returncode == 0, seen.stderr
    boot, user, connection = seen.stdout.splitlines()
    assert boot == inside(NAME, "cat /proc/sys/kernel/random/boot_id").strip()
    assert user == "root" and connection.endswith(" 22")


def set_addresses() -> None:
    lease = inside(NAME, "ip -o -4 address show scope global").split()[3]
    static, dhcp = commands(PAGE, "Set addresses from the host")
    wait_for("the key-value daemon", lambda: not hvhost(*static).returncode, 300.0)
    wanted = [each for each in static[4:] if each[0].isdigit()]
    assert len(wanted) == 4
    # IPv6 looks first whether anybody else has the address, and networkd takes its time.
    wait_for("the addresses", lambda: all(e in inside(NAME, ADDRESSES) for e in wanted), 120.0)
    assert lease not in inside(NAME, ADDRESSES)
    do(dhcp)

    def leased() -> bool:
        seen = inside(NAME, ADDRESSES)
        return lease in seen and not any(each in seen for each in wanted if "/" in each)

    wait_for("an address by DHCP", leased, 180.0)


def plug_and_unplug() -> None:
    do(["net", "create", "lan", "--uplink", "none"])
    add, listing, link, remove = commands(PAGE, "Adapters while the machine runs")
    do(add)
    told = do(listing)
    assert "net0" in told and "trunk0" in told
    found = {each["name"]: each for each in json.loads(do([*listing, "--json"]))}
    mac = found["trunk0"]["mac"]

    def carrier() -> str:
        return inside(
            NAME,
            f"for each in /sys/class/net/*; do [ $(cat $each/address) != {mac} ] || "
            "cat $each/carrier || echo down; done",
        ).strip()

    wait_for("the adapter", lambda: carrier() == "1", 180.0)
    do(link)
    wait_for("its link to go", lambda: carrier() == "0", 60.0)
    do([*link[:-1], "up"])
    wait_for("its link to come", lambda: carrier() == "1", 60.0)
    do(remove)
    wait_for("its end", lambda: carrier() == "", 60.0)
    assert "trunk0" not in do(listing)


@needs_full
@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh (Debian: openssh-client)")
@pytest.mark.timeout(3600)  # the first time the guest is built
def test_ssh_addresses_and_adapters_of_a_complete_guest(tmp_path: Path) -> None:
    start, copy, connect = shell_lines("Ssh into a guest")
    prepare_full(start[start.index("--guest") + 1])
    assert start[start.index("--name") + 1] == NAME
    with ended(NAME, switch="lan"):
        do(start[1:], BOOT_SECONDS)
        come_in(tmp_path, copy, connect)
        plug_and_unplug()
        set_addresses()
