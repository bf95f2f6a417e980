from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_elf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvhost.guests import elf
from hvhost.guests.elf import ElfError


def test_a_section_is_found_by_its_whole_name() -> None:
    data = tiny_elf.with_section(".modinfo", b"content")
    assert elf.section(data, ".modinfo") == b"content"
    assert elf.section(data, ".modinf") is None
    assert elf.section(data, ".modinfo2") is None


def test_what_a_program_needs() -> None:
    data = tiny_elf.program("/lib64/ld-linux-x86-64.so.2", ("libc.so.6", "libm.so.6"))
    assert elf.linkage(data) == elf.Linkage(
        "/lib64/ld-linux-x86-64.so.2", ("libc.so.6", "libm.so.6")
    )
    assert elf.linkage(tiny_elf.program()) == elf.Linkage(None, ())


def test_a_real_program_needs_the_c_library() -> None:
    found = elf.linkage(Path("/bin/ls").resolve().read_bytes())
    assert "libc.so.6" in found.needed
    assert found.interpreter is not None
    assert Path(found.interpreter).exists()


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ" * 100, b"\x7fELF\x03\x01" + bytes(60)])
def test_what_is_no_elf_file_is_refused(data: bytes) -> None:
    with pytest.raises(ElfError):
        elf.linkage(data)
    with pytest.raises(ElfError):
        elf.section(data, ".modinfo")


def test_big_endian_is_refused() -> None:
    data = bytearray(tiny_elf.program())
    data[5] = 2
    with pytest.raises(ElfError, match="little-endian"):
        elf.linkage(bytes(data))


def test_a_file_that_only_goes_on_like_elf_is_refused() -> None:
    for data in (tiny_elf.program(needed=("libc.so.6",)), tiny_elf.kernel_module(depends="a")):
        other = b"\x7fELG" + data[4:]
        with pytest.raises(ElfError, match="not a little-endian ELF file"):
            elf.linkage(other)
        with pytest.raises(ElfError, match="not a little-endian ELF file"):
            elf.section(other, ".modinfo")


def test_a_program_without_sections_has_none_whatever_else_it_says() -> None:
    data = bytearray(tiny_elf.program())
    assert elf.section(bytes(data), ".modinfo") is None
    data[24:32] = (0x401000).to_bytes(8, "little")  # e_entry, where section 0's offset would be
    assert elf.section(bytes(data), ".modinfo") is None


def test_what_follows_the_end_of_the_dynamic_section_does_not_count() -> None:
    data = tiny_elf.program(needed=("liba.so", "libb.so"))
    second, strings, end = (struct.pack("<q", tag) for tag in (1, 5, 0))
    start = data.index(struct.pack("<qQ", 1, 9))
    moved = data[start + 16 : start + 48] + data[start : start + 16]
    assert (moved[:8], moved[16:24], moved[32:40]) == (strings, end, second)
    assert elf.linkage(data[:start] + moved + data[start + 48 :]).needed == ("liba.so",)


@pytest.mark.parametrize("make", [tiny_elf.program, lambda: tiny_elf.kernel_module(depends="a")])
def test_every_truncation_is_an_error_or_harmless(make: object) -> None:
    data = make()  # type: ignore[operator]
    for size in range(len(data)):
        for read in (elf.linkage, lambda d: elf.section(d, ".modinfo")):
            with contextlib.suppress(ElfError):
                read(data[:size])


def test_a_section_beyond_the_file_is_an_error_not_a_shorter_one() -> None:
    data = bytearray(tiny_elf.with_section(".modinfo", b"x" * 100))
    size_at = len(data) - 64 + 32
    data[size_at : size_at + 8] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(ElfError, match="cut short"):
        elf.section(bytes(data), ".modinfo")


def test_strings_outside_every_segment_are_an_error() -> None:
    data = tiny_elf.program(needed=("libc.so.6",)).replace(
        (0x400000 + 64 + 112).to_bytes(8, "little"), (0x900000).to_bytes(8, "little")
    )
    with pytest.raises(ElfError, match="outside its segments"):
        elf.linkage(data)


def test_a_name_beyond_the_file_is_an_error() -> None:
    data = tiny_elf.program(needed=("libc.so.6",))
    for far in (1 << 20, 1 << 63, (1 << 64) - 1):
        entry = (1).to_bytes(8, "little")
        changed = data.replace(entry + (1).to_bytes(8, "little"), entry + far.to_bytes(8, "little"))
        assert changed != data
        with pytest.raises(ElfError, match="cut short"):
            elf.linkage(changed)


@settings(max_examples=400)
@given(st.data())
def test_changed_files_raise_nothing_else(data: st.DataObject) -> None:
    content = bytearray(tiny_elf.program("/lib/ld.so", ("liba.so", "libb.so")))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(6, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ElfError):
        elf.linkage(bytes(content))
    with contextlib.suppress(ElfError):
        elf.section(bytes(content), ".modinfo")


def test_this_interpreter_is_readable() -> None:
    assert elf.section(Path(sys.executable).resolve().read_bytes(), ".dynstr")


def test_modules_of_32_bits_are_read(tmp_path: Path) -> None:
    source = tmp_path / "m.c"
    source.write_text('char m[] __attribute__((section(".modinfo"))) = "depends=a";\n')
    subprocess.run(["gcc", "-m32", "-c", "-o", str(tmp_path / "m.o"), str(source)], check=True)
    data = (tmp_path / "m.o").read_bytes()
    assert data[4] == 1
    assert elf.section(data, ".modinfo") == b"depends=a\0"
    assert elf.linkage(data) == elf.Linkage(None, ())
