"""Key-value pair exchange: messages and their limits.

Source: ``linux/hyperv.h`` and ``uapi/linux/hyperv.h`` (``hv_kvp_msg``, ``hv_kvp_ip_msg``),
``drivers/hv/hv_kvp.c`` for what guests answer. Strings are UTF-16, ended by a zero; every message
has the full size of its structure, and an answer is the request with its fields filled in. No I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final

from hvhost.errors import HvHostError, RemoteProtocolError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.services.protocol import IcVersion, integration_offer
from hvhost.wire import U8, Record

KVP_VERSIONS: Final = (IcVersion(1, 0), IcVersion(3, 0), IcVersion(4, 0))
KVP_OFFER: Final = integration_offer(
    "kvp", "a9a0f4e7-5a45-4d96-b827-8a841e8c03e6", "242ff919-07db-4180-9c2e-b86cb68c8c55"
)

# Bytes, with the zero at the end (HV_KVP_EXCHANGE_MAX_*_SIZE).
MAX_KEY_SIZE: Final = 512
MAX_VALUE_SIZE: Final = 2048

HV_S_CONT: Final = 0x80070103
HV_GUID_NOTFOUND: Final = 0x80041002
HV_INVALIDARG: Final = 0x80070057

# Code units of struct hv_kvp_ipaddr_value's strings, with the zero at the end.
_MAX_ADAPTER_ID_SIZE: Final = 128
_MAX_IP_ADDR_SIZE: Final = 1024
_MAX_GATEWAY_SIZE: Final = 512


class KvpOperation(IntEnum):
    """``enum hv_kvp_exchg_op``."""

    GET = 0
    SET = 1
    DELETE = 2
    ENUMERATE = 3
    GET_IP_INFO = 4
    SET_IP_INFO = 5


class RegistryType(IntEnum):
    """``value_type`` of an item."""

    SZ = 1
    U32 = 4
    U64 = 8


@dataclass(frozen=True, slots=True)
class KvpItem:
    """One pair; numbers are given as their decimal digits."""

    key: str
    value: str


# hv_kvp_hdr, then the body: hv_kvp_msg_enumerate is the longest but for IP settings.
_HEADER = struct.Struct("<BBH")
_VALUE = struct.Struct(f"<III{MAX_KEY_SIZE}s{MAX_VALUE_SIZE}s")
_INDEX = struct.Struct("<I")
_DELETE = struct.Struct(f"<I{MAX_KEY_SIZE}s")
_SIZE = _HEADER.size + _INDEX.size + _VALUE.size


@dataclass(frozen=True, slots=True)
class IpMessage(Record):  # struct hv_kvp_ip_msg
    """All of ``hv_kvp_ipaddr_value``; strings are UTF-16."""

    operation: U8
    pool: U8
    adapter_id: Annotated[bytes, "256s"]
    address_family: U8
    dhcp_enabled: U8
    ip_addr: Annotated[bytes, "2048s"]
    sub_net: Annotated[bytes, "2048s"]
    gate_way: Annotated[bytes, "1024s"]
    dns_addr: Annotated[bytes, "2048s"]


def _encode(text: str, size: int, what: str) -> bytes:
    """*text* with its zero; :class:`HvHostError` if that takes more than *size* bytes."""
    if "\0" in text:
        raise HvHostError(f"The {what} {text[:40]!r} holds a zero character; leave it out.")
    try:
        data = text.encode("utf-16-le") + b"\0\0"
    except UnicodeEncodeError:
        raise HvHostError(f"The {what} {text[:40]!r} is no valid Unicode text.") from None
    # A guest keeps UTF-8 in a field of the same size.
    longest = max(len(data), len(text.encode()) + 1)
    if longest > size:
        raise HvHostError(
            f"The {what} {text[:40]!r} takes {longest} bytes; at most {size} fit, make it shorter."
        )
    return data


def _decode(data: bytes) -> str:
    """Text up to its first zero; what is no valid UTF-16 becomes U+FFFD."""
    even = data[: len(data) & ~1]
    return even.decode("utf-16-le", "replace").split("\0", 1)[0]


def encode_key(key: str) -> bytes:
    """A key as it goes into a message; :class:`HvHostError` if it is empty or too long.

    Two units stay free, as guests want it: they would cut the key when they send it back.
    """
    if not key:
        raise HvHostError("A key must have a name; give one.")
    return _encode(key, MAX_KEY_SIZE - 2, "key")


def encode_value(value: str) -> bytes:
    """A value as it goes into a message; :class:`HvHostError` if it is too long."""
    return _encode(value, MAX_VALUE_SIZE - 2, "value")


def _item(key: bytes = b"", value: bytes = b"") -> bytes:
    return _VALUE.pack(RegistryType.SZ, len(key), len(value), key, value)


def get_message(pool: KvpPool, key: str) -> bytes:
    """Ask for one value."""
    body = _item(encode_key(key))
    return (_HEADER.pack(KvpOperation.GET, pool.number, 0) + body).ljust(_SIZE, b"\0")


def set_message(pool: KvpPool, key: str, value: str) -> bytes:
    """Add an item, or change its value."""
    body = _item(encode_key(key), encode_value(value))
    return (_HEADER.pack(KvpOperation.SET, pool.number, 0) + body).ljust(_SIZE, b"\0")


def delete_message(pool: KvpPool, key: str) -> bytes:
    """Remove an item."""
    name = encode_key(key)
    body = _DELETE.pack(len(name), name)
    return (_HEADER.pack(KvpOperation.DELETE, pool.number, 0) + body).ljust(_SIZE, b"\0")


def enumerate_message(pool: KvpPool, index: int) -> bytes:
    """Ask for the item at *index*, counted from 0."""
    return _HEADER.pack(KvpOperation.ENUMERATE, pool.number, 0) + _INDEX.pack(index) + _item()


def ip_message(operation: KvpOperation, settings: IpSettings) -> bytes:
    """Ask for an adapter's addresses, or set them; :class:`HvHostError` for too long a text."""
    longest = 2 * _MAX_IP_ADDR_SIZE
    return IpMessage(
        operation,
        0,
        _encode(settings.adapter, 2 * _MAX_ADAPTER_ID_SIZE, "adapter"),
        settings.family,
        settings.dhcp,
        _encode(settings.addresses, longest, "list of addresses"),
        _encode(settings.subnets, longest, "list of subnets"),
        _encode(settings.gateways, 2 * _MAX_GATEWAY_SIZE, "list of gateways"),
        _encode(settings.dns_servers, longest, "list of name servers"),
    ).pack()


def _parse(data: bytes, offset: int) -> KvpItem:
    if len(data) < offset + _VALUE.size:
        raise RemoteProtocolError(
            f"a key-value pair was answered with {len(data)} bytes, of {offset + _VALUE.size}."
        )
    kind, key_size, value_size, key, value = _VALUE.unpack_from(data, offset)
    if key_size > MAX_KEY_SIZE or value_size > MAX_VALUE_SIZE:
        raise RemoteProtocolError(
            f"a key-value pair claims a key of {key_size} and a value of {value_size} bytes."
        )
    name = _decode(key[:key_size])
    if kind == RegistryType.SZ:
        return KvpItem(name, _decode(value[:value_size]))
    if kind == RegistryType.U32:
        return KvpItem(name, str(int.from_bytes(value[:4], "little")))
    if kind == RegistryType.U64:
        return KvpItem(name, str(int.from_bytes(value[:8], "little")))
    raise RemoteProtocolError(f"a key-value pair has a value of unknown type {kind}.")


def parse_get(data: bytes) -> KvpItem:
    """The item in the answer to :func:`get_message`; :class:`RemoteProtocolError` if there is none.

    Linux up to at least 6.1 does not tell its daemon how long a value may be and sends back an
    empty one: find an item by enumeration where the value counts.
    """
    return _parse(data, _HEADER.size)


def parse_enumerate(data: bytes) -> KvpItem:
    """The item in the answer to :func:`enumerate_message`; as :func:`parse_get`."""
    return _parse(data, _HEADER.size + _INDEX.size)


def parse_ip(data: bytes) -> IpSettings:
    """The answer to GET_IP_INFO; :class:`RemoteProtocolError` if it is cut short."""
    message = IpMessage.unpack(data)
    return IpSettings(
        adapter=_decode(message.adapter_id),
        family=message.address_family,
        dhcp=bool(message.dhcp_enabled),
        addresses=_decode(message.ip_addr),
        subnets=_decode(message.sub_net),
        gateways=_decode(message.gate_way),
        dns_servers=_decode(message.dns_addr),
    )
