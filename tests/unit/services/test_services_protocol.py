"""Integration service messages: layout, negotiation, and nothing but our error for rubbish."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.services import protocol
from hvhost.services.protocol import IcMessage, IcMessageType, IcVersion, decode, encode

U16 = st.integers(0, 0xFFFF)
VERSIONS = st.builds(IcVersion, U16, U16)


@given(
    st.sampled_from(IcMessageType),
    st.binary(max_size=3000),
    VERSIONS,
    VERSIONS,
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=7),
)
def test_messages_survive_the_way_there_and_back(
    kind: IcMessageType,
    data: bytes,
    framework: IcVersion,
    version: IcVersion,
    transaction: int,
    flags: int,
    status: int,
    padding: bytes,
) -> None:
    payload = encode(
        kind,
        data,
        framework=framework,
        version=version,
        transaction_id=transaction,
        flags=flags,
        status=status,
    )
    expected = IcMessage(framework, kind, version, status, transaction, flags, data)
    assert decode(payload + padding) == expected
    with pytest.raises(RemoteProtocolError):
        decode(payload[:-1])


@given(st.binary(max_size=64))
def test_bytes_are_a_message_or_a_protocol_error(payload: bytes) -> None:
    try:
        message = decode(payload)
        protocol.parse_heartbeat(message.data)
        protocol.parse_choice(message.data)
    except RemoteProtocolError:
        pass


def test_fields_lie_where_linux_reads_them() -> None:
    payload = encode(
        IcMessageType.HEARTBEAT,
        protocol.heartbeat_body(0x1122334455667788),
        framework=IcVersion(3, 0),
        version=IcVersion(3, 1),
        transaction_id=9,
    )
    assert len(payload) == 28 + 40
    assert struct.unpack_from("<II", payload) == (1, 60)
    assert struct.unpack_from("<HHHHHHIBB", payload, 8) == (3, 0, 1, 3, 1, 40, 0, 9, 3)
    assert struct.unpack_from("<Q", payload, 28) == (0x1122334455667788,)


def test_the_shutdown_message_is_2060_bytes() -> None:
    message = protocol.ShutdownMessage(1, 2, 3, b"why").pack()
    assert len(message) == 2060 and message[:16] == struct.pack("<III4s", 1, 2, 3, b"why")


def test_a_negotiation_lists_all_versions() -> None:
    body = protocol.negotiate_body([IcVersion(1, 0), IcVersion(3, 0)], [IcVersion(3, 2)])
    assert body == struct.pack("<HHIHHHHHH", 2, 1, 0, 1, 0, 3, 0, 3, 2)


def test_a_choice_is_one_of_each_or_none() -> None:
    choice = struct.pack("<HHIHHHH", 1, 1, 0, 3, 0, 3, 2)
    assert protocol.parse_choice(choice) == (IcVersion(3, 0), IcVersion(3, 2))
    assert protocol.parse_choice(bytes(8)) is None
    assert protocol.parse_choice(struct.pack("<HHI", 1, 0, 0)) is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes(7), "answered with 7 bytes"),
        (struct.pack("<HHIHHHH", 2, 1, 0, 3, 0, 3, 2), "chose 2 framework"),
        (struct.pack("<HHIHHHH", 1, 2, 0, 3, 0, 3, 2), "2 message versions"),
        (struct.pack("<HHIHHH", 1, 1, 0, 3, 0, 3), "in 14 bytes"),
    ],
)
def test_another_choice_is_an_error(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        protocol.parse_choice(data)


def test_a_heartbeat_without_its_number_is_an_error() -> None:
    assert protocol.parse_heartbeat(bytes(8)) == 0
    with pytest.raises(RemoteProtocolError, match="answered with 7 bytes"):
        protocol.parse_heartbeat(bytes(7))


def test_services_are_offered_as_message_pipes() -> None:
    offer = protocol.HEARTBEAT_OFFER
    assert offer.interface_type == uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
    assert (offer.flags, offer.user_defined[:5], len(offer.user_defined)) == (
        0x11,
        b"\4\0\0\0\0",
        120,
    )
    assert protocol.SHUTDOWN_OFFER.interface_type == uuid.UUID(
        "0e0b6031-5213-4934-818b-38d90ced39db"
    )
