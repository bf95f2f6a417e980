from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import pytest
import zstandard

from hvhost.guests.compression import decompress

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("data", [b"", b"x" * 100_000])
def test_it_comes_back_as_it_was(suffix: str, data: bytes) -> None:
    assert decompress(PACKERS[suffix](data), suffix) == data


@pytest.mark.parametrize("suffix", PACKERS)
def test_cut_short_or_changed_is_an_error_not_less_data(suffix: str) -> None:
    packed = PACKERS[suffix](bytes(range(256)) * 10)
    for size in range(len(packed)):
        with pytest.raises(ValueError):
            decompress(packed[:size], suffix)
    with pytest.raises(ValueError):
        decompress(b"garbage garbage", suffix)


def test_any_other_suffix_is_taken_as_it_is() -> None:
    assert decompress(b"plain", ".ko") == b"plain"
