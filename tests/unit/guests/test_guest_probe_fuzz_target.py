"""The body of ``fuzz/fuzz_probe.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.guests.probe_protocol import MessageType
from simulated.probe_target import fuzz_probe

ANSWER = st.builds(
    lambda kind, request, body: b"\1" + struct.pack("<BI", kind, request) + body,
    st.sampled_from(MessageType) | st.integers(0, 255),
    st.integers(0, 0xFFFFFFFF),
    st.binary(max_size=8) | st.binary(max_size=120),
)


@settings(max_examples=150)
@given(
    st.lists(ANSWER | st.binary(max_size=250), max_size=12).map(
        lambda pieces: b"".join(bytes([len(piece)]) + piece for piece in pieces)
    )
)
def test_probe(data: bytes) -> None:
    fuzz_probe(data)
