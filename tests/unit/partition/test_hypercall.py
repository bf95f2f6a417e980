from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hvhost.errors import GuestMemoryError
from hvhost.partition.hypercall import FAST, HypercallCode, Hypercalls, HypercallStatus
from hvhost.partition.memory import GuestMemory, MemoryRegion

SIZE = 0x2000
POST, SIGNAL = HypercallCode.POST_MESSAGE, HypercallCode.SIGNAL_EVENT
OK = 0x0


class Guest:
    def __init__(self) -> None:
        self.backing = bytearray(SIZE)
        self.memory = GuestMemory([MemoryRegion(0, memoryview(self.backing))])
        self.posted: list[tuple[int, bytes]] = []
        self.signalled: list[int] = []
        self.status = 0x0
        self.calls = Hypercalls(self.memory, self._post, self._signal)

    def _post(self, connection: int, payload: bytes) -> int:
        self.posted.append((connection, payload))
        return self.status

    def _signal(self, connection: int) -> int:
        self.signalled.append(connection)
        return self.status

    def put(self, address: int, connection: int, kind: int, size: int, payload: bytes) -> None:
        data = struct.pack("<IIII", connection, 0, kind, size) + payload
        self.backing[address : address + len(data)] = data


def test_a_message_is_posted() -> None:
    guest = Guest()
    guest.put(0x100, 0xAB000004, 1, 5, b"helloworld")
    assert guest.calls.call(POST, 0x100) == OK
    assert guest.posted == [(4, b"hello")], "reserved bits of the id are not looked at"


def test_the_buss_answer_is_the_guests() -> None:
    guest = Guest()
    guest.status = HypercallStatus.INVALID_CONNECTION_ID
    guest.put(0, 9, 1, 0, b"")
    assert guest.calls.call(POST, 0) == 0x12
    assert guest.calls.call(SIGNAL | FAST, 9) == 0x12


@pytest.mark.parametrize("size", [0, 240])
def test_the_longest_message_and_the_shortest(size: int) -> None:
    guest = Guest()
    address = SIZE - 256
    guest.put(address, 4, 1, size, b"z" * 240)
    assert guest.calls.call(POST, address) == OK
    assert guest.posted == [(4, b"z" * size)]


@pytest.mark.parametrize("size", [241, 0xFFFFFFFF])
def test_a_message_too_long(size: int) -> None:
    guest = Guest()
    guest.put(0, 4, 1, size, b"")
    assert guest.calls.call(POST, 0) == HypercallStatus.INVALID_PARAMETER
    assert not guest.posted


@pytest.mark.parametrize("kind", [0, 2, 0x80000001])
def test_a_message_type_of_the_hypervisor(kind: int) -> None:
    guest = Guest()
    guest.put(0, 4, kind, 4, b"data")
    assert guest.calls.call(POST, 0) == HypercallStatus.INVALID_PARAMETER
    assert not guest.posted


def test_a_fast_message_has_no_payload_to_read() -> None:
    guest = Guest()
    guest.put(0, 4, 1, 4, b"data")
    assert guest.calls.call(POST | FAST, 0) == HypercallStatus.INVALID_HYPERCALL_INPUT
    assert not guest.posted


@pytest.mark.parametrize("code", [POST, SIGNAL])
@pytest.mark.parametrize("offset", [1, 2, 4, 7])
def test_unaligned_input(code: int, offset: int) -> None:
    guest = Guest()
    guest.put(offset, 4, 1, 4, b"data")
    assert guest.calls.call(code, offset) == HypercallStatus.INVALID_ALIGNMENT
    assert not guest.posted
    assert not guest.signalled


def test_signals_in_both_forms() -> None:
    guest = Guest()
    struct.pack_into("<IHH", guest.backing, 0x80, 0x0100_1234, 7, 0)
    assert guest.calls.call(SIGNAL, 0x80) == OK
    assert guest.calls.call(SIGNAL | FAST, 0x0007_0000_FF00_1234) == OK
    assert guest.signalled == [0x1234, 0x1234]


@pytest.mark.parametrize("address", [SIZE - 248, SIZE, 1 << 32, (1 << 64) - 8])
def test_input_that_is_not_all_in_memory(address: int) -> None:
    guest = Guest()
    assert guest.calls.call(POST, address) == HypercallStatus.INVALID_PARAMETER
    if address >= SIZE:
        assert guest.calls.call(SIGNAL, address) == HypercallStatus.INVALID_PARAMETER
    assert not guest.posted
    assert not guest.signalled


def test_unknown_calls() -> None:
    guest = Guest()
    for code in (0, 1, 0x5B, 0x5E, 0x8001, 0xFFFF):
        assert guest.calls.call(code, 0) == HypercallStatus.INVALID_HYPERCALL_CODE


@given(
    st.one_of(st.sampled_from([POST, SIGNAL, POST | FAST, SIGNAL | FAST]), st.integers(0, 2**64)),
    st.one_of(st.integers(0, SIZE + 16), st.integers(0, 2**64 - 1)),
    st.binary(max_size=64),
    st.integers(0, SIZE - 64),
)
@example(POST, SIZE - 255, b"", 0)
def test_any_input(value: int, parameter: int, data: bytes, place: int) -> None:
    """Whatever a guest asks, it gets a status, and nothing it did not have comes through."""
    guest = Guest()
    guest.backing[place : place + len(data)] = data
    before = bytes(guest.backing)
    status = guest.calls.call(value, parameter)
    assert 0 <= status <= 0xFFFF
    assert guest.backing == before, "input is only read"
    for connection, payload in guest.posted:
        assert 0 <= connection < 1 << 24
        assert len(payload) <= 240
        assert payload in before
    assert all(0 <= connection < 1 << 24 for connection in guest.signalled)
    assert len(guest.posted) + len(guest.signalled) <= 1
    assert (status == OK) == bool(guest.posted or guest.signalled)


def test_input_is_read_once() -> None:
    """A guest that changes the length between two looks finds that there is only one."""
    guest = Guest()
    guest.put(0, 4, 1, 4, b"data")
    reads: list[tuple[int, int]] = []
    read = guest.memory.read

    class Memory:
        def read(self, address: int, length: int) -> bytes:
            reads.append((address, length))
            return read(address, length)

        def load32(self, address: int) -> int:
            raise AssertionError("a second look")

        view = load32

    guest.calls._memory = Memory()  # type: ignore[assignment]
    assert guest.calls.call(POST, 0) == OK
    assert reads == [(0, 256)]


def test_memory_errors_of_the_bus_are_a_bad_parameter() -> None:
    def fails(connection: int, payload: bytes) -> int:
        raise GuestMemoryError("elsewhere")

    guest = Guest()
    guest.put(0, 4, 1, 0, b"")
    calls = Hypercalls(guest.memory, fails, lambda connection: 0)
    assert calls.call(POST, 0) == HypercallStatus.INVALID_PARAMETER
