"""Messages whose sizes contradict each other."""

from __future__ import annotations

import struct

import pytest

from hvhost.errors import RemoteProtocolError
from hvhost.network.rndis import (
    DataMessage,
    Query,
    RndisType,
    config_parameter,
    decode_control,
    decode_packet,
    information,
)


@pytest.mark.parametrize("size", [0, 7, 13, 0xFFFFFFFF])
def test_a_length_that_is_not_the_messages(size: int) -> None:
    message = struct.pack("<III", RndisType.HALT, 12, 5)
    assert decode_control(message) == (RndisType.HALT, message[8:])
    with pytest.raises(RemoteProtocolError, match=f"message of {size} bytes came in 12 bytes"):
        decode_control(struct.pack("<II", RndisType.HALT, size) + message[8:])


def test_a_type_that_nobody_knows() -> None:
    with pytest.raises(RemoteProtocolError, match="type 0x99 is unknown"):
        decode_control(struct.pack("<III", 0x99, 12, 5))


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


def parameter(name: tuple[int, int], value: tuple[int, int]) -> bytes:
    """``struct rndis_config_parameter_info`` with ``ab`` and ``cd`` behind it."""
    return struct.pack("<IIIII", *name, 2, *value) + "abcd".encode("utf-16-le")


def test_a_configuration_parameter_is_two_texts() -> None:
    assert config_parameter(parameter((20, 4), (24, 4))) == ("ab", "cd")
    assert config_parameter(parameter((20, 8), (28, 0))) == ("abcd", "")


@pytest.mark.parametrize("bad", [(16, 4), (24, 5), (28, 1), (29, 0), (0xFFFFFFFF, 4)])
def test_texts_lie_behind_their_head(bad: tuple[int, int]) -> None:
    for name, value in ((bad, (20, 4)), ((20, 4), bad)):
        with pytest.raises(RemoteProtocolError, match=f"puts {bad[1]} bytes at {bad[0]}"):
            config_parameter(parameter(name, value))


def packet(
    infos: bytes = b"",
    *,
    length: int | None = None,
    data: tuple[int, int] | None = None,
    info: tuple[int, int] | None = None,
) -> bytes:
    """``struct rndis_packet`` with *infos*, and 8 bytes of a frame, behind it."""
    data_offset, data_size = data or (36 + len(infos), 8)
    info_offset, info_size = info or (36, len(infos))
    head = (1, 52 + len(infos) if length is None else length, data_offset, data_size, 0, 0, 0)
    return struct.pack("<11I", *head, info_offset, info_size, 0, 0) + infos + b"12345678"


def test_a_packet_without_information_may_say_that_it_is_anywhere() -> None:
    for offset in (0, 36, 0xFFFFFFFF):
        assert decode_packet(packet(info=(offset, 0)), 52) == DataMessage(52, 44, 8)


def test_information_that_nobody_uses_is_left_alone() -> None:
    infos = struct.pack("<IIII", 16, 11, 12, 0x70) + struct.pack("<III", 12, 0x80000001, 12)
    vlan = struct.pack("<IIII", 16, 6, 12, 0x10)
    message = packet(infos + vlan)
    assert decode_packet(message, 96) == DataMessage(96, 88, 8, vlan=0x10)
    assert decode_packet(packet(infos), 80) == DataMessage(80, 72, 8)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (packet()[:43], "no whole header"),
        (packet(length=53), "53 bytes came in 52 bytes"),
        (packet(length=43), "43 bytes puts 8 bytes of data at 36"),
        (packet(length=43, data=(36, 0)), "43 bytes puts 0 bytes of data at 36"),
        (packet(data=(35, 8)), "8 bytes of data at 35"),
        (packet(data=(36, 9)), "9 bytes of data at 36"),
        (packet(data=(45, 0)), "0 bytes of data at 45"),
        (packet(bytes(16), info=(35, 16)), "16 bytes of per-packet information at 35"),
        (packet(bytes(1036), info=(36, 1025)), "1025 bytes of per-packet information at 36"),
        (packet(bytes(16), info=(36, 25)), "information of 25 bytes at 36 leaves"),
        (packet(struct.pack("<IIII", 8, 6, 12, 0)), "of 8 bytes with its value at 12"),
        (packet(struct.pack("<IIII", 16, 6, 8, 0)), "of 16 bytes with its value at 8"),
        (packet(struct.pack("<IIII", 16, 6, 17, 0)), "of 16 bytes with its value at 17"),
        (packet(struct.pack("<IIII", 17, 6, 12, 0)), "of 17 bytes with its value at 12"),
        (packet(struct.pack("<IIII", 16, 6, 13, 0)), "0x6 is cut short"),
        (packet(struct.pack("<IIIII", 16, 6, 12, 0, 0)), "ends with 4 stray bytes"),
    ],
)
def test_frames_and_information_lie_inside_their_message(message: bytes, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode_packet(message, len(message))


def test_information_lies_in_what_was_copied_of_the_message() -> None:
    """The rest of the message may be changed by the guest while it is looked at."""
    vlan = struct.pack("<IIII", 16, 6, 12, 0x10)
    message = packet(vlan)
    assert decode_packet(message[:60], 68).vlan == 0x10
    with pytest.raises(RemoteProtocolError, match="of 16 bytes at 36 leaves"):
        decode_packet(message[:59], 68)
    with pytest.raises(RemoteProtocolError, match="4 stray bytes"):
        decode_packet(packet(vlan + bytes(4), data=(56, 8))[:64], 72)
