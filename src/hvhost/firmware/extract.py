"""The uncompressed kernel out of a bzImage, made once and kept.

A bzImage decompresses itself in the guest, which takes seconds where the guest is emulated; here
it takes half a second, once. ``lz4`` and ``zstandard`` are imported only when a kernel needs them.
"""

from __future__ import annotations

import bz2
import hashlib
import logging
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.firmware.image import ImageKind, KernelImage, open_kernel, parse_kernel
from hvhost.paths import cache_dir
from hvhost.units import MIB, format_size

logger = logging.getLogger(__name__)

MAXIMUM_SIZE = 512 * MIB
_LZMA_MEMORY_LIMIT = 512 * MIB
_ZSTD_WINDOW_LIMIT = 128 * MIB  # zstd --ultra -22, what Linux uses
_LZ4_BLOCK_SIZE = 8 * MIB  # fixed by the legacy format


def open_for_boot(path: Path) -> KernelImage:
    """The kernel at *path* in the form that boots fastest.

    A 64-bit bzImage becomes its vmlinux, from the cache if it was seen before; one that cannot be
    extracted is returned as it is and decompresses itself in the guest.
    """
    image = open_kernel(path)
    if image.kind is not ImageKind.BZIMAGE or image.setup is None or not image.setup.is_64_bit:
        return image
    try:
        return replace(open_kernel(cached_vmlinux(image)), name=image.name, setup=image.setup)
    except (HvHostError, OSError) as error:
        logger.warning("%s boots compressed, which is slower: %s", path, error)
        return image


def cached_vmlinux(image: KernelImage) -> Path:
    """Path of the vmlinux inside the bzImage *image*; made if it is not in the cache.

    The cache is keyed by the bzImage's SHA-256. :class:`HvHostError` if it cannot be extracted.
    """
    directory = cache_dir("vmlinux")
    path = directory / hashlib.sha256(image.data).hexdigest()
    if path.exists():
        try:
            open_kernel(path)
        except HvHostError as error:
            logger.warning("cached kernel is damaged and is made again: %s", error)
        else:
            return path
    vmlinux = extract_vmlinux(image)
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(vmlinux)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def extract_vmlinux(image: KernelImage) -> bytes:
    """Decompress the payload of the bzImage *image* and check that it is an ELF64 kernel.

    :class:`HvHostError` if there is no payload, its compression is unknown, or it is damaged.
    """
    setup = image.setup
    if setup is None or not setup.payload_length:
        raise HvHostError(f"{image.name} carries no compressed payload; boot it as it is.")
    start = setup.protected_mode_offset + setup.payload_offset
    payload = image.data[start : start + setup.payload_length]
    # Linux appends the size of the result to every payload (gzip has it there by itself).
    size = int.from_bytes(payload[-4:], "little")
    if not 0 < size <= MAXIMUM_SIZE:
        raise HvHostError(
            f"the payload of {image.name} claims {format_size(size)}; it is damaged, get it anew."
        )
    decompress = _find_decompressor(payload, image.name)
    try:
        vmlinux = decompress(payload, size)
    except ImportError as error:
        raise HvHostError(
            f"{image.name} needs the Python package {error.name}; install it."
        ) from None
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, RuntimeError) as error:
        raise HvHostError(
            f"the payload of {image.name} does not decompress ({error}); get it anew."
        ) from None
    if len(vmlinux) != size:
        raise HvHostError(
            f"the payload of {image.name} decompressed to {len(vmlinux)} bytes instead of {size}; "
            "it is damaged, get it anew."
        )
    parse_kernel(vmlinux, f"the payload of {image.name}")
    return vmlinux


def _find_decompressor(payload: memoryview, name: str) -> Callable[[memoryview, int], bytes]:
    head = bytes(payload[:6])
    for magic, decompress in _DECOMPRESSORS:
        if head.startswith(magic):
            return decompress
    what = "LZO" if head.startswith(b"\x89LZO") else f"an unknown way ({head.hex(' ')})"
    raise HvHostError(
        f"{name} is compressed with {what}, which cannot be extracted; boot it as it is."
    )


def _gzip(payload: memoryview, size: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, size)


def _bzip2(payload: memoryview, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, size)


def _lzma(payload: memoryview, size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY_LIMIT)
    return decompressor.decompress(payload, size)


def _xz(payload: memoryview, size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_LIMIT)
    return decompressor.decompress(payload, size)


def _zstd(payload: memoryview, size: int) -> bytes:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_LIMIT)
    try:
        with decompressor.stream_reader(payload) as reader:
            return reader.read(size)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _lz4(payload: memoryview, size: int) -> bytes:
    """The legacy format: blocks of up to 8 MiB, each after its compressed size."""
    import lz4.block  # type: ignore[import-untyped]

    parts = []
    offset, left = 4, size
    while left > 0:
        length = int.from_bytes(payload[offset : offset + 4], "little")
        block = payload[offset + 4 : offset + 4 + length]
        if not length or len(block) < length:
            raise ValueError(f"LZ4 block at {offset} is cut short")
        try:
            part = lz4.block.decompress(block, uncompressed_size=min(left, _LZ4_BLOCK_SIZE))
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from None
        parts.append(part)
        offset += 4 + length
        left -= len(part)
        if not part:
            raise ValueError(f"LZ4 block at {offset} is empty")
    return b"".join(parts)


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[memoryview, int], bytes]], ...] = (
    (b"\x1f\x8b", _gzip),
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _xz),
    (b"\x5d\0\0", _lzma),
    (b"\x02\x21\x4c\x18", _lz4),
    (b"\x28\xb5\x2f\xfd", _zstd),
)
