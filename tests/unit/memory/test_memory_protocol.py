"""Sizes that messages of the guest give themselves."""

from __future__ import annotations

import struct

import pytest

from hvhost.errors import RemoteProtocolError
from hvhost.memory.protocol import UnballoonResponse, decode


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
