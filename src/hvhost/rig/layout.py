"""The rig's shared memory, as ``layout.h`` defines it; read from that file, so that the VMM and
the agent cannot disagree."""

from __future__ import annotations

import re
from pathlib import Path

HEADER = Path(__file__).with_name("layout.h")
AGENT = Path(__file__).with_name("agent.c")

_values = {
    name: int(value, 0)
    for name, value in re.findall(
        r"^#define (\w+) (0x[0-9a-fA-F]+|\d+)$", HEADER.read_text(), re.MULTILINE
    )
}


def __getattr__(name: str) -> int:
    try:
        return _values[name]
    except KeyError:
        raise AttributeError(f"layout.h defines no {name}") from None


CONTROL_AREA = 128 << 20
"""Bytes at the start of the shared memory kept for the header and the control blocks."""


def control_offset(session: int) -> int:
    """Where the control block of a session starts."""
    return 4096 + session * _values["CONTROL_SIZE"]
