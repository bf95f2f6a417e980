"""A hostile guest on a switch: its channel faults or its frames are lost, and that is all.

The neighbours are another adapter on the same switch and, for what frames can do, a kernel.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.machine.loop import Loop
from hvhost.network import switch_client
from hvhost.network.config import parse_adapter
from hvhost.network.namespace import open_namespace
from hvhost.network.switch_client import Hello, SwitchConfig
from hvhost.network.wires import DescriptorWire
from hvhost.verify.wire import Witness
from hvhost.vmbus.channel import ChannelState
from simulated.frames import ethernet, tcp
from simulated.netvsc import NetvscDriver, nvsp, rndis_packet


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HVHOST_RUNTIME_DIR", str(tmp_path))
    switch_client.start(SwitchConfig("lan", None))
    yield "lan"
    switch_client.stop("lan")


def join(name: str) -> int:
    return switch_client.join(parse_adapter("switch:lan", name=name), "vm")


class Plugged:
    """A guest's adapter on the switch."""

    def __init__(self) -> None:
        self.driver = NetvscDriver()
        descriptor = join("net0")
        os.set_blocking(descriptor, True)  # so that tests wait for what is on its way
        self.driver.adapter.wire = DescriptorWire(
            descriptor, Loop(), readable=lambda: None, writable=lambda: None
        )
        self.driver.start(merging=False)


def neighbours_talk(first: socket.socket, second: socket.socket) -> bool:
    mark = os.urandom(8)
    one = bytes(10) + ethernet(0x1234, mark + bytes(40), to=b"\xff" * 6, sender=b"\2" + bytes(5))
    first.send(one)
    while True:
        got = second.recv(1 << 17)
        if got == one:
            return True
        assert mark not in got


def _ppi_loop(driver: NetvscDriver) -> None:
    message = bytearray(rndis_packet(ethernet(0x1234, bytes(60)), (6, 0x10)))
    struct.pack_into("<I", message, 44, 0)
    driver.send(bytes(message))


def _ppi_chain(driver: NetvscDriver) -> None:
    message = bytearray(rndis_packet(ethernet(0x1234, bytes(60)), *[(0, 0)] * 100))
    driver.send(bytes(message))


def _malformed(driver: NetvscDriver) -> None:
    driver.send(struct.pack("<11I", 1, 4000, 36, 0xFFFFFF00, 0, 0, 0, 0, 0, 0, 0))


def _section(driver: NetvscDriver) -> None:
    driver.tell(nvsp(107, 0, 0xFFFFFFFE, 100))


def _completion(driver: NetvscDriver) -> None:
    driver.channel.write(struct.pack("<II", 108, 1), packet_type=11, transaction_id=1 << 40)


def _double(driver: NetvscDriver) -> None:
    lent = driver.adapter._receive_buffer
    assert lent is not None
    number = lent.lend([lent.free.pop()])
    for _ in range(2):
        driver.channel.write(struct.pack("<II", 108, 1), packet_type=11, transaction_id=number)


def _flood(driver: NetvscDriver) -> None:
    for number in range(200):
        driver.send_control(struct.pack("<7I", 4, 28, number, 0x10114, 0, 20, 0))
        list(driver.channel.read())


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        (_ppi_loop, "of 0 bytes"),
        (_ppi_chain, "per-packet information"),
        (_malformed, "came in"),
        (_section, "section 4294967294"),
        (_completion, "not under way"),
        (_double, "not under way"),
        (_flood, "takes no answers"),
    ],
)
def test_an_attack_faults_one_channel_and_neighbours_go_on(
    switch: str, attack: Callable[[NetvscDriver], None], sentence: str
) -> None:
    guest = Plugged()
    neighbours = [socket.socket(fileno=join(f"other{number}")) for number in (1, 2)]
    for each in neighbours:
        each.settimeout(5.0)
    assert neighbours_talk(*neighbours)
    attack(guest.driver)
    (fault,) = guest.driver.guest.faults
    assert sentence in fault
    assert guest.driver.guest.server.channels[0].state is ChannelState.FAULTED
    assert neighbours_talk(*neighbours)
    assert len(switch_client.info("lan")["ports"]) == 3
    # The guest may close it and begin anew: nothing of what it did is left.
    guest.driver.guest.close(1)
    guest.driver.start(merging=False)
    guest.driver.send(rndis_packet(ethernet(0x1234, b"anew".ljust(60), to=b"\xff" * 6)))
    while b"anew" not in neighbours[0].recv(1 << 17):
        pass
    for each in neighbours:
        each.close()
    guest.driver.adapter.wire.close()  # type: ignore[attr-defined] # of a descriptor


FRAMES = st.one_of(
    st.binary(min_size=14, max_size=200),
    st.builds(
        lambda size, cut: tcp(bytes(size), to=b"\xff" * 6)[: 14 + cut],
        st.integers(0, 60_000),
        st.integers(0, 70_000),
    ),
)
#: struct virtio_net_hdr as no kernel would write it.
HEADERS = st.builds(
    lambda a, b, words: struct.pack("<BB4H", a, b, *words),
    st.sampled_from([0, 1, 2, 3, 255]),
    st.sampled_from([0, 1, 3, 4, 5, 0x81, 255]),
    st.tuples(*[st.sampled_from([0, 1, 14, 34, 54, 100, 1448, 0xFFFF])] * 4),
)


def test_frames_made_to_hurt_a_kernel_do_not_hurt_the_switch(switch: str) -> None:
    """What a wire carries is not trusted either: a guest could have made the switch's process."""
    try:
        namespace = open_namespace([("tap0", "10.79.0.1/24")])
        other = open_namespace([("tap0", "10.79.0.2/24")])
    except HvHostError as error:
        pytest.skip(str(error))
    for number, each in enumerate((namespace, other)):
        switch_client.attach("lan", Hello("tap", f"port{number}"), each.descriptors[0])
    hostile = socket.socket(fileno=join("evil"))
    hostile.settimeout(5.0)

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
    @given(HEADERS, FRAMES)
    def attack(header: bytes, frame: bytes) -> None:
        hostile.send(header + frame)

    attack()
    for short in (b"x", bytes(10), bytes(11), bytes(23)):
        hostile.send(short)
    witness = Witness(namespace.pid)
    assert witness.do("ping", to="10.79.0.2", count=3)["answers"] == 3
    assert len(switch_client.info("lan")["ports"]) == 3
    hostile.close()
    for each in (namespace, other):
        each.close()
