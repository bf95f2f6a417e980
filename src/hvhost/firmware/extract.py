"""The uncompressed kernel out of a bzImage, made once and kept.

A bzImage decompresses itself in the guest, which takes seconds where the guest is emulated; here
it takes half a second, once. What only that once needs is imported then.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.firmware.image import KernelImage, open_kernel, parse_kernel
from hvhost.paths import cache_dir
from hvhost.units import MIB, format_size

logger = logging.getLogger(__name__)

MAXIMUM_SIZE = 512 * MIB
_LZMA_MEMORY_LIMIT = 512 * MIB
_ZSTD_WINDOW_LIMIT = 128 * MIB  # zstd --ultra -22, what Linux uses
_LZ4_BLOCK_SIZE = 8 * MIB  # fixed by the legacy format


def open_for_boot(path: Path) -> KernelImage:
    """The kernel at *path* in the form that boots fastest.

    A bzImage becomes its vmlinux, from the cache if it was seen before; one that cannot be
    extracted is returned as it is and decompresses itself in the guest.
    """
    image = open_kernel(path)
    if image.setup is None:
        return image
    try:
        vmlinux = open_kernel(cached_vmlinux(path, image))
        return vmlinux._replace(name=image.name, setup=image.setup)
    except (HvHostError, OSError) as error:
        logger.warning("%s boots compressed, which is slower: %s", path, error)
        return image


def cached_vmlinux(path: Path, image: KernelImage) -> Path:
    """Path of the vmlinux inside *image*, a bzImage opened from *path*; made if not in the cache.

    The cache is keyed by the bzImage's SHA-256, with a link for each file seen, so that a kernel
    seen before is not even read. :class:`HvHostError` if it cannot be extracted.
    """
    directory = cache_dir("vmlinux")
    status = path.stat()
    # The time of the last status change: unlike that of modification, builds cannot set it back.
    place = zlib.crc32(os.fsencode(path.absolute()))
    seen = directory / f"seen-{place:08x}-{status.st_size:x}-{status.st_ctime_ns:x}"
    if _is_kernel(seen):
        return seen
    import hashlib
    import tempfile

    target = directory / hashlib.sha256(image.data).hexdigest()
    with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as temporary:
        if not _is_kernel(target):
            new = Path(temporary, "vmlinux")
            new.write_bytes(extract_vmlinux(image))
            new.replace(target)
        link = Path(temporary, "seen")
        link.symlink_to(target.name)
        link.replace(seen)
    return seen


def _is_kernel(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        open_kernel(path)
    except HvHostError as error:
        logger.warning("a cached kernel is damaged and is made again: %s", error)
        return False
    return True


def extract_vmlinux(image: KernelImage) -> bytes:
    """Decompress the payload of the bzImage *image* and check that it is a kernel.

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
    except (zlib.error, OSError, EOFError, ValueError) as error:
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
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size)


def _lzma(payload: memoryview, size: int) -> bytes:
    import lzma

    return _lzma_family(payload, size, lzma.FORMAT_ALONE)


def _xz(payload: memoryview, size: int) -> bytes:
    import lzma

    return _lzma_family(payload, size, lzma.FORMAT_XZ)


def _lzma_family(payload: memoryview, size: int, container: int) -> bytes:
    import lzma

    try:
        decompressor = lzma.LZMADecompressor(container, memlimit=_LZMA_MEMORY_LIMIT)
        return decompressor.decompress(payload, size)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from None


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
        if len(block) < length:
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
