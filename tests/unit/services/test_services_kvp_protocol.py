"""Key-value messages: layout, limits, and nothing but our errors for rubbish."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.services import kvp_protocol as protocol
from hvhost.services.kvp_protocol import KvpItem, KvpOperation

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
KEYS = TEXT.filter(lambda key: 0 < len(key.encode()) <= 500)
VALUES = TEXT.filter(lambda value: len(value.encode()) <= 2000)
POOLS = st.sampled_from(KvpPool)


def utf16(text: str) -> bytes:
    return text.encode("utf-16-le") + b"\0\0"


def test_pools_have_their_numbers() -> None:
    assert [pool.number for pool in KvpPool] == [0, 1, 2, 3, 4]
    assert KvpPool("auto-external").number == 3


@given(POOLS, KEYS, VALUES)
def test_an_item_is_set_as_linux_reads_it(pool: KvpPool, key: str, value: str) -> None:
    message = protocol.set_message(pool, key, value)
    assert len(message) == 4 + 4 + 12 + 512 + 2048
    operation, number, _, kind, key_size, value_size, name, content = struct.unpack_from(
        "<BBHIII512s2048s", message
    )
    assert (operation, number, kind) == (1, pool.number, 1)
    assert name == utf16(key).ljust(512, b"\0") and content == utf16(value).ljust(2048, b"\0")
    assert (key_size, value_size) == (len(utf16(key)), len(utf16(value)))
    assert protocol.parse_get(message) == KvpItem(key, value)


@given(POOLS, KEYS)
def test_keys_are_asked_for_and_deleted_as_linux_reads_it(pool: KvpPool, key: str) -> None:
    message = protocol.get_message(pool, key)
    assert message[:2] == bytes([0, pool.number])
    assert struct.unpack_from("<III", message, 4) == (1, len(utf16(key)), 0)
    assert message[16:528] == utf16(key).ljust(512, b"\0")
    message = protocol.delete_message(pool, key)
    assert message[:2] == bytes([2, pool.number])
    assert struct.unpack_from("<I512s", message, 4) == (
        len(utf16(key)),
        utf16(key).ljust(512, b"\0"),
    )


@given(POOLS, st.integers(0, 2**32 - 1))
def test_items_are_counted(pool: KvpPool, index: int) -> None:
    message = protocol.enumerate_message(pool, index)
    assert struct.unpack_from("<BBHI", message) == (3, pool.number, 0, index)
    assert len(message) == 2580 and protocol.parse_enumerate(message) == KvpItem("", "")


def test_the_longest_texts_that_come_back_whole() -> None:
    key, value = "k" * 254, "v" * 1022
    assert protocol.parse_get(protocol.set_message(KvpPool.GUEST, key, value)) == KvpItem(
        key, value
    )
    for wrong_key, wrong_value in ((key + "k", value), (key, value + "v")):
        with pytest.raises(HvHostError, match="make it shorter"):
            protocol.set_message(KvpPool.GUEST, wrong_key, wrong_value)


def test_what_linux_keeps_as_utf8_must_fit_too() -> None:
    protocol.encode_key("東" * 169)
    with pytest.raises(HvHostError, match="takes 511 bytes; at most 510"):
        protocol.encode_key("東" * 170)


@pytest.mark.parametrize(
    ("key", "why"),
    [("", "must have a name"), ("a\0b", "zero character"), ("\ud800", "no valid Unicode")],
)
def test_what_is_no_key(key: str, why: str) -> None:
    with pytest.raises(HvHostError, match=why):
        protocol.encode_key(key)


def test_numbers_come_as_digits() -> None:
    message = bytearray(protocol.enumerate_message(KvpPool.GUEST, 0))
    for kind, size, digits in ((4, 4, str(0xFFFFFFFF)), (8, 8, str(2**64 - 1))):
        struct.pack_into("<III512s2048s", message, 8, kind, 4, size, utf16("n"), b"\xff" * 8)
        assert protocol.parse_enumerate(bytes(message)) == KvpItem("n", digits)


def test_text_that_is_none_is_replaced() -> None:
    message = bytearray(protocol.enumerate_message(KvpPool.GUEST, 0))
    struct.pack_into("<III512s2048s", message, 8, 1, 5, 4, b"a\0\0\xd8b", b"\x3d\xd8x\0")
    assert protocol.parse_enumerate(bytes(message)) == KvpItem("a\ufffd", "\ufffdx")


@given(st.binary(max_size=3000), st.integers(0, 8), st.integers(0, 3000), st.integers(0, 3000))
def test_bytes_are_an_item_or_a_protocol_error(
    data: bytes, kind: int, key_size: int, value_size: int
) -> None:
    led = struct.pack("<IIIII", 0, 0, kind, key_size, value_size) + data.ljust(2560, b"\xa5")
    for parse, message in (
        (protocol.parse_get, data),
        (protocol.parse_enumerate, data),
        (protocol.parse_enumerate, led),
        (protocol.parse_get, led[4:]),
    ):
        try:
            item = parse(message)
        except RemoteProtocolError:
            continue
        assert len(item.key) <= 256 and len(item.value) <= 1024
        assert "\0" not in item.key + item.value


@pytest.mark.parametrize(("key_size", "value_size"), [(513, 0), (0, 2049)])
def test_sizes_beyond_their_fields_are_an_error(key_size: int, value_size: int) -> None:
    message = struct.pack("<II", 0, 0) + struct.pack(
        "<III512s2048s", 1, key_size, value_size, b"", b""
    )
    with pytest.raises(RemoteProtocolError, match=f"key of {key_size} and a value of {value_size}"):
        protocol.parse_enumerate(message)
    with pytest.raises(RemoteProtocolError, match="answered with 2579 bytes, of 2580"):
        protocol.parse_enumerate(message[:-1])


SETTINGS = IpSettings(
    adapter="{4d9b8f2e-0000-4000-8000-00155d000001}",
    family=3,
    dhcp=True,
    addresses="192.0.2.7;2001:db8::7",
    subnets="255.255.255.0;/64",
    gateways="192.0.2.1",
    dns_servers="192.0.2.53",
)


def test_ip_settings_lie_where_linux_reads_them() -> None:
    message = protocol.ip_message(KvpOperation.SET_IP_INFO, SETTINGS)
    assert len(message) == 2 + 256 + 2 + 2048 + 2048 + 1024 + 2048
    assert message[0] == 5
    assert message[2:].startswith(utf16(SETTINGS.adapter))
    assert message[258:260] == bytes([3, 1])
    for offset, text in (
        (260, SETTINGS.addresses),
        (2308, SETTINGS.subnets),
        (4356, SETTINGS.gateways),
        (5380, SETTINGS.dns_servers),
    ):
        assert message[offset:].startswith(utf16(text))
    assert protocol.parse_ip(message + b"pad") == SETTINGS
    with pytest.raises(RemoteProtocolError):
        protocol.parse_ip(message[:-1])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (IpSettings("a" * 128), "adapter"),
        (IpSettings("a", addresses="1" * 1024), "list of addresses"),
        (IpSettings("a", subnets="1" * 1024), "list of subnets"),
        (IpSettings("a", gateways="1" * 512), "list of gateways"),
        (IpSettings("a", dns_servers="1" * 1024), "list of name servers"),
    ],
)
def test_too_long_settings_are_refused(settings: IpSettings, why: str) -> None:
    with pytest.raises(HvHostError, match=why):
        protocol.ip_message(KvpOperation.SET_IP_INFO, settings)


@given(st.binary(max_size=7500), st.booleans())
def test_bytes_are_ip_settings_or_a_protocol_error(data: bytes, whole: bool) -> None:
    size = len(protocol.ip_message(KvpOperation.GET_IP_INFO, SETTINGS))
    message = (data * (size // max(1, len(data)) + 1)).ljust(size, b"x") if whole else data
    try:
        settings = protocol.parse_ip(message)
    except RemoteProtocolError:
        assert len(message) < size
        return
    for text, limit in (
        (settings.adapter, 128),
        (settings.addresses, 1024),
        (settings.subnets, 1024),
        (settings.gateways, 512),
        (settings.dns_servers, 1024),
    ):
        assert len(text) <= limit and "\0" not in text
    assert isinstance(settings.dhcp, bool) and 0 <= settings.family <= 255


def ip_text(size: int) -> st.SearchStrategy[str]:
    """What fits into *size* code units as UTF-16, and into as many pairs of bytes as UTF-8."""
    return TEXT.filter(lambda text: len(utf16(text)) <= 2 * size > len(text.encode()))


@given(
    st.builds(
        IpSettings,
        ip_text(128),
        st.integers(0, 255),
        st.booleans(),
        ip_text(1024),
        ip_text(1024),
        ip_text(512),
        ip_text(1024),
    )
)
def test_ip_settings_survive_the_way_there_and_back(settings: IpSettings) -> None:
    message = protocol.ip_message(KvpOperation.SET_IP_INFO, settings)
    assert protocol.parse_ip(message) == settings
