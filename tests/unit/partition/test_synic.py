from __future__ import annotations

import logging
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import LocalProtocolError
from hvhost.partition.memory import GuestMemory, MemoryRegion
from hvhost.partition.synic import (
    HV_EVENT_FLAGS_BYTE_COUNT,
    HV_MESSAGE_FLAG_PENDING,
    HV_MESSAGE_PAYLOAD_BYTE_COUNT,
    HV_MESSAGE_SIZE,
    MAXIMUM_WARNINGS,
    Synic,
)

SIZE = 0x4000
FLAGS, MESSAGES = 0x1000, 0x2000
SLOT = MESSAGES + 2 * HV_MESSAGE_SIZE


class CountingLine:
    def __init__(self) -> None:
        self.raised = 0

    def trigger(self) -> None:
        self.raised += 1


class Guest:
    """A VP's pages and lines, seen from the guest."""

    def __init__(self, flags: int = FLAGS | 1, messages: int = MESSAGES | 1) -> None:
        self.backing = bytearray(SIZE)
        self.memory = GuestMemory([MemoryRegion(0, memoryview(self.backing))])
        self.message_line, self.event_line = CountingLine(), CountingLine()
        self.synic = Synic(self.memory, 3, self.message_line, self.event_line)
        self.synic.registers_changed(1, flags, messages)

    def message(self) -> tuple[int, int, bytes] | None:
        """Type, flags and payload in the slot; None if it is free."""
        kind, size, flags, sender = struct.unpack_from("<IBB2xQ", self.backing, SLOT)
        assert sender == 0
        return (kind, flags, bytes(self.backing[SLOT + 16 : SLOT + 16 + size])) if kind else None

    def end_of_message(self) -> None:
        struct.pack_into("<I", self.backing, SLOT, 0)
        self.synic.deliver()


def test_a_message_lies_in_the_slot_of_its_source() -> None:
    guest = Guest()
    guest.synic.post(1, b"hello")
    assert guest.message() == (1, 0, b"hello")
    assert guest.message_line.raised == 1
    assert guest.event_line.raised == 0
    used = guest.backing[SLOT : SLOT + HV_MESSAGE_SIZE]
    assert sum(map(bool, guest.backing)) == sum(map(bool, used))


def test_a_busy_slot_is_asked_to_tell_when_it_is_free() -> None:
    guest = Guest()
    for payload in (b"one", b"two", b"three"):
        guest.synic.post(1, payload)
    assert guest.message() == (1, HV_MESSAGE_FLAG_PENDING, b"one")
    assert guest.message_line.raised == 1
    guest.end_of_message()
    assert guest.message() == (1, HV_MESSAGE_FLAG_PENDING, b"two"), "more is waiting"
    guest.end_of_message()
    assert guest.message() == (1, 0, b"three")
    guest.end_of_message()
    assert guest.message() is None
    assert guest.message_line.raised == 3


def test_a_slot_that_becomes_free_while_it_is_looked_at() -> None:
    class Racing(GuestMemory):
        """The guest takes its message just after the host saw it there."""

        def load32(self, address: int) -> int:
            value = super().load32(address)
            super().store32(address, 0)
            return value

    guest = Guest()
    guest.synic.post(1, b"one")
    racing = Racing(guest.memory.regions)
    synic = Synic(racing, 3, guest.message_line, guest.event_line)
    synic.registers_changed(1, FLAGS | 1, MESSAGES | 1)
    synic.post(1, b"two")
    assert guest.message() == (1, 0, b"two"), "nobody tells of a slot that is free already"
    assert guest.message_line.raised == 2


def test_messages_wait_for_the_page() -> None:
    guest = Guest(messages=MESSAGES)
    guest.synic.post(1, b"early")
    assert guest.message() is None
    guest.synic.registers_changed(1, FLAGS | 1, MESSAGES | 1)
    assert guest.message() == (1, 0, b"early")


def test_a_guest_that_takes_nothing_does_not_fill_the_host(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest = Guest(messages=MESSAGES)
    with caplog.at_level(logging.WARNING):
        for _ in range(10_000):
            guest.synic.post(1, b"x")
    assert len(guest.synic.state.queue) == 4096
    assert len(caplog.records) == MAXIMUM_WARNINGS
    assert caplog.messages[0] == "VP 3: takes no messages: message of type 1 dropped"


def test_a_payload_never_reaches_the_next_slot() -> None:
    guest = Guest()
    guest.synic.post(1, b"y" * HV_MESSAGE_PAYLOAD_BYTE_COUNT)
    assert not any(guest.backing[SLOT + HV_MESSAGE_SIZE :])
    with pytest.raises(LocalProtocolError, match="241 bytes"):
        guest.synic.post(1, b"y" * (HV_MESSAGE_PAYLOAD_BYTE_COUNT + 1))


def test_an_event_flag() -> None:
    guest = Guest()
    guest.synic.signal(2, 0)
    guest.synic.signal(2, 2047)
    guest.synic.signal(15, 9)
    base = FLAGS + 2 * HV_EVENT_FLAGS_BYTE_COUNT
    assert guest.backing[base] == 1
    assert guest.backing[base + 255] == 0x80
    assert guest.backing[FLAGS + 15 * HV_EVENT_FLAGS_BYTE_COUNT + 1] == 2
    assert guest.event_line.raised == 3
    assert guest.message_line.raised == 0


def test_flags_are_added() -> None:
    guest = Guest()
    for flag in (1, 3, 3):
        guest.synic.signal(2, flag)
    assert guest.backing[FLAGS + 2 * HV_EVENT_FLAGS_BYTE_COUNT] == 0b1010


@pytest.mark.parametrize(("sint", "flag"), [(16, 0), (-1, 0), (2, 2048), (2, -1)])
def test_flags_that_do_not_exist(sint: int, flag: int) -> None:
    guest = Guest()
    with pytest.raises(LocalProtocolError):
        guest.synic.signal(sint, flag)
    assert not any(guest.backing)


def test_a_disabled_flags_page_takes_nothing() -> None:
    guest = Guest(flags=FLAGS)
    guest.synic.signal(2, 1)
    assert not any(guest.backing)
    assert guest.event_line.raised == 0


PAGES = st.one_of(
    st.integers(0, SIZE + 0x2000),
    st.builds(
        lambda base, low: base | low,
        st.sampled_from([0, SIZE - 0x1000, SIZE, 1 << 32, 0xFFFFFFFFFFFFF000]),
        st.integers(0, 0xFFF),
    ),
)
ACTIONS = st.one_of(
    st.tuples(st.just("post"), st.binary(max_size=HV_MESSAGE_PAYLOAD_BYTE_COUNT)),
    st.tuples(st.just("signal"), st.integers(0, 2047)),
    st.tuples(st.just("taken"), st.just(0)),
    st.tuples(st.just("pages"), st.tuples(PAGES, PAGES)),
    st.tuples(st.just("scribble"), st.tuples(st.integers(0, SIZE - 4), st.integers(0, 255))),
)


@given(PAGES, PAGES, st.lists(ACTIONS, max_size=12))
def test_pages_anywhere(flags: int, messages: int, actions: list[tuple[str, object]]) -> None:
    """Nothing a guest does with its pages raises, or touches what is not such a page."""
    guest = Guest(flags, messages)
    for action, value in actions:
        if action == "post":
            assert isinstance(value, bytes)
            guest.synic.post(1, value)
        elif action == "signal":
            assert isinstance(value, int)
            guest.synic.signal(2, value)
        elif action == "taken":
            guest.synic.deliver()
        else:
            assert isinstance(value, tuple)
            if action == "pages":
                guest.synic.registers_changed(1, *value)
            else:
                guest.backing[value[0]] = value[1]


@pytest.mark.parametrize("page", [SIZE, 1 << 40, 0xFFFFFFFFFFFFF000])
def test_a_message_page_outside_memory_is_one_log_line(
    page: int, caplog: pytest.LogCaptureFixture
) -> None:
    guest = Guest(messages=page | 1)
    guest.synic.post(1, b"lost")
    guest.synic.signal(2, 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"VP 3: message page: guest memory {page + 0x200:#x}+0x4 is not RAM; "
        "the guest named a wrong address."
    ]
    assert guest.message_line.raised == 0
    assert not guest.synic.state.queue, "a page that is no memory never gets any better"


def test_a_flags_page_outside_memory_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(flags=SIZE | 1)
    guest.synic.signal(2, 1)
    assert [record.getMessage()[:24] for record in caplog.records] == ["VP 3: event flags page: "]
    assert guest.event_line.raised == 0


def test_reset() -> None:
    guest = Guest(messages=MESSAGES)
    guest.synic.post(1, b"old")
    guest.synic.reset()
    guest.synic.registers_changed(1, FLAGS | 1, MESSAGES | 1)
    assert guest.message() is None
