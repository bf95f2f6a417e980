"""NAT behind a switch: what a passt gets to see, whose it is; and real ones with real kernels."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import nat, switch_client
from hvhost.network.config import AdapterConfig, PortForward, parse_uplink
from hvhost.network.frame import NO_OFFLOAD
from hvhost.network.namespace import inside, open_namespace
from hvhost.network.nat import GATEWAY_MAC, HEAD_SIZE, NatWire, for_gateway
from hvhost.network.passt import Lease
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.verify.wire import Witness
from simulated.dhcp_client import lease

OWN = ipaddress.IPv4Address("192.168.78.1")
ALL, SOMEBODY = b"\xff" * 6, bytes.fromhex("00155d000001")


def arp(target: str, to: bytes = ALL, source: bytes = SOMEBODY) -> bytes:
    addresses = source + bytes(4) + bytes(6) + ipaddress.IPv4Address(target).packed
    return to + source + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + addresses


def udp4(port: int, to: bytes = ALL) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x46, 0, 32, 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    return to + SOMEBODY + b"\x08\x00" + header + bytes(4) + struct.pack("!HHHH", 68, port, 8, 0)


def ipv6(kind: int, body: bytes, to: bytes = bytes.fromhex("333300000002")) -> bytes:
    header = struct.pack("!IHBB16s16s", 6 << 28, len(body), kind, 255, bytes(16), bytes(16))
    return to + SOMEBODY + b"\x86\xdd" + header + body


def question(target: str) -> bytes:
    return ipv6(58, bytes((135, 0, 0, 0, 0, 0, 0, 0)) + ipaddress.IPv6Address(target).packed)


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        (arp("192.168.78.1"), True),
        (arp("192.168.78.3"), False),  # passt would answer for everybody
        (arp("192.168.78.3", to=GATEWAY_MAC), True),
        (udp4(67), True),
        (udp4(53), False),
        (udp4(53, to=GATEWAY_MAC), True),
        (udp4(67, to=bytes.fromhex("00155d000002")), False),  # flooded, for another machine
        (ipv6(58, bytes((133, 0, 0, 0))), True),
        (ipv6(58, bytes((134, 0, 0, 0))), False),
        (question("fe80::1"), True),
        (question("fe80::2"), False),
        (ipv6(17, struct.pack("!HHHH", 546, 547, 8, 0)), True),
        (ipv6(17, struct.pack("!HHHH", 546, 5353, 8, 0)), False),
        (ipv6(6, bytes(20), to=GATEWAY_MAC), True),
        (GATEWAY_MAC + SOMEBODY + b"\x81\x00\x00\x0a\x08\x00" + bytes(40), False),
        (ALL + SOMEBODY + b"\x88\xcc" + bytes(40), False),
    ],
)
def test_a_passt_sees_only_what_is_for_the_gateway(what: bytes, seen: bool) -> None:
    assert for_gateway(what[:HEAD_SIZE].ljust(HEAD_SIZE, b"\0"), OWN) is seen


@settings(deadline=None)
@given(st.binary(min_size=HEAD_SIZE, max_size=HEAD_SIZE))
def test_no_frame_makes_it_fail(head: bytes) -> None:
    for_gateway(head, OWN)
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x08\x06"):
        for_gateway(head[:12] + kind + head[14:], OWN)


class _Process:
    """As far as a started passt is looked at."""

    def __init__(self) -> None:
        self.ended = False

    def poll(self) -> int | None:
        return 0 if self.ended else None

    def wait(self, timeout: float) -> int:
        self.ended = True
        return 0


class Passts:
    """All that were started: their leases and forwards, and the far ends of their sockets."""

    def __init__(self) -> None:
        self.started: list[tuple[tuple[PortForward, ...], Lease, socket.socket]] = []
        self.processes: list[_Process] = []
        self.refuse = False

    def start(
        self, forwards: tuple[PortForward, ...], lease: Lease, *, wait: float
    ) -> tuple[_Process, socket.socket]:
        if self.refuse:
            raise HvHostError("passt gave up: no.")
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        self.started.append((forwards, lease, far))
        self.processes.append(_Process())
        return self.processes[-1], near

    def frames(self, number: int) -> list[bytes]:
        found, far = [], self.started[number][2]
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := far.recv(1 << 20):
                data += part
        while data:
            size = struct.unpack_from("!I", data)[0]
            found.append(data[4 : 4 + size])
            data = data[4 + size :]
        return found


class Bench:
    def __init__(self, passts: Passts, options: str = "") -> None:
        self.passts, self.readable = passts, 0

        def readable() -> None:
            self.readable += 1

        config = parse_uplink(f"nat{options}")
        assert config is not None
        self.wire = NatWire(config, Loop(), readable=readable)

    def send(self, whole: bytes) -> None:
        assert self.wire.send([memoryview(NO_OFFLOAD), whole[:12], whole[12:]])

    def receive(self) -> bytes:
        buffers = [memoryview(bytearray(10)), memoryview(bytearray(70_000))]
        size = self.wire.receive_into(buffers)
        return bytes(buffers[1][: max(0, size - 10)])


@pytest.fixture
def passts(monkeypatch: pytest.MonkeyPatch) -> Passts:
    made = Passts()
    monkeypatch.setattr(nat, "start_passt", made.start)
    return made


def machine(number: int) -> bytes:
    return bytes.fromhex("00155d") + number.to_bytes(3, "big")


def test_each_machine_has_a_passt_and_an_address_of_its_own(passts: Passts) -> None:
    bench = Bench(passts, ",address=10.9.8.2/24,forward=2222:22")
    assert len(passts.started) == 1, "the first is there before anybody speaks"
    for number in (1, 2, 3, 2):
        bench.send(arp("10.9.8.2", source=machine(number)))
    assert [len(passts.frames(number)) for number in range(3)] == [1, 2, 1]
    leases = [lease for _, lease, _ in passts.started]
    assert [str(lease.address) for lease in leases] == ["10.9.8.1/24", "10.9.8.3/24", "10.9.8.4/24"]
    assert len({lease.address6 for lease in leases}) == 3
    assert [forwards for forwards, _, _ in passts.started] == [(PortForward(2222, 22),), (), ()]
    assert bench.wire.leases["00:15:5d:00:00:02"] == "10.9.8.3"
    bench.send(arp("10.9.8.3", source=machine(9)))
    assert len(passts.started) == 3, "who asks for a neighbour needs no passt"
    bench.wire.close()
    assert all(process.ended for process in passts.processes)


def test_what_comes_from_each_passt_is_read_in_turn(passts: Passts) -> None:
    bench = Bench(passts)
    for number in (1, 2):
        bench.send(arp("192.168.78.1", source=machine(number)))
    bench.wire.watch(read=True, write=False)
    for letter, (_, _, far) in zip(b"ab", passts.started, strict=True):
        for _ in range(2):
            far.sendall(struct.pack("!I", 60) + bytes((letter,)) * 60)
    for wire in [member.wire for member in bench.wire._members.values()]:
        assert wire is not None
        bench.wire._can_read(wire)
    assert [bench.receive()[:1] for _ in range(5)] == [b"a", b"b", b"a", b"b", b""]


def test_who_was_not_heard_of_for_the_longest_time_makes_room(passts: Passts) -> None:
    bench = Bench(passts, ",address=10.9.8.1/29")  # five machines
    for number in (1, 2, 3, 4, 5, 1, 6):
        bench.send(arp("10.9.8.1", source=machine(number)))
    assert len(passts.started) == 6
    assert machine(1).hex(":") in bench.wire.leases and machine(2).hex(":") not in bench.wire.leases
    assert passts.started[5][1].address == passts.started[1][1].address
    assert passts.started[1][2].recv(4096) and passts.started[1][2].recv(4096) == b"", (
        "it was let go"
    )


def test_a_flood_of_addresses_starts_no_flood_of_processes(passts: Passts) -> None:
    bench = Bench(passts)
    for number in range(1000):
        bench.send(arp("192.168.78.1", source=machine(number)))
    assert len(passts.started) <= nat.MEMBER_LIMIT + 2
    assert bench.wire.dropped > 800 and len(bench.wire.leases) <= nat.MEMBER_LIMIT


def test_a_passt_that_ends_is_started_anew_but_not_at_once(
    passts: Passts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bench = Bench(passts)
    ask = arp("192.168.78.1")
    bench.send(ask)
    for refuse in (False, True):
        passts.refuse = refuse
        passts.started[-1][2].close()
        (member,) = bench.wire._members.values()
        assert member.wire is not None
        bench.wire._can_read(member.wire)
        assert bench.receive() == b"" and member.wire is None
        bench.send(ask)  # here the first one is started again
        bench.send(ask)
    assert len(passts.started) == 2 and member.wire is None, "the second was tried too early"
    now += nat.RETRY_SECONDS
    bench.send(ask)
    passts.refuse = False
    bench.send(ask)
    assert len(passts.started) == 2, "it was refused a moment ago"
    now += nat.RETRY_SECONDS
    bench.send(ask)
    assert len(passts.started) == 3 and member.wire is not None


def test_a_passt_that_takes_nothing_holds_up_nobody(
    passts: Passts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nat, "QUEUE_LIMIT", 16)
    bench = Bench(passts)
    stuck, other = machine(1), machine(2)
    large = GATEWAY_MAC + stuck + b"\x08\x00" + bytes(60_000)
    for _ in range(nat.QUEUE_LIMIT + 50):
        bench.send(large)
    assert bench.wire.dropped > 0
    bench.send(arp("192.168.78.1", source=other))
    assert len(passts.frames(1)) == 1
    assert passts.frames(0)
    member = bench.wire._members[stuck]
    for _ in range(2 * nat.QUEUE_LIMIT):
        if not member.queue:
            break
        bench.wire._drain(member)
        assert passts.frames(0) is not None
    assert not member.queue, "once it reads, it gets what waited"


@pytest.mark.parametrize("address", ["10.9.8.0/24", "10.9.8.1/30", "10.9.8.1", "nonsense"])
def test_an_address_that_is_no_gateway_is_refused(address: str, passts: Passts) -> None:
    with pytest.raises(HvHostError, match="no address of a gateway"):
        NatWire(AdapterConfig("uplink", "", address=address), Loop(), readable=lambda: None)


# Real ones.


@contextlib.contextmanager
def echo_server(family: socket.AddressFamily, address: str) -> Iterator[int]:
    """A program of this computer that sends all back; its port."""

    def serve(stream: socket.socket) -> None:
        with stream:
            while data := stream.recv(1 << 16):
                stream.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = server.accept()
                threading.Thread(target=serve, args=(stream,), daemon=True).start()

    with socket.create_server((address, 0), family=family) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


EXCHANGE = """
import os, socket, sys, threading
data = os.urandom(1 << 20)
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as stream:
    threading.Thread(target=stream.sendall, args=(data,)).start()
    back = bytearray()
    while len(back) < len(data):
        part = stream.recv(1 << 16)
        assert part, len(back)
        back += part
print(back == data)
"""


@pytest.fixture
def lan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Witness]]:
    """A switch with NAT; each call plugs another kernel in."""
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    opened = []
    try:
        open_namespace([("tap0", "")]).close()
        switch_client.start(SwitchConfig("lan", parse_uplink("nat")))
    except HvHostError as error:
        pytest.skip(str(error))

    def member() -> Witness:
        namespace = open_namespace([("tap0", "")])
        opened.append(namespace)
        port = Hello("tap", f"port{len(opened)}")
        switch_client.attach("lan", port, namespace.descriptors[0])
        return Witness(namespace.pid)

    yield member
    for namespace in opened:
        namespace.close()
    switch_client.stop("lan")


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not on this computer")
def test_two_kernels_on_one_switch_reach_this_computer_and_each_other(
    lan: Callable[[], Witness],
) -> None:
    kernels = [lan(), lan()]
    addresses = []
    for kernel in kernels:
        got = lease(kernel)
        assert (got["gateway"], got["mask"]) == ("192.168.78.1", "255.255.255.0")
        kernel.command("ip", "address", "add", f"{got['address']}/24", "dev", "tap0")
        kernel.command("ip", "route", "add", "default", "via", got["gateway"])
        addresses.append(got["address"])
    assert len(set(addresses)) == 2
    assert sorted(switch_client.info("lan")["leases"].values()) == sorted(addresses)
    words = [sys.executable, "-m", "hvhost", "net", "ls"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    ends = {line.split()[-1] for line in told.splitlines() if " = " in line}
    assert ends == set(addresses), told
    with echo_server(socket.AF_INET, "127.0.0.1") as port:
        for kernel in kernels * 2:  # by turns, so that an answer to the other would be seen
            said = kernel.command(sys.executable, "-c", EXCHANGE, "192.168.78.1", str(port))
            assert said == "True\n"
    assert kernels[0].do("ping", to=addresses[1], timeout=5.0)["answers"] == 1
    neighbours = kernels[0].command("ip", "neighbor", "show", addresses[1])
    assert GATEWAY_MAC.hex(":") not in neighbours, "it was the neighbour who answered"


# Says once what it is and what it was told, to a client of each protocol.
SERVER = """
import socket
stream, datagrams = (
    socket.socket(socket.AF_INET, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
)
for server, port in ((stream, 22), (datagrams, 53)):
    server.settimeout(60)
    server.bind(("0.0.0.0", port))
stream.listen()
print("ready", flush=True)
client, _ = stream.accept()
client.sendall(b"tcp " + client.recv(100))
client.close()
said, client = datagrams.recvfrom(100)
datagrams.sendto(b"udp " + said, client)
"""


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not on this computer")
def test_ports_of_this_computer_lead_to_the_machine_that_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of TCP and those of UDP, each into a kernel behind the switch."""
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    tcp_port, udp_port = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    try:
        namespace = open_namespace([("tap0", "")])
    except HvHostError as error:
        pytest.skip(str(error))
    uplink = parse_uplink(f"nat,forward={tcp_port}:22+udp:{udp_port}:53")
    switch_client.start(SwitchConfig("lan", uplink))
    try:
        switch_client.attach("lan", Hello("tap", "port1"), namespace.descriptors[0])
        kernel = Witness(namespace.pid)
        got = lease(kernel)
        kernel.command("ip", "address", "add", f"{got['address']}/24", "dev", "tap0")
        kernel.command("ip", "route", "add", "default", "via", got["gateway"])
        words = inside(namespace.pid, [sys.executable, "-c", SERVER])
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"
            with socket.create_connection(("127.0.0.1", tcp_port), 20) as stream:
                stream.sendall(b"hello")
                assert stream.recv(100) == b"tcp hello"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                datagrams.settimeout(20)
                datagrams.sendto(b"hello", ("127.0.0.1", udp_port))
                assert datagrams.recv(100) == b"udp hello"
            assert server.wait(20) == 0
    finally:
        switch_client.stop("lan")
        namespace.close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not on this computer")
@pytest.mark.skipif(
    not Path("/proc/net/ipv6_route").exists()
    or "00000000000000000000000000000000 00 " not in Path("/proc/net/ipv6_route").read_text(),
    reason="this computer has no IPv6 network",
)
def test_ipv6_by_router_advertisements(lan: Callable[[], Witness]) -> None:
    kernels = [lan(), lan()]
    with echo_server(socket.AF_INET6, "::1") as port:
        for kernel in kernels:
            kernel.command(
                "sh", "-c", "n=0; until ip -6 route | grep -q ^default; do n=$((n+1));"
                " [ $n -lt 200 ]; sleep 0.1; done",
            )  # fmt: skip
            said = kernel.command(sys.executable, "-c", EXCHANGE, "fe80::1%tap0", str(port))
            assert said == "True\n"


def test_without_passt_the_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hvhost.cli.main import main

    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hvhost", "net", "create", "lan"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    said = capsys.readouterr().err
    assert "install the package passt" in said and "hvhost net create lan --uplink none" in said
