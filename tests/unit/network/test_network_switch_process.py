"""A whole switch process: adapters, tags, captures, answers; its frames go through real sockets."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import switch_client, switch_process
from hvhost.network.config import parse_adapter, parse_uplink
from hvhost.network.frame import NO_OFFLOAD, NOTHING, Offload
from hvhost.network.switch import ALL_VLANS, PortSettings, TokenBucket
from hvhost.network.switch_client import SOCKET_NAME, SwitchConfig
from hvhost.network.switch_process import QUEUE_LIMIT, SwitchProcess, uplink_port
from hvhost.network.uplinks import Cable
from hvhost.network.wires import DescriptorWire

A, B, C = (bytes((0, 0x15, 0x5D, 0, 0, number)) for number in (1, 2, 3))
ALL = b"\xff" * 6


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A switch named lan, running on a thread of this process."""
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    directory = switch_client.switch_directory("lan")
    directory.mkdir(parents=True)
    loop = Loop()
    process = SwitchProcess(directory, SwitchConfig("lan", None), loop)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield "lan"
    loop.stop()
    thread.join()
    process.close()
    loop.close()
    assert not (directory / SOCKET_NAME).exists()


def plug(options: str = "") -> socket.socket:
    """A port of the switch, as an adapter has it."""
    config = parse_adapter(f"switch:lan{options}", name="net0")
    port = socket.socket(fileno=switch_client.join(config, "vm"))
    port.settimeout(5.0)
    return port


def wait_for_ports(count: int) -> None:
    deadline = time.monotonic() + 5
    while len(switch_client.info("lan")["ports"]) != count and time.monotonic() < deadline:
        pass
    assert len(switch_client.info("lan")["ports"]) == count


def ethernet(to: bytes, sender: bytes, body: bytes = b"", tag: int | None = None) -> bytes:
    middle = b"" if tag is None else b"\x81\x00" + struct.pack("!H", tag)
    return to + sender + middle + b"\x12\x34" + body.ljust(46, b".")


def test_frames_go_where_their_address_was_heard(switch: str) -> None:
    one, two, three = plug(), plug(), plug()
    wait_for_ports(3)
    one.send(NO_OFFLOAD + ethernet(ALL, A))
    assert two.recv(200) == three.recv(200) == NO_OFFLOAD + ethernet(ALL, A)
    two.send(NO_OFFLOAD + ethernet(A, B, b"answer"))
    assert one.recv(200) == NO_OFFLOAD + ethernet(A, B, b"answer")
    three.setblocking(False)
    with pytest.raises(BlockingIOError):
        three.recv(200)
    for each in (one, two, three):
        each.close()
    wait_for_ports(0)


def test_tags_come_and_go_and_offloads_move_with_them(switch: str) -> None:
    access, trunk = plug(",vlan=10"), plug(",trunk=10+20")
    wait_for_ports(2)
    offload = Offload(1, 1, 54, 1448, 34, 16)
    access.send(offload.pack() + ethernet(ALL, A))
    moved = offload._replace(hdr_len=58, csum_start=38)
    assert trunk.recv(200) == moved.pack() + ethernet(ALL, A, tag=10)
    trunk.send(moved.pack() + ethernet(A, B, tag=0x600A))
    assert access.recv(200) == offload.pack() + ethernet(A, B)
    trunk.send(NO_OFFLOAD + ethernet(A, B, tag=20))
    trunk.send(NO_OFFLOAD + ethernet(A, B, b"after", tag=10))
    assert access.recv(200) == NOTHING.pack() + ethernet(A, B, b"after")
    access.close()
    trunk.close()


def test_a_segment_of_64_kib_goes_through_whole(switch: str) -> None:
    one, two = plug(), plug()
    wait_for_ports(2)
    data = ethernet(ALL, A, os.urandom(65_000))
    one.send(Offload(1, 1, 54, 1448, 34, 16).pack() + data)
    assert two.recv(1 << 17)[10:] == data
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("from_options", "to_options", "tag"), [("", "", None), (",vlan=7", ",trunk=7", 7)]
)
def test_no_frame_is_copied_on_its_way(
    switch: str,
    monkeypatch: pytest.MonkeyPatch,
    from_options: str,
    to_options: str,
    tag: int | None,
) -> None:
    """But for addresses and a tag, what a port gets is the memory that the frame was read into."""
    given: list[list[bytes | bytearray | memoryview]] = []

    def send(wire: DescriptorWire, buffers: list[bytes | bytearray | memoryview]) -> bool:
        given.append(list(buffers))
        return really(wire, buffers)

    really = DescriptorWire.send
    monkeypatch.setattr(DescriptorWire, "send", send)
    one, two = plug(from_options), plug(to_options)
    wait_for_ports(2)
    body = os.urandom(65_000)
    one.send(Offload(1, 1, 54, 1448, 34, 16).pack() + ethernet(ALL, A, body))
    assert two.recv(1 << 17)[10:] == ethernet(ALL, A, body, tag)
    (buffers,) = given
    views = [each for each in buffers if isinstance(each, memoryview)]
    assert sum(len(each) for each in views) >= len(body)
    assert sum(len(each) for each in buffers) - sum(len(each) for each in views) <= 10 + 12 + 4
    assert all(type(each.obj) is bytearray for each in views)
    one.close()
    two.close()


def test_a_port_that_takes_nothing_costs_its_own_frames_only(switch: str) -> None:
    one, two, deaf = plug(), plug(), plug()
    wait_for_ports(3)
    for each in (two, deaf):
        each.send(NO_OFFLOAD + ethernet(ALL, B if each is two else C))
    body = bytes(60_000)
    for number in range(QUEUE_LIMIT + 300):  # what its socket and its queue hold, and more
        one.send(NO_OFFLOAD + ethernet(ALL, A, number.to_bytes(4, "big") + body))
        while two.recv(1 << 17)[24:28] != number.to_bytes(4, "big"):
            pass
    ports = switch_client.info("lan")["ports"]
    assert [port["dropped"] > 0 for port in ports] == [False, False, True]
    for each in (one, two, deaf):
        each.close()


def test_a_rate_is_kept(switch: str) -> None:
    slow, other = plug(",rate=8"), plug()  # a megabyte a second, 65 KiB of burst
    wait_for_ports(2)
    started = time.monotonic()
    for _ in range(20):
        slow.send(NO_OFFLOAD + ethernet(ALL, A, bytes(10_000)))
        other.recv(20_000)
    assert time.monotonic() - started > 0.1
    slow.close()
    other.close()


class Silent:
    """A wire that holds frames of which no poll tells."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames

    def send(self, buffers: object) -> bool:
        return True

    def receive_into(self, buffers: list[memoryview]) -> int:
        if not self.frames:
            return 0
        data = self.frames.pop()
        buffers[0][:], buffers[1][: len(data) - 10] = data[:10], data[10:]
        return len(data)

    def watch(self, *, read: bool, write: bool) -> None:
        pass


def test_frames_that_no_poll_tells_of_wait_for_their_rate_only(tmp_path: Path) -> None:
    loop = Loop()
    process = SwitchProcess(tmp_path, SwitchConfig("lan", None), loop)
    wire = Silent([NO_OFFLOAD + ethernet(ALL, A, bytes(60_000))] * 4)
    read: list[Callable[[], None]] = []

    def cable(*callbacks: Callable[[], None]) -> Cable:
        read.append(callbacks[0])
        return Cable(wire, lambda: None)

    process._plug(PortSettings("uplink"), 40, cable)  # 5 MB a second, 250 kB at once
    process._ports[0].bucket = TokenBucket(5e6, 100_000)
    read[0]()
    assert wire.frames, "it is held"

    def stop_when_read() -> None:
        if wire.frames and time.monotonic() < deadline:
            loop.call_later(0.01, stop_when_read)
        else:
            loop.stop()

    deadline = time.monotonic() + 5
    stop_when_read()
    loop.run()
    assert not wire.frames
    process.close()
    loop.close()


def test_an_uplink_is_in_the_vlans_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    directory = switch_client.switch_directory("lan")
    directory.mkdir(parents=True)
    uplink, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.settimeout(5.0)
    uplink.setblocking(False)

    def plug_in(config: object, loop: Loop, directory: Path, **calls: Callable[[], None]) -> Cable:
        wire = DescriptorWire(uplink.detach(), loop, **calls)
        return Cable(wire, wire.close)

    monkeypatch.setattr(switch_process, "plug_in", plug_in)
    SwitchConfig("lan", parse_uplink("tap:tap0,vlan=10,trunk=20,rate=8")).save(directory)
    loop = Loop()
    process = SwitchProcess(directory, SwitchConfig.load(directory), loop)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        assert process._ports[0].bucket is not None
        ten, twenty, untagged = plug(",vlan=10"), plug(",vlan=20"), plug()
        wait_for_ports(4)
        far.send(NO_OFFLOAD + ethernet(ALL, A))
        assert ten.recv(200) == NO_OFFLOAD + ethernet(ALL, A)
        twenty.send(NO_OFFLOAD + ethernet(ALL, B))
        assert far.recv(200) == NO_OFFLOAD + ethernet(ALL, B, tag=20)
        untagged.send(NO_OFFLOAD + ethernet(ALL, C))
        ten.send(NO_OFFLOAD + ethernet(ALL, B, b"after"))
        assert far.recv(200) == NO_OFFLOAD + ethernet(ALL, B, b"after")
        for each in (twenty, untagged):
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(200)
        (told,) = (each for each in switch_client.info("lan")["ports"] if each["name"] == "uplink")
        assert (told["vlan"], told["trunk"]) == (10, [20])
        for each in (ten, twenty, untagged):
            each.close()
    finally:
        loop.stop()
        thread.join()
        process.close()
        loop.close()
        far.close()


def test_an_uplink_that_is_told_no_vlans_is_in_all() -> None:
    ports = [parse_uplink(text) for text in ("nat", "nat,vlan=3", "tap:a,trunk=4", "nat,isolated")]
    assert [uplink_port(each) for each in ports if each is not None] == [
        PortSettings("uplink", 0, ALL_VLANS),
        PortSettings("uplink", 3),
        PortSettings("uplink", 0, frozenset({4})),
        PortSettings("uplink", 0, ALL_VLANS, isolated=True),
    ]


def test_the_configuration_of_a_switch_survives_its_file(tmp_path: Path) -> None:
    text = "host-only,address=10.0.0.1/24,dhcp=off,vlan=5,trunk=10+20,isolated,rate=100"
    for config in (None, parse_uplink(text), parse_uplink("nat,forward=2222:22+udp:53")):
        SwitchConfig("lan", config).save(tmp_path)
        assert SwitchConfig.load(tmp_path) == SwitchConfig("lan", config)


def test_a_capture_is_of_a_port_that_there_is(switch: str) -> None:
    with pytest.raises(HvHostError, match=r"'lan' has no port 'vm/net0'; there are: none\."):
        switch_client.check_port("lan", "vm/net0")
    one = plug()
    wait_for_ports(1)
    switch_client.check_port("lan", "vm/net0")
    switch_client.check_port("lan", "")
    with pytest.raises(HvHostError, match=r"no port 'net0'; there are: vm/net0\."):
        switch_client.check_port("lan", "net0")
    one.close()


def test_a_capture_is_a_pcap_file(switch: str) -> None:
    one, two = plug(), plug()
    wait_for_ports(2)
    file = io.BytesIO()
    going = threading.Event()
    thread = threading.Thread(
        target=switch_client.capture, args=("lan", "", file, lambda: not going.is_set())
    )
    thread.start()
    deadline = time.monotonic() + 5
    number = 0
    while len(file.getvalue()) <= 24 and time.monotonic() < deadline:
        one.send(NO_OFFLOAD + ethernet(ALL, A, b"caught"))
        two.recv(200)
        number += 1
    going.set()
    thread.join()
    data = file.getvalue()
    assert struct.unpack_from("<IHH", data) == (0xA1B23C4D, 2, 4)
    assert struct.unpack_from("<I", data, 20) == (1,)
    _, _, captured, length = struct.unpack_from("<IIII", data, 24)
    assert captured == length == 60 and data[40:100] == ethernet(ALL, A, b"caught")
    one.close()
    two.close()


@pytest.mark.parametrize("first", [b"", b"{}", b"no json", b'{"purpose": "else"}', b"[1]"])
def test_who_does_not_say_what_it_wants_is_told_so(switch: str, first: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stream:
        stream.settimeout(5.0)
        stream.connect(str(switch_client.switch_directory("lan") / SOCKET_NAME))
        stream.send(first)
        assert b"error" in stream.recv(1000)
    assert switch_client.info("lan")["ports"] == []


def test_there_is_no_such_switch(switch: str) -> None:
    told = r"^there is no switch 'nowhere' \(there are: lan\); make one with `hvhost net create now"
    with pytest.raises(HvHostError, match=told):
        switch_client.info("nowhere")


def test_a_switch_that_was_killed_is_none(switch: str) -> None:
    path = switch_client.switch_directory("gone") / SOCKET_NAME
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
    with pytest.raises(HvHostError, match=r"no switch 'gone' \(there are: lan\)"):
        switch_client.info("gone")
    found, silent = switch_client.survey()
    assert [each["name"] for each in found] == ["lan"] and silent == []


def test_a_switch_that_does_not_answer(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = switch_client.switch_directory("deaf") / SOCKET_NAME
    path.parent.mkdir()
    monkeypatch.setattr(switch_client, "_ANSWER_SECONDS", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(HvHostError, match=r"'deaf' has not answered for 0\.05 seconds; .*/pid"):
            switch_client.info("deaf")
        monkeypatch.setattr(
            switch_client, "_ANSWER_SECONDS", 1.0
        )  # of the other, on a busy computer
        found, (sentence,) = switch_client.survey()
        assert [each["name"] for each in found] == ["lan"] and "'deaf' has not answered" in sentence
    with pytest.raises(HvHostError, match="cannot be spoken to: AF_UNIX path too long"):
        switch_client.info("x" * 200)


def test_a_switch_of_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    switch_client.start(SwitchConfig("own", None))
    assert switch_client.switch_names() == ["own"]
    with pytest.raises(HvHostError, match="there is a switch 'own' already"):
        switch_client.start(SwitchConfig("own", None))
    switch_client.stop("own")
    assert switch_client.switch_names() == []
