"""What docs/network.md has people type does what it says, with real guests.

Two machines at once take their time on emulated processors: ``make test-matrix`` runs this.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guest.helpers import command, wait_for
from guest.matrix import only_in_matrix
from guest.pages import block, commands, do, ended, inside
from hvhost.verify.wire import snmp

PAGE = "network.md"
TRANSFER = 16 << 20
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
        assert "uplink (nat)" in outputs[-1]
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


def packets(pcap: bytes) -> list[bytes]:
    """Frames of a capture, whole as they went."""
    position, found = 24, []
    while position < len(pcap):
        kept, size = struct.unpack_from("<II", pcap, position + 8)
        assert kept == size, "nothing is cut off"
        found.append(pcap[position + 16 : position + 16 + kept])
        position += 16 + kept
    return found


def sums_up(packet: bytes) -> bool:
    """Whether the checksum of an IPv4 TCP segment in a frame is right."""
    ip = packet[14:]
    tcp = ip[4 * (ip[0] & 15) :]
    pseudo = ip[12:20] + struct.pack("!HH", 6, len(tcp))
    data = pseudo + tcp + bytes(len(tcp) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return total % 0xFFFF == 0


def transfer(sender: str, receiver: str, address: str) -> None:
    """Send :data:`TRANSFER` bytes over TCP from guest to guest; they arrive whole."""
    # TCP makes its segments as large as what it sends in a millisecond, which is little where
    # processors are emulated; so many MSS are the least.
    inside(sender, "echo 44 >/proc/sys/net/ipv4/tcp_min_tso_segs")
    inside(
        receiver,
        "(nc -l -p 5001 </dev/null >/tmp/in; touch /tmp/done) >/dev/null 2>&1 & "
        "until netstat -ltn | grep -q :5001; do sleep 1; done",
    )
    # cat hands the kernel whole files, nc itself a KiB at a time.
    sent = inside(
        sender,
        f"head -c {TRANSFER} /dev/urandom >/tmp/out; sha256sum </tmp/out; "
        f"nc {address} 5001 -e cat /tmp/out",
    )
    got = inside(receiver, "until [ -e /tmp/done ]; do sleep 1; done; sha256sum </tmp/in")
    assert got == sent and len(got.split()[0]) == 64


def watch_a_port(tmp_path: Path, line: list[str]) -> None:
    """The page's capture into tcpdump: what comes in on that port alone."""
    where = line.index("|")
    with (
        (tmp_path / "told").open("w+") as told,
        subprocess.Popen(command(*line[:where]), stdout=subprocess.PIPE) as catching,
        subprocess.Popen(line[where + 1 :], stdin=catching.stdout, stdout=told) as telling,
    ):
        assert catching.stdout is not None
        catching.stdout.close()
        time.sleep(3.0)
        do(["exec", "one", "--", "ping", "-c", "3", "192.168.10.2"])
        time.sleep(1.0)
        catching.send_signal(signal.SIGINT)
        assert (catching.wait(30), telling.wait(30)) == (0, 0)
        told.seek(0)
        lines = [each for each in told if "ICMP echo" in each]
    assert len(lines) == 3, lines
    assert all("192.168.10.1 > 192.168.10.2: ICMP echo request" in each for each in lines)


@pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump")
def test_two_machines_on_one_private_vlan_with_jumbo_frames_and_a_capture(tmp_path: Path) -> None:
    with ended("one", "two", switch="lan"):
        outputs = [do(words) for words in commands(PAGE, "Two machines on one private VLAN")]
        assert "3 packets received" in outputs[-2], "the machines reach each other"
        assert re.search(r"one/net0 +10 ", outputs[-1]) and re.search(r"two/net0 +10 ", outputs[-1])

        capture, capture_of_a_port = commands(PAGE, "Capture")
        assert capture[:2] == ["net", "capture"]
        watch_a_port(tmp_path, capture_of_a_port)
        catching = subprocess.Popen(command(*capture), cwd=tmp_path)
        file = tmp_path / capture[-1]
        wait_for("the capture", lambda: file.exists() and file.stat().st_size)
        time.sleep(1.0)
        outputs = [do(words) for words in commands(PAGE, "Jumbo frames")]
        assert "3 packets received" in outputs[-1]
        transfer("one", "two", "192.168.10.2")
        time.sleep(1.0)
        catching.send_signal(signal.SIGINT)
        assert catching.wait(20) == 0
        seen = packets(file.read_bytes())
        # Echoes and replies as one frame each: 14 bytes of Ethernet, 20 of IP, 8 of ICMP, 8,972.
        echoes = [each for each in seen if len(each) == 9014 and each[23] == 1]
        assert len(echoes) == 6
        # Nobody between the two guests has cut the segments, or made or missed their checksums.
        large = [each for each in seen if len(each) > 60_000]
        assert large, f"the largest frame had {max(map(len, seen))} bytes"
        assert not sums_up(large[0])
        assert snmp(inside("two", "cat /proc/net/snmp"), "Tcp", "InCsumErrors") == 0
