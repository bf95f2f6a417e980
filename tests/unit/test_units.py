from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.units import GIB, KIB, MIB, TIB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512 * MIB),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        (" 2 GiB ", 2 * GIB),
        ("2G", 2 * GIB),
        ("2gb", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("1T", TIB),
        ("64k", 64 * KIB),
        ("0.5K", 512),
        ("4096B", 4096),
        ("1 b", 1),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "-1",
        "1.",
        ".5G",
        "1 2",
        "1e3",
        "0",
        "0.0000001K",
        "1X",
        "1GG",
        "0x10",
        "1BB",
        "1IB",
        "1I",
        "B",
        "9" * 400,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(HvHostError, match=r"memory .* is not a size; write it like 512M or 2G"):
        parse_size(text, what="memory")


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_sentence(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except HvHostError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * MIB, "512 MiB"),
        (2 * GIB, "2 GiB"),
        (5 * GIB // 2, "2.5 GiB"),
        (3 * TIB, "3 TiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1023), st.sampled_from([KIB, MIB, GIB, TIB]))
def test_whole_units_are_exact(count: int, unit: int) -> None:
    assert parse_size(format_size(count * unit)) == count * unit


@given(st.integers(1, 1 << 50))
def test_rounding_is_to_a_tenth(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.05 + 1
