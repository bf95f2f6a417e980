"""Lists of buffers, and the checks that every disk makes before it moves data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.storage.bounds import check_range, check_writable
from hvhost.storage.buffers import clear, section, total, zeros


@given(st.lists(st.binary(max_size=9)), st.integers(0, 40), st.integers(0, 40))
def test_a_section_is_what_lies_there_and_no_empty_piece(
    pieces: list[bytes], start: int, length: int
) -> None:
    buffers = [memoryview(piece) for piece in pieces]
    found = section(buffers, start, length)
    assert b"".join(found) == b"".join(pieces)[start : start + length]
    assert all(found)
    assert total(buffers) == len(b"".join(pieces))


def test_a_section_may_begin_and_end_in_any_buffer() -> None:
    buffers = [memoryview(text) for text in (b"abc", b"defg", b"hi")]
    assert section(buffers, 4, 2) == [b"ef"]
    assert section(buffers, 1, 4) == [b"bc", b"de"]
    assert section(buffers, 0, 3) == [b"abc"], "one piece: none behind it"


def test_more_than_there_are_zeros_at_hand() -> None:
    size = (5 << 19) + 7
    data = bytearray(b"\xff" * size)
    clear([memoryview(data)])
    assert data == bytes(size)
    assert b"".join(zeros(size)) == bytes(size)


@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (0, -1), (3584, 513), (4097, 0)])
def test_ranges_that_are_not_on_the_disk(offset: int, length: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"{length} bytes at {offset} were asked of a"):
        check_range(4096, offset, length)


def test_ranges_on_the_disk_by_length_and_by_buffers() -> None:
    assert check_range(4096, 3584, 512) == 512
    assert check_range(4096, 0, [memoryview(bytes(512)), memoryview(bytes(3584))]) == 4096
    with pytest.raises(LocalProtocolError, match="4097 bytes at 0"):
        check_range(4096, 0, [memoryview(bytes(512)), memoryview(bytes(3585))])


def test_a_disk_that_is_only_read() -> None:
    check_writable(False, "disk.vhdx")
    with pytest.raises(HvHostError, match="is open for reading only") as caught:
        check_writable(True, "disk.vhdx")
    assert not isinstance(caught.value, LocalProtocolError)
