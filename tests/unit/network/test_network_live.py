"""A switch between real kernels: each end of a cable is a namespace of its own, no guest needed.

What is measured is seen by those kernels, by tshark where it is, and never by the switch alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.network import switch_client
from hvhost.network.config import parse_adapter
from hvhost.network.namespace import Namespace, open_namespace
from hvhost.network.switch import STORM_BURST
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.wire import Witness

FLOOD = """
import json, socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind((sys.argv[1], 0))
    frame = b"\\xff" * 6 + bytes.fromhex("02000000f100") + b"\\x12\\x34" + bytes(46)
    for _ in range(int(sys.argv[2])):
        sock.send(frame)
"""


class Member:
    """A kernel with one cable in a switch."""

    def __init__(self, namespace: Namespace, address: str) -> None:
        self.namespace, self.address = namespace, address
        self.witness = Witness(namespace.pid)

    def reaches(self, other: str) -> bool:
        return bool(self.witness.do("ping", to=other, timeout=2.0)["answers"])


class Lan:
    """A switch process, and members plugged into it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[Member] = []

    def member(self, address: str, hello: Hello | None = None) -> Member:
        namespace = open_namespace([("tap0", f"{address}/24")])
        number = len(self.members)
        settings = hello or Hello("tap", f"port{number}")
        switch_client.attach(self.name, settings, namespace.descriptors[0])
        self.members.append(Member(namespace, address))
        return self.members[-1]

    def close(self) -> None:
        for each in self.members:
            each.namespace.close()


@pytest.fixture
def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lan]:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    try:
        open_namespace([("tap0", "")]).close()
    except HvHostError as error:
        pytest.skip(str(error))
    switch_client.start(SwitchConfig("lan", None))
    made = Lan("lan")
    yield made
    made.close()
    switch_client.stop("lan")


def hvhost(*words: str) -> list[str]:
    return [sys.executable, "-m", "hvhost", *words]


def transfer(one: Member, other: Member, size: int) -> float:
    """*size* bytes of TCP from *one* to *other*, whole by their hash; the seconds it took."""
    sink = other.witness.begin("sink", address=other.address, port=5001)
    sent = one.witness.do("source", to=other.address, port=5001, size=size)
    got = sink.result()
    assert (got["size"], got["sha256"]) == (size, sent["sha256"])
    return float(got["seconds"])


@contextlib.contextmanager
def capturing(lan: Lan, path: Path, *more: str) -> Iterator[None]:
    """``hvhost net capture``, ended as a person does."""
    process = subprocess.Popen(hvhost("net", "capture", lan.name, "-w", str(path), *more))
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size >= 24) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the head of the file is written before the switch is asked
    yield
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def tshark(path: Path, *words: str) -> list[list[str]]:
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not on this computer; apt-get install tshark")
    done = subprocess.run(
        ["tshark", "-n", "-r", str(path), "-T", "fields", *words],
        capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(path.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_a_capture_of_real_traffic_opens_in_wireshark(lan: Lan, tmp_path: Path) -> None:
    one, two = lan.member("10.77.0.1"), lan.member("10.77.0.2")
    assert one.reaches(two.address)
    size, path = 3 << 20, tmp_path / "lan.pcap"
    with capturing(lan, path):
        transfer(one, two, size)
    rows = tshark(
        path,
        "-Y",
        "tcp.dstport == 5001 && tcp.len > 0",
        "-e",
        "ip.src",
        "-e",
        "tcp.len",
        "-e",
        "tcp.seq",
    )
    assert {row[0] for row in rows} == {one.address}
    assert max(int(row[1]) for row in rows) > 60_000, "segments cross the switch whole"
    covered = 0
    for start, length in sorted((int(row[2]), int(row[1])) for row in rows):
        assert start <= covered + 1, f"the capture misses what comes behind byte {covered}"
        covered = max(covered, start + length - 1)
    assert covered >= size, "all of it is in the capture"
    assert tshark(path, "-Y", "_ws.malformed", "-e", "frame.number") == []


def test_a_capture_of_one_port_has_what_comes_in_there(lan: Lan, tmp_path: Path) -> None:
    one, two = lan.member("10.77.0.1"), lan.member("10.77.0.2")
    path = tmp_path / "port.pcap"
    with capturing(lan, path, "--port", "port1"):
        for _ in range(3):
            assert one.reaches(two.address)
    replies = tshark(path, "-Y", "icmp", "-e", "ip.src", "-e", "icmp.type")
    assert replies and {tuple(row) for row in replies} == {(two.address, "0")}


def test_a_kernel_can_be_told_to_send_segments_one_by_one(lan: Lan) -> None:
    """What row lro needs: without it, it would prove nothing about merging."""
    one, two = lan.member("10.77.0.1"), lan.member("10.77.0.2")
    seen = []
    for on in (True, False):
        one.witness.do("offload", interface="tap0", on=on)
        watch = two.witness.begin("watch", interface="tap0", seconds=60)
        transfer(one, two, 1 << 20)
        seen.append(watch.result())
    assert seen[0]["large"] > 0 and seen[0]["csum_not_ready"] > 0
    assert seen[1]["largest"] <= 1500 and seen[1]["csum_not_ready"] == 0


def test_a_port_sends_no_faster_than_its_rate(lan: Lan) -> None:
    slow = lan.member("10.77.0.1", Hello("tap", "slow", rate=40))  # 5 MB a second
    other = lan.member("10.77.0.2")
    size = 4_000_000
    # What may go at once is the burst, and what the kernels had in hand.
    assert transfer(slow, other, size) > 0.5 * size / 5e6
    transfer(other, slow, size)  # the other direction is not limited, and works


def test_a_storm_is_cut_off_and_neighbours_go_on(lan: Lan) -> None:
    loud, one, two = (lan.member(f"10.77.0.{number}") for number in (1, 2, 3))
    assert one.reaches(two.address)
    count = 6 * int(STORM_BURST)
    watch = two.witness.begin("watch", interface="tap0", seconds=60, sender="02:00:00:00:f1:00")
    started = time.monotonic()
    loud.witness.command(sys.executable, "-c", FLOOD, "tap0", str(count))
    assert one.reaches(two.address), "neighbours reach each other while it storms"
    seconds = time.monotonic() - started
    time.sleep(0.5)
    heard = watch.result()["frames"]
    info = switch_client.info("lan")
    assert 0 < heard <= STORM_BURST + 20_000 * (seconds + 1)
    if info["suppressed"] == 0:
        # So slow a computer that the storm was none: the kernel's queue dropped it before.
        assert heard < count
    assert loud.reaches(two.address), "unicast goes on"


@pytest.mark.parametrize("options", [("vlan=10", "vlan=20"), ("isolated", "isolated")])
def test_kernels_that_may_not_reach_each_other_do_not(lan: Lan, options: tuple[str, str]) -> None:
    configs = [parse_adapter(f"switch:lan,{each}", name="x") for each in options]
    hellos = [
        Hello("tap", f"port{number}", config.vlan, config.trunk, config.isolated)
        for number, config in enumerate(configs)
    ]
    one, two = lan.member("10.77.0.1", hellos[0]), lan.member("10.77.0.2", hellos[1])
    like_one = lan.member("10.77.0.3", Hello("tap", "third", vlan=configs[0].vlan))
    assert not one.reaches(two.address)
    assert one.reaches(like_one.address)


def test_a_tag_keeps_its_priority_from_trunk_to_trunk(lan: Lan) -> None:
    """What row vlan hears of a guest's 802.1p priorities."""
    ports = [Hello("tap", f"trunk{number}", trunk=(20, 30)) for number in range(2)]
    ports.append(Hello("tap", "access", vlan=20))
    one, two, access = (
        lan.member(f"10.77.0.{number}", port) for number, port in enumerate(ports, 1)
    )
    watch = two.witness.begin("watch", interface="tap0", seconds=60, sender="02:00:00:00:f1:00")
    head = "ff" * 6 + "02000000f100"
    for tag in (5 << 13 | 20, 0 << 13 | 20, 7 << 13 | 30):
        one.witness.do("inject", interface="tap0", frame=f"{head}8100{tag:04x}1234" + "00" * 46)
    access.witness.do("inject", interface="tap0", frame=f"{head}1234" + "00" * 46)
    assert two.reaches(one.address), "all of it has arrived"
    seen = watch.result()
    assert seen["tags"] == {"20": 3, "30": 1}
    assert seen["priorities"] == {"20": [0, 5], "30": [7]}


PAGE = Path(__file__).resolve().parents[3] / "docs" / "network.md"


def of_page(language: str, number: int = 1) -> list[str]:
    """The lines of a block about bridges in the page."""
    part = PAGE.read_text().partition("## Bridge to the LAN\n")[2].partition("\n## ")[0]
    block = part.split(f"```{language}\n")[number]
    return block.partition("\n```")[0].splitlines()


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Witness]:
    """10.78.0.1 at a bridge, with root's part of docs/network.md, in a namespace of its own."""
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not on this computer; apt-get install util-linux")
    steps = (
        "ip link set lo up",
        "ip link add br0 type bridge",
        "ip address add 10.78.0.1/24 dev br0",
        "ip link set br0 up",
        *of_page("text"),
        "echo ready",
        "read wait",
    )
    office = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", " && ".join(steps)],
        env={**os.environ, "USER": "root"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert office.stdout is not None
    if office.stdout.readline() != "ready\n":
        pytest.skip(f"no bridge can be made here: {office.communicate()[1].strip()}")
    yield Witness(office.pid)
    office.communicate("\n")


def reaches_in_time(guest: Member, address: str) -> bool:
    """A bridge listens before it forwards."""
    deadline = time.monotonic() + 30
    while not (reached := guest.reaches(address)) and time.monotonic() < deadline:
        pass
    return reached


def test_an_uplink_is_in_the_vlans_it_is_told(gateway: Witness) -> None:
    """As docs/network.md has it: behind the switch ten only machines of VLAN 10 are in the LAN."""
    lan = Lan("ten")
    try:
        gateway.command(*hvhost(*of_page("sh", 2)[0].split()[1:]))
        inside = lan.member("10.78.0.2", Hello("tap", "ten", vlan=10))
        outside = lan.member("10.78.0.3")
        assert reaches_in_time(inside, "10.78.0.1")
        assert not outside.reaches("10.78.0.1")
    finally:
        lan.close()
        with contextlib.suppress(HvHostError):
            switch_client.stop("ten")


def test_a_bridge_of_the_lan_gets_segments_whole_and_sums_unmade(gateway: Witness) -> None:
    lan = Lan("office")
    try:
        gateway.command(*hvhost(*of_page("sh")[0].split()[1:]))
        guest = lan.member("10.78.0.2")
        assert reaches_in_time(guest, "10.78.0.1")
        size = 3 << 20
        watch = gateway.begin("watch", interface="tap0", seconds=60)
        sink = gateway.begin("sink", address="10.78.0.1", port=5001)
        sent = guest.witness.do("source", to="10.78.0.1", port=5001, size=size)
        assert sink.result()["sha256"] == sent["sha256"]
        seen = watch.result()
        assert seen["large"] > 0, "segments of 64 KiB reach the bridge whole"
        assert seen["csum_not_ready"] >= seen["large"], "and nobody made their sums"
        # And back.
        sink = guest.witness.begin("sink", address="10.78.0.2", port=5001)
        watch = guest.witness.begin("watch", interface="tap0", seconds=60)
        sent = gateway.do("source", to="10.78.0.2", port=5001, size=size)
        assert sink.result()["sha256"] == sent["sha256"]
        assert watch.result()["large"] > 0
        ports = {each["name"]: each for each in switch_client.info("office")["ports"]}
        assert ports["uplink"]["addresses"], "the bridge was heard behind the uplink"
    finally:
        lan.close()
        with contextlib.suppress(HvHostError):
            switch_client.stop("office")
