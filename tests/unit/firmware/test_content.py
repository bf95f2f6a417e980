from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.errors import HvHostError
from hvhost.firmware.content import FileContent, copy
from hvhost.firmware.image import open_kernel, parse_kernel


@given(st.binary(max_size=64), st.integers(0, 64), st.integers(0, 64))
def test_a_file_copies_as_its_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(data)
    content = FileContent(path)
    assert len(content) == len(data)
    offset = min(offset, len(data))
    size = min(size, len(data) - offset)
    for source in (content, data, bytearray(data), memoryview(data)):
        target = bytearray(b"\xee" * (size + 2))
        copy(source, memoryview(target)[1 : size + 1], offset)
        assert target == b"\xee" + data[offset : offset + size] + b"\xee"


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(b"x" * 100)
    content = FileContent(path)
    path.write_bytes(b"x" * 99)
    with pytest.raises(HvHostError, match="initrd became shorter while it was read"):
        copy(content, memoryview(bytearray(100)))


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    content = FileContent(path)
    descriptor = content.fileno()
    os.fstat(descriptor)
    del content
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError):
        FileContent(tmp_path / "none")


def test_a_kernel_is_copied_from_its_file(tmp_path: Path) -> None:
    from kernel_files import Elf

    path = tmp_path / "vmlinux"
    path.write_bytes(Elf().build())
    opened = open_kernel(path)
    assert opened.content is opened.file
    parsed = parse_kernel(path.read_bytes(), "vmlinux")
    assert parsed.content is parsed.data
    segment = opened.segments[0]
    copies = [bytearray(segment.file_size) for _ in range(2)]
    for image, target in zip((opened, parsed), copies, strict=True):
        copy(image.content, memoryview(target), segment.offset)
    assert copies[0] == copies[1] != bytes(segment.file_size)
