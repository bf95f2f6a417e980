"""The wires themselves: passt's framing, descriptors that hang up, a namespace's tap."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import frame
from hvhost.network.namespace import _leaving, inside, open_namespace
from hvhost.network.passt import PasstWire
from hvhost.network.wires import DescriptorWire, check_tap, open_tap
from simulated.frames import ethernet, sums_are_right, tcp


class Passt:
    """The far end of a passt wire."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        near.setblocking(False)
        self.far.settimeout(5.0)
        self.gone = 0

        def gone() -> None:
            self.gone += 1

        self.wire = PasstWire(near, Loop(), readable=lambda: None, writable=lambda: None, gone=gone)
        self.buffers = [memoryview(bytearray(10)), memoryview(bytearray(70_000))]

    def frames(self) -> list[bytes]:
        data, found = self.far.recv(1 << 20), []
        while data:
            size = struct.unpack_from("!I", data)[0]
            found.append(data[4 : 4 + size])
            data = data[4 + size :]
        return found

    def receive(self) -> bytes:
        size = self.wire.receive_into(self.buffers)
        return bytes(self.buffers[1][: max(0, size - 10)])


def test_passt_gets_whole_frames_only() -> None:
    passt = Passt()
    where = frame.parse(whole := tcp(os.urandom(5000)))
    assert where is not None
    unmade = bytearray(whole)
    frame.set_pseudo_checksum(unmade, where, len(unmade))
    offload = frame.Offload(1, frame.GSO_TCPV4, 54, 1448, 34, 16)
    assert passt.wire.send([offload.pack(), unmade])
    frames = passt.frames()
    assert len(frames) == 4 and all(sums_are_right(each) for each in frames)
    assert b"".join(each[54:] for each in frames) == whole[54:]


def test_frames_of_passt_may_come_in_pieces() -> None:
    passt = Passt()
    first, second = ethernet(0x1234, b"a" * 60), ethernet(0x1234, b"b" * 1000)
    stream = b"".join(struct.pack("!I", len(each)) + each for each in (first, second))
    passt.far.sendall(stream[:70])
    assert passt.receive() == b""
    passt.far.sendall(stream[70:])
    assert [passt.receive(), passt.receive(), passt.receive()] == [first, second, b""]


def test_a_length_that_cannot_be_ends_the_wire() -> None:
    passt = Passt()
    passt.far.sendall(struct.pack("!I", 1 << 30) + bytes(100))
    assert passt.receive() == b"" and passt.gone == 1


def test_a_peer_that_hangs_up_is_noticed_once() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    gone: list[int] = []
    wire = DescriptorWire(
        near.detach(),
        Loop(),
        readable=lambda: None,
        writable=lambda: None,
        gone=lambda: gone.append(1),
    )
    far.close()
    assert wire.receive_into([memoryview(bytearray(10))]) == 0
    assert wire.send([b"lost"]) and gone == [1]


class Watched(Loop):
    """A loop that counts what it is asked to watch."""

    watches = 0

    def watch(self, *arguments: Any, **how: Any) -> None:
        self.watches += 1
        super().watch(*arguments, **how)


def test_a_wire_that_is_closed_does_nothing_more() -> None:
    near, far = socket.socketpair()
    loop, told = Watched(), list[str]()
    wire = DescriptorWire(
        near.detach(),
        loop,
        readable=lambda: told.append("readable"),
        writable=lambda: told.append("writable"),
        gone=lambda: told.append("gone"),
    )
    wire._ready()
    assert not told, "nobody wants to know yet"
    wire.watch(read=True, write=True)
    wire.watch(read=True, write=True)
    assert loop.watches == 1
    wire._ready()
    assert told == ["writable", "readable"]
    far.send(b"late")
    descriptor = wire._descriptor
    wire.close()
    other = os.open(os.devnull, os.O_RDONLY)  # gets the descriptor's number
    assert other == descriptor
    wire.close()
    wire._ready()
    wire.watch(read=True, write=False)
    buffer = memoryview(bytearray(10))
    assert wire.receive_into([buffer]) == 0 and wire.send([b"lost"])
    assert len(told) == 2 and loop.watches == 1 and wire.dropped == 0
    os.close(other)
    far.close()


def test_a_tap_device_that_is_not_there_is_not_made() -> None:
    with pytest.raises(HvHostError, match=r"no tap device 'hvhost-no-tap'; .*`ip tuntap add"):
        open_tap("hvhost-no-tap")
    assert not Path("/sys/class/net/hvhost-no-tap").exists()
    check_tap("lo")  # whether it is a tap device is for the kernel to say


@pytest.fixture(params=["as here", "root without user namespaces"])
def leaving(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """How namespaces are made: also as in a chroot, where nobody may make one of users."""
    if request.param != "as here":
        if os.geteuid():
            pytest.skip("only root makes a network namespace alone")
        program = tmp_path / "unshare"
        program.write_text(
            f'#!/bin/sh\n[ "$1" = --user ] && exit 1\nexec {shutil.which("unshare")} "$@"\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _leaving.cache_clear()
    yield
    _leaving.cache_clear()


@pytest.mark.usefixtures("leaving")
def test_a_namespace_gives_a_tap_that_its_kernel_answers_on() -> None:
    try:
        namespace = open_namespace([("tap0", "10.1.2.1/24")])
    except HvHostError as error:
        pytest.skip(str(error))
    (tap,) = namespace.descriptors
    os.set_blocking(tap, True)
    mac, peer = bytes.fromhex("00155d000001"), bytes((10, 1, 2, 9))
    request = (
        struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + peer + bytes(6) + bytes((10, 1, 2, 1))
    )
    os.write(tap, frame.NO_OFFLOAD + ethernet(0x0806, request, to=b"\xff" * 6, sender=mac))
    for _ in range(50):  # the kernel has things of its own to say
        data = os.read(tap, 70_000)[10:]
        if data[12:14] == b"\x08\x06" and data[:6] == mac:
            break
    assert data[28:32] == bytes((10, 1, 2, 1))
    words = inside(namespace.pid, ["ip", "-brief", "address", "show", "tap0"])
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "10.1.2.1/24" in shown
    os.close(tap)
    namespace.close()
    assert namespace.process.returncode == 0
