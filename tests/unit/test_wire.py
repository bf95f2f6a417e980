from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.wire import I32, U8, U16, U32, U64, BigEndianRecord, Bytes6, Guid, Record


@dataclass(frozen=True, slots=True)
class Example(Record):
    kind: U8
    padding: U8
    count: U16
    length: U32
    offset: U64
    error: I32
    address: Bytes6
    instance: Guid


@dataclass(frozen=True, slots=True)
class Small(Record):
    value: U16 = 7


@dataclass(frozen=True, slots=True)
class Turned(BigEndianRecord):
    value: U16
    longer: U32


RECORDS = st.builds(
    Example,
    st.integers(0, 2**8 - 1),
    st.integers(0, 2**8 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(-(2**31), 2**31 - 1),
    st.binary(min_size=6, max_size=6),
    st.uuids(),
)
SIZE = 1 + 1 + 2 + 4 + 8 + 4 + 6 + 16


def test_sizes_are_those_of_the_documents() -> None:
    assert Example.wire_size() == SIZE, "no padding but what is declared"
    assert Small.wire_size() == 2


def test_the_other_byte_order() -> None:
    assert Turned(0x0102, 0x03040506).pack() == bytes(range(1, 7))
    assert Turned.unpack(bytes(range(1, 7))) == Turned(0x0102, 0x03040506)


@given(RECORDS, st.binary(max_size=20), st.binary(max_size=20))
def test_round_trip_anywhere_in_a_buffer(record: Example, before: bytes, after: bytes) -> None:
    data = record.pack()
    assert len(data) == SIZE
    for buffer in (before + data + after, memoryview(bytearray(before + data + after))):
        assert Example.unpack(buffer, len(before)) == record


@given(RECORDS, st.integers(-3, SIZE + 3), st.integers(-SIZE - 3, SIZE + 3))
def test_short_buffers_are_the_senders_fault(record: Example, length: int, offset: int) -> None:
    data = record.pack()[: max(length, 0)]
    if offset == 0 and len(data) == SIZE:
        assert Example.unpack(data, offset) == record
        return
    with pytest.raises(RemoteProtocolError, match=f"Example needs {SIZE} bytes at offset {offset}"):
        Example.unpack(data, offset)


@pytest.mark.parametrize("offset", [-1, -2, -100])
def test_negative_offsets_are_not_from_the_end(offset: int) -> None:
    with pytest.raises(RemoteProtocolError):
        Small.unpack(b"\1\2" * 100, offset)


def test_guids_are_mixed_endian() -> None:
    guid = uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
    data = Example(0, 0, 0, 0, 0, 0, bytes(6), guid).pack()
    assert data[-16:] == bytes.fromhex("394f1657159178 4eab55382f3bd5422d".replace(" ", ""))


def test_bytes_are_little_endian() -> None:
    assert Small(0x1234).pack() == b"\x34\x12"
    assert Small().pack() == b"\x07\x00"


def test_values_that_do_not_fit() -> None:
    with pytest.raises(struct.error):
        Small(1 << 16).pack()
