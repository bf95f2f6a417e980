"""Checksums, segments and hashes, against what [RFC 1071] and Microsoft's examples say."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.network import frame, rndis
from hvhost.network.ndis import HASH_IPV4, HASH_IPV6, HASH_TCP_IPV4, HASH_TCP_IPV6
from hvhost.network.toeplitz import hash_input, toeplitz
from simulated.frames import ethernet, ones_sum, sums_are_right, tcp

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)


@given(st.binary(max_size=64), st.binary(max_size=63))
def test_the_sum_is_that_of_words_added_one_by_one(first: bytes, second: bytes) -> None:
    first += bytes(len(first) & 1)
    assert frame.checksum(first, second) == ones_sum(first + second)


@given(
    st.integers(1, 5000),
    st.integers(1, 1460),
    st.booleans(),
    st.sampled_from([6, 17]),
    st.integers(0, 0xFFFFFFFF),
)
def test_segments_are_whole_frames_that_make_up_the_large_one(
    length: int, size: int, ipv6: bool, protocol: int, sequence: int
) -> None:
    payload = os.urandom(length)
    data = tcp(payload, ipv6=ipv6, protocol=protocol, sequence=sequence, flags=0x99)
    start = 54 if ipv6 else 34
    kind = frame.GSO_UDP_L4 if protocol == 17 else frame.GSO_TCPV6 if ipv6 else frame.GSO_TCPV4
    pieces = list(frame.segments(data, frame.Offload(1, kind, 0, size, start, 16)))
    assert len(pieces) == -(-length // size)
    header = start + (20 if protocol == 6 else 8)
    assert b"".join(bytes(piece[header:]) for piece in pieces) == payload
    assert all(sums_are_right(bytes(piece)) for piece in pieces)
    if protocol == 6:
        offset = start + 4
        numbers = [int.from_bytes(piece[offset : offset + 4], "big") for piece in pieces]
        expected = [sequence + size * number & 0xFFFFFFFF for number in range(len(pieces))]
        assert numbers == expected
        flags = [piece[start + 13] for piece in pieces]
        assert flags[-1] & 0x09 and not any(each & 0x09 for each in flags[:-1])
        assert flags[0] & 0x80 and not any(each & 0x80 for each in flags[1:])


@given(st.booleans(), st.integers(0, 10), st.integers(0, 65000), st.randoms())
def test_a_large_send_gets_its_lengths_and_sums(
    ipv6: bool, options: int, length: int, random: Random
) -> None:
    head = bytearray(tcp(b"", ipv6=ipv6))
    where = frame.parse(head)
    assert where is not None
    if not ipv6:  # options of IP, of which the usual way knows nothing
        head[34:34] = random.randbytes(4 * options)
        head[14] += options
        where = where._replace(
            transport=where.transport + 4 * options, payload=where.payload + 4 * options
        )
    for position in (*range(where.network + 2, where.network + 6), where.network + 8):
        head[position] = random.randrange(256)
    if not ipv6:
        head[26:34] = random.choice([random.randbytes(8), bytes(8), b"\xff" * 8])
    size = min(where.payload + length, 65535)
    frame.finish_large_send(head, where, size)
    whole = head + random.randbytes(size - where.payload)
    frame.finish_checksum(whole, frame.Offload(1, 0, 0, 0, where.transport, 16))
    assert sums_are_right(bytes(whole))


@given(st.binary(max_size=200), st.tuples(*[st.integers(0, 255)] * 2, *[st.integers(0, 200)] * 4))
def test_no_offload_header_makes_it_fail(data: bytes, words: tuple[int, ...]) -> None:
    for piece in frame.segments(data, frame.Offload._make(words)):
        assert len(piece) <= len(data)


@given(st.binary(max_size=160))
def test_no_frame_makes_the_parser_fail(data: bytes) -> None:
    where = frame.parse(data)
    assert where is None or where.payload <= len(data)
    hash_input(data, 0xFF00)


def tagged(data: bytes | bytearray) -> bytes:
    return bytes(data[:12]) + b"\x81\0\0\5" + data[12:]


@pytest.mark.parametrize("tag", [False, True])
@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("protocol", [6, 17])
def test_headers_are_where_they_are_and_whole(tag: bool, ipv6: bool, protocol: int) -> None:
    data = tcp(bytes(40), ipv6=ipv6, protocol=protocol)
    data = tagged(data) if tag else data
    network = 18 if tag else 14
    transport = network + (40 if ipv6 else 20)
    payload = transport + (20 if protocol == 6 else 8)
    where = frame.Headers(network, transport, payload, ipv6, protocol)
    for cut in range(len(data) + 1):
        assert frame.parse(data[:cut]) == (where if cut >= payload else None), cut


@pytest.mark.parametrize("tag", [False, True])
@pytest.mark.parametrize(
    ("ipv6", "offset", "value", "known"),
    [
        (False, 0, 0x65, False),  # another version of IP
        (False, 0, 0x44, False),  # a header shorter than the shortest
        (False, 6, 0x40, True),  # not to be fragmented
        (False, 6, 0x20, False),  # fragments
        (False, 6, 0x01, False),
        (False, 7, 0x01, False),
        (False, 9, 1, False),  # ICMP
        (False, 32, 0x40, False),  # TCP's header
        (False, 32, 0xF0, False),
        (True, 0, 0x40, False),
        (True, 6, 0, False),  # options
        (True, 52, 0x40, False),
        (True, 52, 0xF0, False),
    ],
)
def test_headers_that_are_not_looked_into(
    tag: bool, ipv6: bool, offset: int, value: int, known: bool
) -> None:
    data = bytearray(tcp(b"x" * 30, ipv6=ipv6))
    data[14 + offset] = value
    if value == 0x44:
        data[14 + 28] = 0x50  # a good length, were this TCP's header a word too early
    assert (frame.parse(tagged(data) if tag else data) is not None) is known


@pytest.mark.parametrize("ipv6", [False, True])
def test_other_frames_that_look_like_it(ipv6: bool) -> None:
    assert frame.parse(ethernet(0x1234, tcp(b"x" * 30, ipv6=ipv6)[14:])) is None


@pytest.mark.parametrize("tag", [False, True])
def test_options_of_ip_and_of_tcp(tag: bool) -> None:
    data = bytearray(tcp(b"x" * 30))
    data[14], data[46] = 0x46, 0x70
    data[34:34] = bytes(4)
    found = frame.parse(tagged(data) if tag else data)
    start = 18 if tag else 14
    # TCP's length, 0x70, moved with it.
    assert found == frame.Headers(start, start + 24, start + 24 + 28, False, 6)


def test_frames_that_are_not_what_their_offload_says() -> None:
    data, datagram = tcp(bytes(3000)), tcp(bytes(3000), protocol=17)
    for each, kind, size in (
        (data, frame.GSO_TCPV4, 0),
        (data, frame.GSO_UDP, 1000),
        (data, frame.GSO_UDP_L4, 1000),
        (datagram, frame.GSO_TCPV4, 1000),
        (datagram, frame.GSO_UDP, 1000),
        (ethernet(0x0806, bytes(3000)), frame.GSO_TCPV4, 1000),
    ):
        assert list(frame.segments(each, frame.Offload(1, kind, 0, size, 34, 16))) == []
    pieces = list(frame.segments(data, frame.Offload(1, frame.GSO_TCPV4, 0, 1000, 34, 16)))
    numbers = [int.from_bytes(piece[18:20], "big") for piece in pieces]
    assert numbers == [1, 2, 3], "of IP"


def test_a_sum_is_made_only_where_it_is_asked_for() -> None:
    data = tcp(b"payload", good=False)
    (same,) = frame.segments(data, frame.Offload(0, 0, 0, 0, 34, 16))
    assert same == data
    (outside,) = frame.segments(data, frame.Offload(1, 0, 0, 0, 34, len(data) - 35))
    assert outside == data


@pytest.mark.parametrize(
    ("source", "target", "ports", "with_ports", "without"),
    [
        ("420995bb", "a18e6450", (2794, 1766), 0x51CCC178, 0x323E8FC2),
        ("c75c6f02", "41458c53", (14230, 4739), 0xC626B0EA, 0xD718262A),
        ("1813c65f", "0c16cfb8", (12898, 38024), 0x5C2B394A, 0xD2D0A5DE),
        (
            *("3ffe250102001fff0000000000000007", "3ffe2501020000030000000000000001"),
            *((2794, 1766), 0x40207D3D, 0x2CC18CD5),
        ),
        (
            *("3ffe050100080000026097fffe40efab", "ff020000000000000000000000000001"),
            *((14230, 4739), 0xDDE51BBF, 0x0F0C461C),
        ),
        (
            *("3ffe1900454500030200f8fffe2167cf", "fe800000000000000200f8fffe2167cf"),
            *((44251, 38024), 0x02D1FEEF, 0x4B61E985),
        ),
    ],
)
def test_the_hash_is_toeplitz(
    source: str, target: str, ports: tuple[int, int], with_ports: int, without: int
) -> None:
    """Microsoft's "Verifying the RSS hash calculation"."""
    addresses = bytes.fromhex(source + target)
    data = addresses + ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big")
    assert toeplitz(KEY, data) == with_ports and toeplitz(KEY, addresses) == without


def test_what_is_hashed() -> None:
    every = HASH_IPV4 | HASH_TCP_IPV4 | HASH_IPV6 | HASH_TCP_IPV6
    assert len(hash_input(tcp(b""), every)) == 12
    assert len(hash_input(tcp(b"", protocol=17), every)) == 8
    assert len(hash_input(tcp(b"", ipv6=True), every)) == 36
    assert len(hash_input(tcp(b"", ipv6=True, protocol=17), every)) == 32
    assert hash_input(tcp(b""), HASH_IPV6) == b""
    assert hash_input(ethernet(0x0806, bytes(50)), every) == b""


@given(st.integers(0, 0xFFFF))
def test_tags_survive_being_information(tag: int) -> None:
    assert rndis.tag_of_info(rndis.info_of_tag(tag)) == tag
