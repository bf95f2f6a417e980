from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.chipset import aml
from hvhost.errors import LocalProtocolError


def read_package_length(data: bytes) -> tuple[int, int]:
    """(length, bytes it takes), as ACPI 6.5, 20.2.4 says a reader does it."""
    extra = data[0] >> 6
    if not extra:
        return data[0] & 0x3F, 1
    return data[0] & 0xF | int.from_bytes(data[1 : 1 + extra], "little") << 4, 1 + extra


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (0x100000000, "0e0000000001000000"),
    ],
)
def test_integers_are_shortest(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_out_of_range(value: int) -> None:
    with pytest.raises(LocalProtocolError):
        aml.integer(value)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_HID", b"_HID"),
        ("COM", b"COM_"),
        ("\\_SB", b"\\_SB_"),
        ("^^A", b"^^A___"),
        ("\\_SB.VMOD", b"\\\x2e_SB_VMOD"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name(path, aml.integer(0)) == b"\x08" + encoded + b"\0"


@pytest.mark.parametrize(
    "path", ["", "1ABC", "ABCDE", "abc", "A..B", "A.\\B", "A\n", ".".join(["A"] * 256)]
)
def test_bad_names(path: str) -> None:
    with pytest.raises(LocalProtocolError):
        aml.name(path, aml.integer(0))


def test_eisa_id_as_in_the_specification() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    for wrong in ("PNP501", "pnp0501", "PNP05G1"):
        with pytest.raises(LocalProtocolError):
            aml.eisa_id(wrong)


def test_strings() -> None:
    assert aml.string("VMBus") == b"\x0dVMBus\0"
    for wrong in ("a\0b", "ü"):
        with pytest.raises(LocalProtocolError):
            aml.string(wrong)


def test_terms() -> None:
    assert aml.package(aml.integer(5), aml.integer(0)).hex() == "1205020a0500"
    assert aml.scope("\\_SB", b"") == b"\x10\x06\\_SB_"
    assert aml.device("D", b"") == b"\x5b\x82\x05D___"
    assert aml.method("M", aml.return_(aml.integer(1))) == b"\x14\x08M___\x00\xa4\x01"
    assert aml.method("M", arguments=2, serialized=True) == b"\x14\x06M___\x0a"
    with pytest.raises(LocalProtocolError):
        aml.method("M", arguments=8)
    with pytest.raises(LocalProtocolError):
        aml.package(*[aml.integer(0)] * 256)


@given(st.one_of(st.integers(0, 80), st.integers(4000, 4200), st.integers(1 << 20, 1 << 20 | 64)))
def test_package_lengths_count_themselves(size: int) -> None:
    term = aml.scope("\\_SB", bytes(size))
    length, _ = read_package_length(term[1:])
    assert length == len(term) - 1
    # One byte less would not have held it.
    assert read_package_length(term[1:])[1] == 1 + (length > 0x3F) + (length > 0xFFF) + (
        length > 0xFFFFF
    )


def test_too_long_a_term() -> None:
    with pytest.raises(LocalProtocolError):
        aml.scope("\\_SB", bytes(1 << 28))


def test_small_resources() -> None:
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.irq_no_flags(4).hex() == "221000"
    assert aml.irq(9, level=True, active_low=True, shared=True).hex() == "23000218"
    assert aml.irq(5).hex() == "23200001"
    with pytest.raises(LocalProtocolError):
        aml.irq_no_flags(16)
    assert aml.resource_template(aml.irq_no_flags(4)).hex() == "11080a052210007900"


def test_memory_windows() -> None:
    low = aml.dword_memory(range(0xF8000000, 0xFEC00000), producer=True)
    assert low.hex() == "871700000c03" + "00000000000000f8ffffbffe000000000000c006"
    high = aml.qword_memory(range(0xFE0000000, 0x1000000000), producer=False)
    assert high[:6].hex() == "8a2b00000d03"
    assert len(high) == 3 + 0x2B
    assert int.from_bytes(high[14:22], "little") == 0xFE0000000
    assert int.from_bytes(high[22:30], "little") == 0xFFFFFFFFF
    assert int.from_bytes(high[38:46], "little") == 0x20000000


@pytest.mark.parametrize(
    "window", [range(0), range(5, 5), range(5, 3), range(0, 8, 2), range(1 << 32, 2 << 32)]
)
def test_bad_windows(window: range) -> None:
    with pytest.raises(LocalProtocolError):
        aml.dword_memory(window, producer=True)
