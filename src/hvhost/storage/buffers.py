"""Lists of memoryviews, as vectored calls take them."""

from __future__ import annotations

from collections.abc import Sequence

_ZEROS = memoryview(bytes(1 << 20))


def total(buffers: Sequence[memoryview]) -> int:
    """Bytes in all *buffers*."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


def section(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """*length* bytes of *buffers* from *start* on, without a copy."""
    found: list[memoryview] = []
    for buffer in buffers:
        if length <= 0:
            break
        if start >= len(buffer):
            start -= len(buffer)
            continue
        part = buffer[start : start + length]
        found.append(part)
        length -= len(part)
        start = 0
    return found


def clear(buffers: Sequence[memoryview]) -> None:
    """Fill *buffers* with zeros."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROS)):
            length = min(len(_ZEROS), len(buffer) - start)
            buffer[start : start + length] = _ZEROS[:length]


def zeros(length: int) -> list[memoryview]:
    """*length* zero bytes as buffers to write, all the same memory."""
    whole, rest = divmod(length, len(_ZEROS))
    return [_ZEROS] * whole + ([_ZEROS[:rest]] if rest else [])


def only_zeros(data: bytes | bytearray | memoryview) -> bool:
    """Whether *data* has nothing but zeros."""
    return bytes(data) == bytes(len(data))
