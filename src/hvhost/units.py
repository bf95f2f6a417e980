"""Sizes as people write them."""

from __future__ import annotations

import re

from hvhost.errors import HvHostError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_FACTORS = {"": MIB, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes for ``512M``, ``2G``, ``1.5GiB``, ``4096B``; a bare number means MiB, as in virsh.

    :class:`HvHostError` for what is no size, zero included.
    """
    match = re.fullmatch(
        r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(B|[KMGT]?)(?:(?<=[KMGT])I?B)?\s*", text.upper()
    )
    if match is None or (size := int(float(match[1]) * _FACTORS[match[2]])) <= 0:
        raise HvHostError(f"{what} {text!r} is not a size; write it like 512M or 2G.")
    return size


def format_size(size: int) -> str:
    """For people, to a tenth: ``format_size(2 << 30)`` is ``"2 GiB"``."""
    for factor, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {name}" if value == int(value) else f"{value:.1f} {name}"
    return f"{size} B"
