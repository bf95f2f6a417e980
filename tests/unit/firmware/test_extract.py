from __future__ import annotations

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import lz4.block  # type: ignore[import-untyped]
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kernel_files import BzImage, Elf, Segment

from hvhost.errors import HvHostError
from hvhost.firmware import extract as extract_module
from hvhost.firmware.extract import MAXIMUM_SIZE, cached_vmlinux, extract_vmlinux, open_for_boot
from hvhost.firmware.image import ImageKind, KernelImage, open_kernel, parse_kernel

VMLINUX = Elf([Segment(bytes(range(256)) * 40, memory_size=20000)]).build()


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    result = b"\x02\x21\x4c\x18"
    for offset in range(0, len(data), block):
        packed = lz4.block.compress(data[offset : offset + block], store_size=False)
        result += len(packed).to_bytes(4, "little") + packed
    return result


def zstd(data: bytes) -> bytes:
    # As a pipe compresses: without the content's size in the frame.
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": zstd,
}
each_compressor = pytest.mark.parametrize("compression", COMPRESSORS)


def bzimage(payload: bytes, size: int | None = None) -> bytes:
    length = len(VMLINUX) if size is None else size
    return BzImage(payload=payload + length.to_bytes(4, "little")).build()


def extract(data: bytes) -> bytes:
    return extract_vmlinux(parse_kernel(data, "vmlinuz"))


@each_compressor
def test_extraction(compression: str) -> None:
    assert extract(bzimage(COMPRESSORS[compression](VMLINUX))) == VMLINUX


@each_compressor
def test_damaged_payload(compression: str) -> None:
    payload = bytearray(COMPRESSORS[compression](VMLINUX))
    del payload[len(payload) // 2 :]
    with pytest.raises(HvHostError, match=r"get it anew"):
        extract(bzimage(bytes(payload)))


@each_compressor
def test_result_must_have_the_size_it_claims(compression: str) -> None:
    with pytest.raises(HvHostError, match=r"get it anew"):
        extract(bzimage(COMPRESSORS[compression](VMLINUX), len(VMLINUX) + 1))


@each_compressor
def test_more_than_claimed_is_never_made(compression: str) -> None:
    """A small file that expands without end stops at the size it claims."""
    with pytest.raises(HvHostError):
        extract(bzimage(COMPRESSORS[compression](bytes(32 << 20)), 100))


def test_lz4_in_several_blocks() -> None:
    data = Elf([Segment(bytes(9 << 20))]).build()
    assert extract(bzimage(lz4_legacy(data), len(data))) == data


def test_lz4_blocks_without_content_end() -> None:
    empty = lz4.block.compress(b"", store_size=False)
    payload = b"\x02\x21\x4c\x18" + (len(empty).to_bytes(4, "little") + empty) * 3
    with pytest.raises(HvHostError, match="is empty"):
        extract(bzimage(payload))


def test_lz4_block_longer_than_the_payload() -> None:
    payload = lz4_legacy(VMLINUX)
    wrong = payload[:4] + (1 << 30).to_bytes(4, "little") + payload[8:]
    with pytest.raises(HvHostError, match="cut short"):
        extract(bzimage(wrong))


@pytest.mark.parametrize("size", [0, MAXIMUM_SIZE + 1])
def test_impossible_size(size: int) -> None:
    with pytest.raises(HvHostError, match="claims"):
        extract(bzimage(gzip.compress(VMLINUX), size))


def test_lzo_and_unknown_are_named() -> None:
    with pytest.raises(HvHostError, match="compressed with LZO"):
        extract(bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100)))
    with pytest.raises(HvHostError, match="unknown way"):
        extract(bzimage(b"ABCDEFGH"))


def test_payload_must_be_a_kernel() -> None:
    with pytest.raises(HvHostError, match="payload of vmlinuz is not a Linux kernel"):
        extract(bzimage(gzip.compress(b"x" * 1000), 1000))


def test_no_payload() -> None:
    with pytest.raises(HvHostError, match="no compressed payload"):
        extract(BzImage(version=0x207).build())
    with pytest.raises(HvHostError, match="no compressed payload"):
        extract(VMLINUX)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(HvHostError, match="needs the Python package zstandard"):
        extract(bzimage(zstd(VMLINUX)))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(COMPRESSORS["xz"](VMLINUX)))
    return path


def test_open_for_boot_gives_the_vmlinux_with_its_header(kernel: Path) -> None:
    image = open_for_boot(kernel)
    assert image.kind is ImageKind.ELF64
    assert bytes(image.data) == VMLINUX
    assert image.name == str(kernel)
    assert image.setup == open_kernel(kernel).setup


def count_extractions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []

    def count(image: KernelImage) -> bytes:
        made.append(image.name)
        return extract_vmlinux(image)

    monkeypatch.setattr(extract_module, "extract_vmlinux", count)
    return made


def test_a_kernel_is_extracted_once_wherever_it_lies(
    kernel: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = count_extractions(monkeypatch)
    path = cached_vmlinux(kernel, open_kernel(kernel))
    assert not caplog.records
    with monkeypatch.context() as patch:
        patch.delattr(hashlib, "sha256")  # the file's content is not asked for again
        assert cached_vmlinux(kernel, open_kernel(kernel)) == path
    copy = kernel.with_name("copy")
    copy.write_bytes(kernel.read_bytes())
    other = cached_vmlinux(copy, open_kernel(copy))
    assert other != path
    assert other.samefile(path)
    assert len(made) == 1
    assert not list(path.parent.glob(".new-*"))


def test_a_rebuilt_kernel_of_the_same_size_and_time_is_another(kernel: Path) -> None:
    kernel.write_bytes(bzimage(gzip.compress(VMLINUX, 0)))
    first = open_for_boot(kernel)
    before = kernel.stat()
    rebuilt = VMLINUX[:-1] + b"\0"
    new = kernel.with_name("new")
    new.write_bytes(bzimage(gzip.compress(rebuilt, 0)))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(kernel)
    assert kernel.stat().st_mtime_ns == before.st_mtime_ns
    assert kernel.stat().st_size == before.st_size
    assert bytes(first.data) == VMLINUX
    assert bytes(open_for_boot(kernel).data) == rebuilt


def test_a_damaged_entry_is_replaced(kernel: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cached_vmlinux(kernel, open_kernel(kernel))
    path.resolve().write_bytes(VMLINUX[:100])
    assert cached_vmlinux(kernel, open_kernel(kernel)).read_bytes() == VMLINUX
    assert "damaged" in caplog.text
    path.resolve().unlink()
    assert cached_vmlinux(kernel, open_kernel(kernel)).read_bytes() == VMLINUX


def test_failed_write_leaves_nothing(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        cached_vmlinux(kernel, open_kernel(kernel))
    assert list((kernel.parent / "cache" / "vmlinux").iterdir()) == []
    assert open_for_boot(kernel).kind is ImageKind.BZIMAGE


def test_exotic_kernels_boot_as_they_are(kernel: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel.write_bytes(bzimage(b"\x89LZO" + bytes(100)))
    with caplog.at_level(logging.WARNING):
        assert open_for_boot(kernel).kind is ImageKind.BZIMAGE
    assert "LZO" in caplog.text


def test_a_32_bit_kernel_is_extracted_too(kernel: Path) -> None:
    vmlinux = Elf.of_32_bits([Segment(b"text" * 9)]).build()
    payload = lzma.compress(vmlinux) + len(vmlinux).to_bytes(4, "little")
    kernel.write_bytes(BzImage(xloadflags=0, payload=payload).build())
    image = open_for_boot(kernel)
    assert (image.kind, image.is_64_bit) == (ImageKind.ELF32, False)
    assert bytes(image.data) == vmlinux


def test_plain_kernels_are_not_extracted(kernel: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernel.write_bytes(VMLINUX)
    assert open_for_boot(kernel).setup is None
    assert not caplog.records


@given(
    st.sampled_from(sorted(COMPRESSORS)),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_hostile_payloads(compression: str, patches: list[tuple[int, int]]) -> None:
    payload = bytearray(COMPRESSORS[compression](VMLINUX))
    for offset, value in patches:
        payload[offset % len(payload)] = value
    try:
        assert len(extract(bzimage(bytes(payload)))) == len(VMLINUX)
    except HvHostError as error:
        assert "vmlinuz" in str(error)
