from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kernel_files import BzImage, Elf, Segment, note, pvh_note

from hvhost.errors import HvHostError
from hvhost.firmware.image import ImageKind, KernelImage, open_kernel, parse_kernel


def test_bzimage() -> None:
    data = BzImage(payload=b"payload", setup_sectors=0).build()
    image = parse_kernel(data, "vmlinuz")
    setup = image.setup
    assert image.kind is ImageKind.BZIMAGE
    assert setup is not None
    assert setup.protected_mode_offset == 5 * 512  # 0 sectors mean 4
    assert setup.protected_mode_size == 0x410
    assert setup.raw == data[0x1F1:0x26C]
    assert setup.is_64_bit
    assert (setup.load_address, setup.init_size) == (0x1000000, 0x200000)
    assert (setup.payload_offset, setup.payload_length) == (0x400, 7)
    assert (setup.initrd_address_max, setup.command_line_size) == (0x7FFFFFFF, 2047)
    assert image.has_linux_entry


def test_old_protocols_lack_fields() -> None:
    setup = parse_kernel(BzImage(version=0x206).build(), "old").setup
    assert setup is not None
    assert setup.load_address == 0x100000
    assert setup.init_size == setup.protected_mode_size
    assert not setup.is_64_bit
    assert setup.payload_length == 0


def test_fields_behind_the_header_are_not_read() -> None:
    setup = parse_kernel(BzImage(jump=0x3A, init_size=1 << 30).build(), "short").setup
    assert setup is not None
    assert (setup.load_address, setup.payload_length) == (0, 0)
    assert len(setup.raw) == 0x23C - 0x1F1


def test_32_bit_kernel() -> None:
    setup = parse_kernel(BzImage(xloadflags=0).build(), "pae").setup
    assert setup is not None
    assert not setup.is_64_bit


def test_initrd_limit_has_a_default() -> None:
    setup = parse_kernel(BzImage(initrd_address_max=0).build(), "old").setup
    assert setup is not None
    assert setup.initrd_address_max == 0x37FFFFFF


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (BzImage(jump=0x39), "setup header ends at 0x23b"),
        (BzImage(jump=0x8F), "setup header ends at 0x291"),
        (BzImage(boot_flag=0), "boot protocol"),
        (BzImage(version=0x205), "boot protocol 2.05 is too old"),
        (BzImage(loadflags=0), "zImage"),
        (BzImage(size_paragraphs=0), "cut short"),
        (BzImage(size_paragraphs=0x41), "cut short"),
        (BzImage(payload=b"x" * 16, payload_length=17), "payload lies outside"),
        (BzImage(payload_offset=0xFFFFFFFF, payload_length=2), "payload lies outside"),
    ],
)
def test_damaged_bzimage(wrong: BzImage, why: str) -> None:
    with pytest.raises(HvHostError, match=why):
        parse_kernel(wrong.build(), "vmlinuz")


def test_largest_setup_header_is_taken() -> None:
    setup = parse_kernel(BzImage(jump=0x8E).build(), "vmlinuz").setup
    assert setup is not None
    assert len(setup.raw) == 0x290 - 0x1F1


def test_bzimage_cut_inside_its_header() -> None:
    with pytest.raises(HvHostError, match="setup header ends"):
        parse_kernel(BzImage().build()[:0x26B], "vmlinuz")


def test_vmlinux() -> None:
    segments = [
        Segment(b"text" * 10, memory_size=100),
        Segment(b"", 0x1200000, memory_size=0),
        Segment(b"", 0x1300000, memory_size=50),
        Segment(b"not loaded", 0x1400000, kind=7),
        pvh_note(0x1000010),
    ]
    image = parse_kernel(Elf(segments).build(), "vmlinux")
    assert image.kind is ImageKind.ELF64
    assert image.setup is None
    assert (image.entry, image.pvh_entry) == (0x1000000, 0x1000010)
    text, bss = image.segments
    assert (text.address, text.memory_size, text.file_size) == (0x1000000, 100, 40)
    assert bytes(image.data[text.offset : text.offset + 40]) == b"text" * 10
    assert (bss.address, bss.memory_size, bss.file_size) == (0x1300000, 50, 0)
    assert image.has_linux_entry


def test_a_32_bit_vmlinux() -> None:
    elf = Elf.of_32_bits([Segment(b"text" * 10, memory_size=100), pvh_note(0x1000010)])
    image = parse_kernel(elf.build(), "vmlinux")
    assert image.kind is ImageKind.ELF32
    assert not image.is_64_bit
    assert (image.entry, image.pvh_entry, image.has_linux_entry) == (0x1000000, 0x1000010, True)
    (text,) = image.segments
    assert (text.address, text.memory_size, text.file_size) == (0x1000000, 100, 40)
    assert bytes(image.data[text.offset : text.offset + 40]) == b"text" * 10


def test_word_size_of_a_kernel() -> None:
    assert parse_kernel(Elf().build(), "vmlinux").is_64_bit
    assert parse_kernel(BzImage().build(), "vmlinuz").is_64_bit
    assert not parse_kernel(BzImage(xloadflags=0).build(), "vmlinuz").is_64_bit


def test_freebsd_has_a_virtual_entry_and_pvh() -> None:
    elf = Elf([Segment(b"btext", 0x200000), pvh_note(0x200000, width=8)], 0xFFFFFFFF80200000)
    image = parse_kernel(elf.build(), "kernel")
    assert not image.has_linux_entry
    assert image.pvh_entry == 0x200000


@pytest.mark.parametrize(
    ("notes", "entry"),
    [
        (note(b"GNU\0", 18, b"1234") + note(b"Xen\0", 18, b"\0\0\0\1"), 0x1000000),
        (note(b"Xen\0", 6, b"FreeBSD\0") + note(b"Xen\0", 18, b"\0\0\0\1"), 0x1000000),
        (note(b"abcde", 1, b"123456789") + note(b"Xen\0", 18, b"\0\0\0\1"), 0x1000000),
        (note(b"Xen\0", 18, b"\0\0\0\1\0\0\0\0"), 0x1000000),
        (note(b"Xen\0", 18, b"\0\0\0\1\1\0\0\0"), None),
        (note(b"Xen\0", 18, b"\0\0\0"), None),
        (note(b"Xen\0", 18, b"\0\0\0\1")[:-1], None),
        (struct.pack("<III", 0xFFFFFFF0, 4, 18) + b"Xen\0\0\0\0\1", None),
        (note(b"Xen\0", 18, b"\0\0\0\1")[:11], None),
    ],
)
def test_notes(notes: bytes, entry: int | None) -> None:
    elf = Elf([Segment(b"text" * 10), Segment(notes, 0, kind=4)])
    assert parse_kernel(elf.build(), "vmlinux").pvh_entry == entry


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Elf(file_class=1, header_offset=52), "ELF32 file for machine 62"),
        (Elf(machine=3), "ELF64 file for machine 3"),
        (Elf(file_class=3), "little-endian"),
        (Elf(byte_order=2), "little-endian"),
        (Elf(machine=183), "machine 183"),
        (Elf(kind=3), "fixed addresses"),
        (Elf(header_count=0), "0 program headers"),
        (Elf(header_count=129), "129 program headers"),
        (Elf(header_size=55), "of 55 bytes"),
        (Elf(header_offset=1 << 63), "program headers lie outside"),
        (Elf(header_count=5), "program headers lie outside"),
        (Elf([Segment(b"abc", memory_size=2)]), "impossible sizes"),
        (Elf([Segment(b"abc", (1 << 52) - 2)]), "impossible sizes"),
        (Elf([pvh_note()]), "nothing to load"),
        (Elf(entry=0x1000000 + 110), "entry point"),
        (Elf(entry=0xFFFFFF), "entry point"),
    ],
)
def test_damaged_elf(wrong: Elf, why: str) -> None:
    with pytest.raises(HvHostError, match=why):
        parse_kernel(wrong.build(), "vmlinux")


@pytest.mark.parametrize("length", [5, 63, 119, 120, 200])
def test_elf_cut_short(length: int) -> None:
    with pytest.raises(HvHostError, match=r"cut short|outside"):
        parse_kernel(Elf().build()[:length], "vmlinux")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "unknown data"),
        (b"hello, world", "unknown data"),
        (b"\x1f\x8b\x08" + bytes(600), "a gzip file"),
        (b"070701" + bytes(600), "an initramfs"),
        (b"!<arch>\ndebian-binary", "a Debian package"),
        (b"MZ" + bytes(1000), "EFI program"),
        (b"#!/bin/sh\n", "a script"),
    ],
)
def test_what_is_not_a_kernel_is_named(data: bytes, what: str) -> None:
    with pytest.raises(HvHostError, match=rf"^/boot/thing is not a Linux kernel: .*{what}"):
        parse_kernel(data, "/boot/thing")


def test_open_kernel(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    with pytest.raises(HvHostError, match=r"vmlinux cannot be read.*No such file"):
        open_kernel(path)
    path.touch()
    with pytest.raises(HvHostError, match="is empty"):
        open_kernel(path)
    path.write_bytes(Elf().build())
    assert open_kernel(path).name == str(path)
    with pytest.raises(HvHostError, match="cannot be read"):
        open_kernel(tmp_path)


def check_bounds(image: KernelImage) -> None:
    """What the loaders rely on."""
    size = len(image.data)
    for segment in image.segments:
        assert segment.offset + segment.file_size <= size
        assert segment.file_size <= segment.memory_size
        assert segment.address + segment.memory_size <= 1 << 52
    if setup := image.setup:
        assert 0 < setup.protected_mode_size <= size - setup.protected_mode_offset
        assert setup.payload_offset + setup.payload_length <= setup.protected_mode_size
        assert len(setup.raw) <= 0x290 - 0x1F1
    assert image.pvh_entry is None or image.pvh_entry < 1 << 32


VALID = [BzImage(payload=b"x" * 50).build(), Elf([Segment(b"abc" * 20), pvh_note()]).build()]


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 0x290), st.binary(min_size=1, max_size=8)), max_size=5),
    st.integers(0, 4000),
)
@example(VALID[1], [(32, b"\xff" * 8)], 4000)
def test_hostile_files(base: bytes, patches: list[tuple[int, bytes]], length: int) -> None:
    data = bytearray(base)
    for offset, patch in patches:
        data[offset : offset + len(patch)] = patch
    try:
        check_bounds(parse_kernel(data[:length], "hostile"))
    except HvHostError as error:
        assert str(error).startswith("hostile is not a Linux kernel: ")
