"""Control messages whose sizes contradict each other."""

from __future__ import annotations

import struct

import pytest

from hvhost.errors import RemoteProtocolError
from hvhost.network.rndis import Query, RndisType, decode_control, information


@pytest.mark.parametrize("size", [0, 7, 13, 0xFFFFFFFF])
def test_a_length_that_is_not_the_messages(size: int) -> None:
    message = struct.pack("<III", RndisType.HALT, 12, 5)
    assert decode_control(message) == (RndisType.HALT, message[8:])
    with pytest.raises(RemoteProtocolError, match=f"message of {size} bytes came in 12 bytes"):
        decode_control(struct.pack("<II", RndisType.HALT, size) + message[8:])


@pytest.mark.parametrize(
    ("length", "offset", "good"),
    [(8, 20, True), (0, 0, True), (0, 999, True), (9, 20, False), (8, 19, False), (1, 28, False)],
)
def test_information_lies_behind_its_request(length: int, offset: int, good: bool) -> None:
    body = struct.pack("<IIIII", 1, 0x10101, length, offset, 0) + b"12345678"
    request = Query.unpack(body)
    if good:
        assert information(body, request) == body[20:][:length]
        return
    with pytest.raises(RemoteProtocolError, match=f"puts {length} bytes of information at"):
        information(body, request)
