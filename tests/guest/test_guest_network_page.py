"""What docs/network.md has people type does what it says, with real guests.

Two machines at once take their time on emulated processors: ``make test-matrix`` runs this.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guest.helpers import command, wait_for
from guest.matrix import only_in_matrix
from guest.pages import block, commands, do, ended

PAGE = "network.md"
pytestmark = [
    only_in_matrix("several machines at once"),
    pytest.mark.timeout(900),
]


def lease(name: str) -> str:
    """Have the machine ask for an address by DHCP; which it got."""
    bound = "[ $1 != bound ] || ip address add $ip/24 dev $interface"
    script = f"echo '{bound}' > /tmp/d; sed -i '1i #!/bin/sh' /tmp/d; chmod 755 /tmp/d"
    do(["exec", name, "--", "sh", "-c", f"ip link set eth0 up; {script}"])
    do(["exec", name, "--", "udhcpc", "-i", "eth0", "-n", "-q", "-s", "/tmp/d"])
    return do(["exec", name, "--", "ip", "-o", "-4", "address", "show", "eth0"]).split()[3]


def test_several_machines_behind_one_nat() -> None:
    with ended("anna", "bert", switch="team"), socket.create_server(("127.0.0.1", 0)) as server:
        outputs = [do(words) for words in commands(PAGE, "Several machines behind one NAT")]
        assert "uplink nat" in outputs[-1]
        addresses = [lease(name).partition("/")[0] for name in ("anna", "bert")]
        assert len(set(addresses)) == 2
        server.settimeout(60)
        port = server.getsockname()[1]
        for name in ("anna", "bert", "anna"):
            ask = f"(nc 192.168.78.1 {port} < /dev/null > /tmp/said 2>&1) &"
            do(["exec", name, "--", "sh", "-c", ask])
            stream, _ = server.accept()
            with stream:
                stream.sendall(f"hello {name}".encode())
            until = (
                f"n=0; until grep 'hello {name}' /tmp/said; do sleep 1; [ $((n+=1)) -lt 60 ]; done"
            )
            do(["exec", name, "--", "sh", "-e", "-c", until])
        assert "3 packets received" in do(["exec", "anna", "--", "ping", "-c", "3", addresses[1]])


# Another computer of the LAN is a namespace at the bridge's other port.
BRIDGED = """
hvhost() {{ "$PYTHON" -m hvhost "$@"; }}
unshare --net sleep 600 & lan=$!
trap "kill $lan" EXIT
ip link add br0 type bridge
ip link set br0 up
ip link add lan0 type veth peer name lan1
ip link set lan0 master br0 up
until ip link set lan1 netns $lan && nsenter -t $lan -n ip link show lan1; do sleep 1; done
nsenter -t $lan -n ip address add 192.168.90.7/24 dev lan1
nsenter -t $lan -n ip link set lan1 up
{root}
{user}
until hvhost exec clerk -- ip link set eth0 up; do sleep 1; done
hvhost exec clerk -- ip address add 192.168.90.2/24 dev eth0
hvhost exec clerk -- ping -c 3 192.168.90.7
nsenter -t $lan -n ip neighbour show
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a bridge, which is root's")
def test_bridge_to_the_lan() -> None:
    root, user = (block(PAGE, "Bridge to the LAN", language) for language in ("text", "sh"))
    with ended("clerk", switch="office"):
        done = subprocess.run(
            ["unshare", "--net", "sh", "-ec", BRIDGED.format(root=root, user=user)],
            env=os.environ | {"USER": "root", "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "3 packets received" in done.stdout
        assert re.search(r"192\.168\.90\.2 .* 00:15:5d:", done.stdout), "the LAN knows its address"


def test_two_machines_on_one_private_vlan_with_jumbo_frames_and_a_capture(tmp_path: Path) -> None:
    with ended("one", "two", switch="lan"):
        outputs = [do(words) for words in commands(PAGE, "Two machines on one private VLAN")]
        assert "3 packets received" in outputs[-2], "the machines reach each other"
        assert "one/net0 vlan 10" in outputs[-1] and "two/net0 vlan 10" in outputs[-1]

        capture = commands(PAGE, "Capture")[0]
        assert capture[:2] == ["net", "capture"]
        catching = subprocess.Popen(command(*capture), cwd=tmp_path)
        file = tmp_path / capture[-1]
        wait_for("the capture", lambda: file.exists() and file.stat().st_size)
        time.sleep(1.0)
        outputs = [do(words) for words in commands(PAGE, "Jumbo frames")]
        assert "3 packets received" in outputs[-1]
        time.sleep(1.0)
        catching.send_signal(signal.SIGINT)
        assert catching.wait(20) == 0
        # Echoes and replies as one frame each: 14 bytes of Ethernet, 20 of IP, 8 of ICMP, 8,972.
        data, position, sizes = file.read_bytes(), 24, []
        while position < len(data):
            sizes.append(int.from_bytes(data[position + 12 : position + 16], "little"))
            position += 16 + int.from_bytes(data[position + 8 : position + 12], "little")
        assert sizes.count(9014) == 6
