"""The body of ``fuzz/fuzz_storage.py``, with hypothesis in atheris's place."""

from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.storage.scsi import OpCode
from simulated.storage_targets import fuzz_storage

CDB = st.builds(
    lambda code, rest: bytes((code,)) + rest,
    st.sampled_from([int(code) for code in OpCode]),
    st.binary(min_size=15, max_size=15) | st.just(bytes(15)),
)
COMMAND = st.builds(
    lambda place, cdb, length: bytes((place << 1,)) + cdb + struct.pack("<H", length),
    st.integers(0, 2),
    CDB,
    st.sampled_from([0, 8, 255, 512, 2048, 4096, 65535]),
)
PACKET = st.builds(
    lambda operation, rest: b"\1" + struct.pack("<III", operation, 1, 0) + rest,
    st.integers(0, 14),
    st.binary(max_size=52),
)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1),
    st.lists(COMMAND | COMMAND | PACKET | st.binary(max_size=60), max_size=12),
)
def test_storage(first: int, pieces: list[bytes]) -> None:
    fuzz_storage(bytes([first]) + b"".join(bytes([len(piece)]) + piece for piece in pieces))
