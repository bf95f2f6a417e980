"""The compressions that packages and kernel modules use, undone in memory."""

from __future__ import annotations

import gzip
import lzma
import zlib


def decompress(data: bytes, suffix: str) -> bytes:
    """``data`` decompressed as its file's ``suffix`` says; any other suffix means uncompressed.

    Raises ValueError when the data is damaged or cut short.
    """
    try:
        if suffix == ".xz":
            return lzma.decompress(data)
        if suffix == ".gz" and data:  # to gzip, an empty file is a valid one without members
            return gzip.decompress(data)
    except (lzma.LZMAError, EOFError, OSError, zlib.error) as error:
        raise ValueError(str(error)) from error
    if suffix == ".gz":
        raise ValueError("the data is empty")
    if suffix == ".zst":
        import zstandard  # only here: most trees do not need it

        decompressor = zstandard.ZstdDecompressor().decompressobj()
        try:
            content = decompressor.decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
        if not decompressor.eof:
            raise ValueError("the data is cut short")
        return content
    return data
