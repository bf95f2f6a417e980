"""The fuzz target itself, on mutations of valid kernels; a fuzzer goes further."""

from __future__ import annotations

import gzip

from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_files import BzImage, Elf, Segment, pvh_note

from simulated.image_target import fuzz_images

ELF = Elf([Segment(b"text" * 20, memory_size=4000), pvh_note()]).build()
FREEBSD = Elf([Segment(b"text" * 20, 0x200000), pvh_note(0x200000)], 1 << 63).build()
BZIMAGE = BzImage(payload=gzip.compress(ELF) + len(ELF).to_bytes(4, "little")).build()


@given(
    st.sampled_from([ELF, FREEBSD, BZIMAGE]),
    st.lists(st.tuples(st.integers(0, 3500), st.binary(min_size=1, max_size=8)), max_size=4),
    st.integers(0, 5000),
)
@settings(max_examples=200, deadline=None)
def test_no_file_causes_another_exception(
    base: bytes, patches: list[tuple[int, bytes]], length: int
) -> None:
    data = bytearray(base)
    for offset, patch in patches:
        data[offset : offset + len(patch)] = patch
    fuzz_images(bytes(data[:length]))
