"""Channel messages: sized as in linux/hyperv.h, both ways, and rubbish is our error only."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.vmbus import protocol
from hvhost.vmbus.protocol import MessageType, decode, encode

RECORDS = sorted(protocol._RECORDS.values(), key=lambda record: record.message_type)
# sizeof() of the structures in linux/hyperv.h, header included; lists empty.
SIZES = {
    MessageType.OFFERCHANNEL: 196,
    MessageType.RESCIND_CHANNELOFFER: 12,
    MessageType.REQUESTOFFERS: 8,
    MessageType.ALLOFFERS_DELIVERED: 8,
    MessageType.OPENCHANNEL: 148,
    MessageType.OPENCHANNEL_RESULT: 20,
    MessageType.CLOSECHANNEL: 12,
    MessageType.GPADL_HEADER: 20,
    MessageType.GPADL_BODY: 16,
    MessageType.GPADL_CREATED: 20,
    MessageType.GPADL_TEARDOWN: 16,
    MessageType.GPADL_TORNDOWN: 12,
    MessageType.RELID_RELEASED: 12,
    MessageType.INITIATE_CONTACT: 40,
    MessageType.VERSION_RESPONSE: 16,
    MessageType.UNLOAD: 8,
    MessageType.UNLOAD_RESPONSE: 8,
    MessageType.TL_CONNECT_REQUEST: 40,
    MessageType.MODIFYCHANNEL: 16,
    MessageType.TL_CONNECT_RESULT: 44,
    MessageType.MODIFYCHANNEL_RESPONSE: 16,
}
_CODES = {
    "B": st.integers(0, 0xFF),
    "H": st.integers(0, 0xFFFF),
    "I": st.integers(0, 0xFFFFFFFF),
    "Q": st.integers(0, 0xFFFFFFFFFFFFFFFF),
    "16s": st.uuids(),
    "120s": st.binary(min_size=120, max_size=120),
    "0s": st.binary(max_size=200),
}


def messages() -> st.SearchStrategy[Any]:
    def build(record: type[protocol.Message]) -> st.SearchStrategy[Any]:
        values: dict[str, st.SearchStrategy[Any]] = {}
        for name, annotation in record.__annotations__.items():
            if name != "message_type":
                code = eval(annotation, vars(protocol)).__metadata__[0]
                values[name] = _CODES[code]
        return st.builds(record, **values)

    return st.sampled_from(RECORDS).flatmap(build)


@given(messages())
def test_every_message_survives_the_way_there_and_back(message: protocol.Message) -> None:
    encoded = encode(message)
    assert decode(encoded) == message
    assert len(encoded) == SIZES[message.message_type] + len(getattr(message, "data", b""))


@given(messages(), st.data())
def test_a_message_cut_short_is_refused(message: protocol.Message, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, SIZES[message.message_type] - 1))
    with pytest.raises(RemoteProtocolError):
        decode(encode(message)[:size])


@given(st.binary(max_size=300))
def test_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    assert encode(message) == data[:4] + bytes(4) + data[8 : len(encode(message))]


@pytest.mark.parametrize("number", [0, 18, 19, 20, 25, 26, 0xFFFFFFFF])
def test_an_unknown_type_is_named(number: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"type {number} is unknown"):
        decode(number.to_bytes(4, "little") + bytes(236))


def test_offer_fields_lie_where_linux_reads_them() -> None:
    offer = protocol.OfferChannel(
        if_type=uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d"),
        if_instance=uuid.UUID(int=1),
        reserved1=0,
        reserved2=0,
        chn_flags=0x11,
        mmio_megabytes=8,
        user_def=b"\x04" + bytes(119),
        sub_channel_index=3,
        reserved3=0,
        child_relid=7,
        monitorid=0,
        monitor_allocated=0,
        is_dedicated_interrupt=1,
        connection_id=0x2007,
    )
    data = encode(offer)
    assert data[:4] == b"\x01\0\0\0"
    assert data[8:12] == bytes.fromhex("394f1657")  # the first group of a GUID is little-endian
    assert data[56:58] == b"\x11\0" and data[58:60] == b"\x08\0"
    assert data[60] == 4
    assert data[180:182] == b"\x03\0"
    assert data[184:188] == b"\x07\0\0\0"
    assert data[189] == 0  # monitor_allocated
    assert data[190:192] == b"\x01\0"
    assert data[192:] == b"\x07\x20\0\0"


def test_initiate_contact_names_sint_and_vtl() -> None:
    message = protocol.InitiateContact(0x50003, 1, 0x0302, 0, 0)
    assert (message.msg_sint, message.msg_vtl) == (2, 3)


def test_versions_read_as_people_write_them() -> None:
    assert [protocol.format_version(version) for version in protocol.Version] == [
        "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3",
    ]  # fmt: skip
