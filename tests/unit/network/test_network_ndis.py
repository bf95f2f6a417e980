"""NDIS objects of a guest: what their sizes and offsets say is not believed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import RemoteProtocolError
from hvhost.network.ndis import (
    ReceiveScaling,
    merging_wanted,
    offload_capabilities,
    receive_scaling,
)

KEY = bytes(range(40))
NOW = ReceiveScaling((1, 0, 1, 0), b"k" * 40, 0x500)
HEAD = 40  # bytes of struct ndis_recv_scale_param


def scaling(
    table: tuple[int, ...] = (0, 1, 2, 3),
    key: bytes = KEY,
    *,
    flag: int = 0,
    hashinfo: int = 0x1701,
    table_size: int | None = None,
    table_offset: int = HEAD,
    key_size: int | None = None,
    key_offset: int | None = None,
) -> bytes:
    """``struct ndis_recv_scale_param`` with its table and key behind it."""
    size = 4 * len(table) if table_size is None else table_size
    head = struct.pack(
        "<BBHHHIHHIHHI12x",
        *(0x89, 2, HEAD, flag, 0, hashinfo, size, 0, table_offset),
        *(len(key) if key_size is None else key_size, 0),
        HEAD + 4 * len(table) if key_offset is None else key_offset,
    )
    return head + struct.pack(f"<{len(table)}I", *table) + key


def test_receive_scaling_takes_table_key_and_hashes() -> None:
    for table in ((3,), (0, 1), tuple(range(4)) * 32):
        assert receive_scaling(scaling(table), NOW, 4) == ReceiveScaling(table, KEY, 0x1700)
    assert receive_scaling(scaling(hashinfo=0x700), NOW, 4).hash_types == 0x700


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (0x2, ReceiveScaling((0, 1, 2, 3), KEY, 0x500)),
        (0x4, ReceiveScaling((1, 0, 1, 0), KEY, 0x1700)),
        (0x8, ReceiveScaling((0, 1, 2, 3), b"k" * 40, 0x1700)),
        (0xE, NOW),
        (0x10, ReceiveScaling(key=b"k" * 40)),
    ],
)
def test_what_is_said_to_be_unchanged_is(flag: int, expected: ReceiveScaling) -> None:
    assert receive_scaling(scaling(flag=flag), NOW, 4) == expected
    # Nor is it looked at.
    wrong = {
        0x2: scaling(flag=0x2, hashinfo=0x77),
        0x4: scaling(flag=0x4, table_size=3),
        0x8: scaling(flag=0x8, key_size=1),
        0xE: scaling(flag=0xE, hashinfo=0x77, table_size=3, key_size=1),
        0x10: scaling(flag=0x10, hashinfo=0x77, table_size=3, key_size=1),
    }
    assert receive_scaling(wrong[flag], NOW, 4) == expected


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (scaling()[: HEAD - 1], "cut it short"),
        (scaling(hashinfo=0x1702), "hash function 0x2 "),
        (scaling(key_size=39), "hash key of 39 bytes"),
        (scaling(key_size=41), "hash key of 41 bytes"),
        (scaling(key_offset=HEAD - 1), "hash key of 40 bytes at 39 "),
        (scaling(key_offset=HEAD + 17), "hash key of 40 bytes at 57 "),
        (scaling(key_offset=0xFFFFFFFF), "hash key of 40 bytes at 4294967295 "),
        (scaling(table_size=0), "table of 0 bytes"),
        (scaling(table_size=2), "table of 2 bytes"),
        (scaling(table_size=12), "table of 12 bytes"),
        (scaling((0,) * 256), "table of 1024 bytes"),
        (scaling(table_offset=HEAD - 4), "table of 16 bytes at 36 "),
        (scaling(table_offset=HEAD + 41), "table of 16 bytes at 81 "),
        (scaling((0, 4)), "names channel 4 of 4"),
    ],
)
def test_receive_scaling_that_cannot_be(data: bytes, complaint: str) -> None:
    with pytest.raises(RemoteProtocolError, match=complaint):
        receive_scaling(data, NOW, 4)


def test_scaling_needs_a_key_once() -> None:
    with pytest.raises(RemoteProtocolError, match="without a hash key"):
        receive_scaling(scaling(flag=0x8), ReceiveScaling(), 4)


@given(
    st.binary(max_size=60),
    st.sampled_from([0, 0x2, 0x4, 0x8, 0x10]),
    st.integers(0, 600),
    st.integers(0, 200),
    st.integers(38, 42),
    st.integers(0, 200),
)
def test_any_parameters_scale_or_are_a_violation(
    rest: bytes, flag: int, table_size: int, table_offset: int, key_size: int, key_offset: int
) -> None:
    data = scaling(
        key=rest,
        flag=flag,
        table_size=table_size,
        table_offset=table_offset,
        key_size=key_size,
        key_offset=key_offset,
    )
    try:
        found = receive_scaling(data, NOW, 4)
    except RemoteProtocolError:
        return
    assert len(found.key) == 40 and all(0 <= channel < 4 for channel in found.table)


@pytest.mark.parametrize(("revision", "as_revision"), [(0, 1), (1, 1), (3, 3), (4, 3), (255, 3)])
def test_capabilities_for_revisions_nobody_knows(revision: int, as_revision: int) -> None:
    answer = offload_capabilities(revision, merging=True)
    assert answer == offload_capabilities(as_revision, merging=True)
    assert answer[1] == as_revision and int.from_bytes(answer[2:4], "little") == len(answer)


def test_offload_parameters_that_switch_merging() -> None:
    head = bytes((0x80, 3, 32, 0)) + bytes(18)
    assert merging_wanted(head + b"\2\2") is True
    assert merging_wanted(head + b"\0\2") is True
    assert merging_wanted(head + b"\1\1") is False
    assert merging_wanted(head + b"\0\0") is None
    assert merging_wanted(head[:15]) is None, "as of NDIS 6.0"
    with pytest.raises(RemoteProtocolError, match="cut it short"):
        merging_wanted(head[:14])
