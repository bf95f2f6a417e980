"""A writer of ACPI machine language: just the terms our DSDT uses, each a function to bytes.

The functions nest as ASL does::

    scope("\\_SB", device("COM1", name("_HID", eisa_id("PNP0501"))))

Source: ACPI specification 6.5, chapter 20 (AML encoding) and 6.4 (resource descriptors). Malformed
arguments are bugs of ours: :class:`hvhost.errors.LocalProtocolError`.
"""

from __future__ import annotations

import re
import struct

from hvhost.errors import LocalProtocolError

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA = re.compile(r"[A-Z]{3}[0-9A-F]{4}")


def _name_string(path: str) -> bytes:
    prefix = re.match(r"\\?\^*", path)
    assert prefix is not None  # the pattern matches the empty string
    segments = path[prefix.end() :].split(".")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments) or len(segments) > 255:
        raise LocalProtocolError(f"{path!r} is not an ACPI name; use up to four of A-Z, 0-9, _.")
    encoded = "".join(segment.ljust(4, "_") for segment in segments).encode()
    if len(segments) == 2:
        encoded = b"\x2e" + encoded
    elif len(segments) > 2:
        encoded = b"\x2f" + bytes([len(segments)]) + encoded
    return prefix[0].encode() + encoded


def _package_length(body: bytes) -> bytes:
    """*body* with the length that counts itself put before it (20.2.4)."""
    for extra in range(4):
        length = len(body) + 1 + extra
        if not extra:
            if length < 0x40:
                return bytes([length]) + body
        elif length < 1 << 4 + 8 * extra:
            head = bytes([extra << 6 | length & 0xF])
            return head + (length >> 4).to_bytes(extra, "little") + body
    raise LocalProtocolError(f"an AML term of {len(body)} bytes is too long; split it.")


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer of up to 64 bits."""
    if value in (0, 1):
        return bytes([value])
    for code, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([code]) + value.to_bytes(size, "little")
    raise LocalProtocolError(f"{value} does not fit an AML integer; use 0 to 2^64 - 1.")


def string(text: str) -> bytes:
    """A string of ASCII characters without NUL."""
    if "\0" in text or not text.isascii():
        raise LocalProtocolError(f"{text!r} is not an AML string; use ASCII without NUL.")
    return b"\x0d" + text.encode() + b"\0"


def eisa_id(text: str) -> bytes:
    """``PNP0501`` as the compressed integer that ``EisaId`` makes of it."""
    if not _EISA.fullmatch(text):
        raise LocalProtocolError(f"{text!r} is not an EISA id; write it like PNP0501.")
    letters = [ord(letter) - 0x40 for letter in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """``Buffer``: bytes of a known length."""
    return b"\x11" + _package_length(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """``Package (elements)``; :class:`LocalProtocolError` for more than 255 of them."""
    if len(elements) > 255:
        raise LocalProtocolError(f"{len(elements)} elements are too many for an AML package.")
    return b"\x12" + _package_length(bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """``Name (path, value)``."""
    return b"\x08" + _name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """``Scope (path) {terms}``."""
    return b"\x10" + _package_length(_name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """``Device (path) {terms}``."""
    return b"\x5b\x82" + _package_length(_name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes, arguments: int = 0, serialized: bool = False) -> bytes:
    """``Method (path, arguments) {terms}``; :class:`LocalProtocolError` beyond 7 arguments."""
    if not 0 <= arguments <= 7:
        raise LocalProtocolError(f"an AML method has up to 7 arguments, not {arguments}.")
    flags = bytes([arguments | serialized << 3])
    return b"\x14" + _package_length(_name_string(path) + flags + b"".join(terms))


def return_(value: bytes) -> bytes:
    """``Return (value)``."""
    return b"\xa4" + value


def resource_template(*descriptors: bytes) -> bytes:
    """A buffer of resource descriptors with its end tag; checksum 0 says "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(first: int, length: int, *, alignment: int = 1) -> bytes:
    """``IO (Decode16, first, first, alignment, length)``."""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, alignment, length)


def irq_no_flags(*lines: int) -> bytes:
    """``IRQNoFlags () {lines}``: edge triggered, active high, exclusive."""
    return struct.pack("<BH", 0x22, _irq_mask(lines))


def irq(*lines: int, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``IRQ (Edge|Level, ActiveHigh|ActiveLow, Exclusive|Shared) {lines}``."""
    flags = (not level) | active_low << 3 | shared << 4
    return struct.pack("<BHB", 0x23, _irq_mask(lines), flags)


def _irq_mask(lines: tuple[int, ...]) -> int:
    if not all(0 <= line <= 15 for line in lines):
        raise LocalProtocolError(f"{lines} are not ISA interrupt lines; use 0 to 15.")
    return sum(1 << line for line in set(lines))


def dword_memory(window: range, *, producer: bool) -> bytes:
    """``DWordMemory`` over *window*, fixed, positive decode, cacheable, read and write."""
    return _address_space(0x87, "<5I", window, producer)


def qword_memory(window: range, *, producer: bool) -> bytes:
    """``QWordMemory`` over *window*, fixed, positive decode, cacheable, read and write."""
    return _address_space(0x8A, "<5Q", window, producer)


def _address_space(tag: int, layout: str, window: range, producer: bool) -> bytes:
    if window.step != 1 or not window.start < window.stop:
        raise LocalProtocolError(f"{window} is not a memory window; give its first and last byte.")
    fixed_both_ends = 0x0C
    cacheable_read_write = 0x03
    flags = fixed_both_ends | (not producer)
    length = window.stop - window.start
    try:
        addresses = struct.pack(layout, 0, window.start, window.stop - 1, 0, length)
    except struct.error:
        raise LocalProtocolError(
            f"{window} does not fit its descriptor; use QWordMemory."
        ) from None
    body = bytes([0, flags, cacheable_read_write]) + addresses
    return bytes([tag]) + len(body).to_bytes(2, "little") + body
