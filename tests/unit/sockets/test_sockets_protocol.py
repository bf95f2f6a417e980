"""What goes over the wire for Hyper-V sockets."""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.sockets.protocol import (
    FIN,
    HVS_MTU_SIZE,
    answer_to_guest,
    connect_line,
    data_size,
    decode_data,
    describe,
    encode_data,
    listen_name,
    offer_to_guest,
    parse_connect_line,
    parse_service,
    port_of,
    service_id,
)

PORTS = st.integers(0, 2**32 - 1)
OWN = uuid.UUID("9b7a3b1e-0000-4000-8000-00155d010203")


def test_a_port_stands_in_the_first_four_bytes() -> None:
    # hyperv_transport.c: union hvs_service_id, srv_id_template
    service = service_id(0x12345678)
    assert str(service) == "12345678-facb-11e6-bd58-64006a7986d3"
    assert service.bytes_le[:4] == struct.pack("<I", 0x12345678)


@given(PORTS)
def test_ports_survive(port: int) -> None:
    service = service_id(port)
    assert port_of(service) == port
    assert parse_service(str(port)) == parse_service(str(service)) == service
    assert listen_name(service) == f"vsock_{port}.sock"
    assert describe(service) == f"port {port}"


@given(st.uuids())
def test_guids_of_ones_own_survive(service: uuid.UUID) -> None:
    assert service_id(service) == parse_service(str(service)) == service
    if port_of(service) is None:
        assert listen_name(service) == f"hvsock_{service}.sock"
        assert describe(service) == f"service {service}"


@pytest.mark.parametrize("port", [-1, 2**32])
def test_no_port(port: int) -> None:
    with pytest.raises(HvHostError, match="no socket port"):
        service_id(port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "4294967296",
        "1" * 5000,
        "12a",
        "²",
        "٢٢",
        "{" + str(OWN) + "}",
        str(OWN)[:-1],
        "g" * 36,
    ],
)
def test_no_service(text: str) -> None:
    with pytest.raises(HvHostError, match="no socket"):
        parse_service(text)


@given(PORTS | st.uuids())
def test_connect_lines_survive(service: int | uuid.UUID) -> None:
    line = connect_line(service_id(service))
    assert line.endswith(b"\n") and len(line) <= 64
    assert parse_connect_line(line[:-1]) == service_id(service)
    assert parse_connect_line(line[:-1] + b"\r") == service_id(service)


@given(st.binary(max_size=80))
def test_other_lines_are_refused_in_words(line: bytes) -> None:
    try:
        service = parse_connect_line(line)
    except HvHostError as error:
        assert str(error).endswith(".")
    else:
        assert line == connect_line(service)[:-1] or len(line) > len(b"CONNECT ")


def test_offers_say_who_connects() -> None:
    # vmbus_channel_offer.u.pipe: pipe_mode (bytes: 0), then user_def
    endpoint = service_id(7)
    ours = offer_to_guest(service_id(22), endpoint)
    assert (ours.interface_type, ours.interface_instance) == (service_id(22), endpoint)
    assert ours.user_defined == b"\0\0\0\0\1" + bytes(115)
    theirs = answer_to_guest(service_id(22), endpoint)
    assert (theirs.interface_type, theirs.interface_instance) == (service_id(22), endpoint)
    assert theirs.user_defined == bytes(120)
    for offer in (ours, theirs):
        assert offer.flags == 0x2010  # TLNPI_PROVIDER_OFFER, NAMED_PIPE_MODE
    assert (ours.name, theirs.name) == ("socket to guest port 22", "socket to host port 22")


def test_a_packet_is_a_header_and_data() -> None:
    assert encode_data(b"abc") == struct.pack("<II", 1, 3) + b"abc"
    assert struct.pack("<II", 1, 0) == FIN
    assert decode_data(FIN) == b""


@given(st.binary(min_size=1, max_size=HVS_MTU_SIZE), st.integers(0, 7))
def test_data_survives_with_its_padding(data: bytes, padding: int) -> None:
    assert decode_data(encode_data(data) + bytes(padding)) == data


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (b"", "not even a header"),
        (bytes(7), "not even a header"),
        (struct.pack("<II", 0, 0), "type 0"),
        (struct.pack("<II", 2, 1) + bytes(8), "type 2"),
        (struct.pack("<II", 1, 9) + bytes(8), "announces 9 bytes and has 8"),
        (struct.pack("<II", 1, 2**32 - 1) + bytes(8), "announces 4294967295 bytes"),
        (struct.pack("<II", 1, HVS_MTU_SIZE + 1) + bytes(HVS_MTU_SIZE + 8), "at most 16384"),
    ],
)
def test_bad_packets(payload: bytes, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        decode_data(payload)


@given(st.binary(max_size=40))
def test_any_packet_is_data_or_a_violation(payload: bytes) -> None:
    try:
        data = decode_data(payload)
    except RemoteProtocolError:
        return
    assert payload.startswith(struct.pack("<II", 1, len(data)) + data)


def test_the_largest_packet_is_allowed() -> None:
    assert len(decode_data(struct.pack("<II", 1, HVS_MTU_SIZE) + bytes(HVS_MTU_SIZE))) == 16384


@given(st.integers(1, 4096))
def test_four_packets_fit_into_a_ring(pages: int) -> None:
    size = data_size(pages * 4096)
    assert 8 <= size <= HVS_MTU_SIZE and size % 8 == 0
    assert 4 * (size + 32) <= pages * 4096
