"""Sizes that messages of the guest give themselves; and a device whose guest has said nothing."""

from __future__ import annotations

import struct

import pytest

from hvhost.errors import RemoteProtocolError
from hvhost.memory.area import HotAddArea
from hvhost.memory.device import MemoryDevice
from hvhost.memory.protocol import (
    RANGE_PAGES_MAX,
    PageRange,
    PageSet,
    UnballoonResponse,
    decode,
)


def message(kind: int, size: int, body: bytes = b"") -> bytes:
    """``struct dm_header`` and what follows."""
    return struct.pack("<HHI", kind, size, 1) + body


@pytest.mark.parametrize("size", [0, 7, 9, 0xFFFF])
def test_a_size_that_is_not_the_messages(size: int) -> None:
    assert decode(message(9, 8)) == UnballoonResponse()
    with pytest.raises(RemoteProtocolError, match=f"of 8 bytes says that it has {size}"):
        decode(message(9, size))


def test_what_stands_behind_a_message_is_not_read() -> None:
    """A balloon response whose range lies outside of its own size."""
    body = struct.pack("<IIQ", 0, 1 << 1, 1 << 40)
    decode(message(7, 24, body))
    with pytest.raises(RemoteProtocolError, match="announces 1 page ranges and has 8 bytes"):
        decode(message(7, 16, body))


@pytest.mark.parametrize("kind", [0, 2, 4, 6, 8, 10, 12, 13, 99])
def test_types_that_are_none_of_a_guest(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"message of type {kind}"):
        decode(message(kind, 48, bytes(40)))


def test_a_balloon_response_without_its_head_or_with_nothing_in_a_range() -> None:
    with pytest.raises(RemoteProtocolError, match="of 7 bytes is cut short"):
        decode(message(7, 15, bytes(7)))
    with pytest.raises(RemoteProtocolError, match="a range of no pages"):
        decode(message(7, 32, struct.pack("<IIQQ", 0, 2 << 1, 5 | 1 << 40, 9)))


def test_one_range_holds_what_its_field_can_say() -> None:
    pages = PageSet()
    pages.add(PageRange(3, RANGE_PAGES_MAX + 2))
    assert pages.take(RANGE_PAGES_MAX + 2, 9) == [
        PageRange(3, RANGE_PAGES_MAX),
        PageRange(3 + RANGE_PAGES_MAX, 2),
    ]
    assert pages.count == 0


class NoRam:
    def is_ram(self, pages: PageRange) -> bool:
        return False

    def release(self, pages: PageRange) -> None:
        raise AssertionError(pages)


def test_nothing_is_offered_to_a_guest_that_did_not_say_what_it_can_take() -> None:
    device = MemoryDevice(HotAddArea(1 << 20, 1 << 21), 1 << 22, NoRam())
    assert device.next_range(100) is None
