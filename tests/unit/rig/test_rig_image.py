"""What the rig's archive is made of."""

from __future__ import annotations

import logging

import pytest

from hvhost.rig.image import bear_accessed_pdpt, without_signature

BEFORE, AFTER = b"\x48\x8b\x8b\x88\x08\x00\x00", b"\x48\x85\xd1\x0f\x85\xc9\x00\x00\x00"


@pytest.mark.parametrize("opcode", [b"\x48\x0d", b"\x48\x81\xc9", b"\x49\x81\xcc"])
def test_kvm_bears_the_accessed_bit(opcode: bytes) -> None:
    """It is bit 5 of the mask; the others, 1, 2 and 6 to 8, stay reserved."""
    kvm = BEFORE + opcode + b"\xe6\x01\0\0" + AFTER
    assert bear_accessed_pdpt(kvm) == BEFORE + opcode + b"\xc6\x01\0\0" + AFTER


def test_a_signature_that_fits_no_more_is_taken_off() -> None:
    """Linux refuses a module whose signature is wrong, and takes one that has none."""
    kvm = BEFORE + b"\x48\x81\xc9\xe6\x01\0\0" + AFTER
    signature = b"PKCS#7" * 50
    trailer = bytes(8) + len(signature).to_bytes(4, "big") + b"~Module signature appended~\n"
    assert bear_accessed_pdpt(kvm + signature + trailer) == bear_accessed_pdpt(kvm)
    assert without_signature(kvm) == kvm


@pytest.mark.parametrize(
    "kvm",
    [
        b"",
        BEFORE + b"\x0f\x85\xe6\x01\0\0" + AFTER,  # a jump of as many bytes
        2 * (b"\x48\x81\xc9\xe6\x01\0\0" + AFTER),
    ],
)
def test_another_kvm_is_left_alone(kvm: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert bear_accessed_pdpt(kvm) == kvm
    assert "32-bit guests will not start" in caplog.text
