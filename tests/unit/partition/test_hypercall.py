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
        self.discarded: list[tuple[int, int]] = []
        self.calls = Hypercalls(self.memory, self._post, self._signal, self._discard)

    def _post(self, connection: int, payload: bytes) -> int:
        self.posted.append((connection, payload))
        return self.status

    def _signal(self, connection: int) -> int:
        self.signalled.append(connection)
        return self.status

    def _discard(self, address: int, size: int) -> None:
        self.memory.view(address, size)
        self.discarded.append((address, size))

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
    for code in (0, 1, 0x5B, 0x5E, 0x8000, 0x8002, 0xFFFF):
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
    answer = 8 if value & 0xFFFF == HypercallCode.EXT_CALL_QUERY_CAPABILITIES else 0
    assert guest.backing[answer:] == before[answer:], "input is only read"
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
    calls = Hypercalls(guest.memory, fails, lambda connection: 0, guest._discard)
    assert calls.call(POST, 0) == HypercallStatus.INVALID_PARAMETER


HINT = 0x8003
LARGE = 1 << 11


def a_hint(guest: Guest, *words: int, kind: int = 2, count: int | None = None) -> int:
    struct.pack_into(f"<{1 + len(words)}Q", guest.backing, 0x100, kind, *words)
    return guest.calls.call(HINT | (len(words) if count is None else count) << 32, 0x100)


def test_extended_capabilities_are_told() -> None:
    guest = Guest()
    assert guest.calls.call(0x8001, 0, 0x200) == OK
    assert guest.memory.load64(0x200) == 1 << 8
    assert guest.calls.call(0x8001 | FAST, 0, 0x200) == HypercallStatus.INVALID_HYPERCALL_INPUT
    assert guest.calls.call(0x8001, 0, SIZE) == HypercallStatus.INVALID_PARAMETER
    assert guest.calls.call(0x8001, 0, 0x201) == HypercallStatus.INVALID_PARAMETER


def test_free_memory_is_given_back() -> None:
    """Small pages and large ones; all of a call are done, and the guest is told how many."""
    guest = Guest()
    assert a_hint(guest, 0x0 | 1, 0x1000) == OK | 2 << 32
    assert guest.discarded == [(0, 0x2000), (0x1000, 0x1000)]
    big = bytearray(8 << 20)
    guest = Guest()
    memory = GuestMemory([MemoryRegion(0, memoryview(big))])
    guest.calls = Hypercalls(memory, guest._post, guest._signal, guest._discard)
    guest.memory = memory
    struct.pack_into("<QQ", big, 0x100, 2, 2 << 21 | LARGE | 1)
    assert guest.calls.call(HINT | 1 << 32, 0x100) == OK | 1 << 32
    assert guest.discarded == [(4 << 20, 4 << 20)]
    guest.discarded.clear()
    struct.pack_into("<QQ", big, 0x100, 2, 2 << 21 | LARGE | 1 << 12)  # of 1 GiB, says the guest
    assert guest.calls.call(HINT | 1 << 32, 0x100) == HypercallStatus.INVALID_PARAMETER
    assert not guest.discarded


def test_a_hint_of_what_is_no_memory_ends_there() -> None:
    guest = Guest()
    assert a_hint(guest, 0x1000, SIZE, 0x2000) == HypercallStatus.INVALID_PARAMETER | 1 << 32
    assert guest.discarded == [(0x1000, 0x1000)]


@pytest.mark.parametrize(
    ("words", "kind", "count", "status"),
    [
        ((0,), 1, None, HypercallStatus.INVALID_PARAMETER),
        ((LARGE | 1 << 12,), 2, None, HypercallStatus.INVALID_PARAMETER),
        ((), 2, 0, HypercallStatus.INVALID_HYPERCALL_INPUT),
        ((0,), 2, 512, HypercallStatus.INVALID_HYPERCALL_INPUT),
    ],
)
def test_wrong_hints(words: tuple[int, ...], kind: int, count: int | None, status: int) -> None:
    guest = Guest()
    assert a_hint(guest, *words, kind=kind, count=count) == status
    assert not guest.discarded


def test_hints_that_are_no_memory_themselves() -> None:
    guest = Guest()
    assert guest.calls.call(HINT | 1 << 32, 0x101) == HypercallStatus.INVALID_ALIGNMENT
    assert guest.calls.call(HINT | 1 << 32, SIZE) == HypercallStatus.INVALID_PARAMETER
    assert guest.calls.call(HINT | FAST | 1 << 32, 8) == HypercallStatus.INVALID_HYPERCALL_INPUT
