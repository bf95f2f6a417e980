from __future__ import annotations

import struct

import pytest
from fake_transport import FakeTransport
from hypothesis import given
from hypothesis import strategies as st

from hvhost.kvm.vm import Vm
from hvhost.machine.coalesced import CoalescedPorts

PORTS = [0x3F8, 0x2F8]


def ports(capabilities: dict[int, int] | None = None) -> tuple[FakeTransport, CoalescedPorts]:
    transport = FakeTransport(1 << 20, capabilities=capabilities)
    zones = [range(port, port + 1) for port in PORTS]
    return transport, CoalescedPorts(Vm(transport), zones)


def drained(coalesced: CoalescedPorts) -> list[tuple[int, int, int]]:
    writes: list[tuple[int, int, int]] = []
    coalesced.drain(lambda *write: writes.append(write))
    return writes


def test_writes_come_out_in_order_and_once() -> None:
    transport, coalesced = ports()
    assert transport.coalesced_ports == PORTS
    for character in b"hello":
        transport.coalesce(0x3F8, bytes([character]))
    transport.coalesce(0x2F8, b"\x01\x02\x03\x04")
    expected = [(0x3F8, 1, character) for character in b"hello"]
    assert drained(coalesced) == [*expected, (0x2F8, 4, 0x04030201)]
    assert drained(coalesced) == []


@given(st.lists(st.integers(0, 160), max_size=8))
def test_the_ring_goes_round(bursts: list[int]) -> None:
    transport, coalesced = ports()
    for burst in bursts:
        for number in range(burst):
            transport.coalesce(0x3F8, bytes([number]))
        assert drained(coalesced) == [(0x3F8, 1, number) for number in range(burst)]


@pytest.mark.parametrize(("first", "last"), [(0xFFFFFFFF, 3), (500, 1 << 31)])
def test_indices_outside_the_ring(first: int, last: int) -> None:
    transport, coalesced = ports()
    struct.pack_into("<II", transport.ring, 0, first, last)
    assert len(drained(coalesced)) < 170


def test_a_write_that_fails_is_not_tried_for_ever() -> None:
    transport, coalesced = ports()
    for character in b"abc":
        transport.coalesce(0x3F8, bytes([character]))
    seen: list[int] = []

    def write(port: int, size: int, value: int) -> None:
        seen.append(value)
        if value == ord("b"):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        coalesced.drain(write)
    coalesced.drain(write)
    assert bytes(seen) == b"abc"


def test_refresh_asks_where_the_ring_is_elsewhere() -> None:
    transport, coalesced = ports()
    transport.waiting.append((0x3F8, b"x"))
    assert drained(coalesced) == []
    coalesced.refresh()
    assert drained(coalesced) == [(0x3F8, 1, ord("x"))]


def test_a_kvm_that_cannot() -> None:
    transport, coalesced = ports(capabilities={})
    assert not transport.coalesced_ports
    coalesced.refresh()
    assert drained(coalesced) == []
