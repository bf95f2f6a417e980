"""``hvhost disk``'s work on image files: what it refuses, and what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hvhost.errors import DiskError, HvHostError
from hvhost.storage import operations
from hvhost.storage.foreign import convert_foreign, foreign_format
from hvhost.storage.images import (
    check_parent,
    create_disk,
    differencing_options,
    format_of,
    open_disk,
    open_single,
)
from hvhost.storage.operations import NewImage
from hvhost.storage.vhd_create import VhdOptions
from hvhost.storage.vhdx_create import VhdxOptions

MIB = 1 << 20


def nothing(done: int, total: int) -> None: ...


def put(path: Path, offset: int, data: bytes) -> None:
    disk = open_disk(path)
    disk.writev(offset, [memoryview(data)])
    disk.close()


def get(path: Path, offset: int, length: int) -> bytes:
    data = bytearray(length)
    disk = open_disk(path, read_only=True)
    disk.readv(offset, [memoryview(data)])
    disk.close()
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "new", "said"),
    [
        ("a.img", NewImage(fixed=True), "is raw, which has no blocks and no kinds"),
        ("a.img", NewImage(block_size=MIB), "is raw, which has no blocks and no kinds"),
        ("a.img", NewImage(logical_sector_size=4096), "only have sectors of 512 bytes"),
        ("a.vhd", NewImage(logical_sector_size=4096), "only have sectors of 512 bytes"),
        ("a.qcow2", NewImage(), "does not say its format"),
        ("a", NewImage(), "does not say its format"),
    ],
)
def test_images_that_their_format_cannot_be(
    tmp_path: Path, name: str, new: NewImage, said: str
) -> None:
    with pytest.raises(HvHostError, match=said):
        operations.create(tmp_path / name, 4 * MIB, new)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "new", "kind", "block"),
    [
        ("a.img", NewImage(), "raw", None),
        ("a.vhd", NewImage(), "dynamic", 2 * MIB),
        ("a.vhd", NewImage(fixed=True), "fixed", None),
        ("a.vhdx", NewImage(block_size=MIB), "dynamic", MIB),
        ("a.vhdx", NewImage(fixed=True), "fixed", 32 * MIB),
    ],
)
def test_what_images_say_they_are(
    tmp_path: Path, name: str, new: NewImage, kind: str, block: int | None
) -> None:
    path = tmp_path / name
    made = operations.create(path, 4 * MIB, new)
    assert (made.type, made.block_size) == (kind, block)
    assert made.format == ("raw" if kind == "raw" else path.suffix[1:])
    assert operations.check(path).clean
    if made.format != "raw":
        child = operations.create_differencing(path.with_name(f"child{path.suffix}"), path)
        assert (child.type, child.parent) == ("differencing", str(path))


def test_a_child_is_of_its_parent_s_format(tmp_path: Path) -> None:
    create_disk(tmp_path / "a.vhdx", VhdxOptions(4 * MIB)).close()
    for name in ("b.vhd", "b.img"):
        with pytest.raises(HvHostError, match=r"must be of its parent's format; name it \*.vhdx"):
            operations.create_differencing(tmp_path / name, tmp_path / "a.vhdx")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_name_that_no_child_could_write_down(tmp_path: Path) -> None:
    """The path of a parent is written as Windows writes it."""
    base = tmp_path / "a\\b.vhdx"
    create_disk(base, VhdxOptions(4 * MIB)).close()
    with pytest.raises(HvHostError, match="a backslash in its name; rename it first"):
        operations.create_differencing(tmp_path / "c.vhdx", base)
    assert list(tmp_path.iterdir()) == [base]


PARENTS: list[tuple[str, Callable[[], VhdxOptions | VhdOptions]]] = [
    ("vhdx", lambda: VhdxOptions(4 * MIB)),
    ("vhd", lambda: VhdOptions(4 * MIB)),
    ("vhd", lambda: VhdOptions(4 * MIB, fixed=True)),
]


@pytest.mark.parametrize(("suffix", "options"), PARENTS)
def test_only_the_parent_itself_fits(
    tmp_path: Path, suffix: str, options: Callable[[], VhdxOptions | VhdOptions]
) -> None:
    base, other = tmp_path / f"base.{suffix}", tmp_path / f"other.{suffix}"
    path = tmp_path / f"child.{suffix}"
    create_disk(base, options()).close()
    create_disk(other, options()).close()
    create_disk(path, differencing_options(path, base)).close()
    child = open_single(path, format_of(path), read_only=True)
    for name, fits in ((base.name, True), (other.name, False)):
        parent = open_disk(tmp_path / name, read_only=True)
        if fits:
            check_parent(child, parent)
        else:
            with pytest.raises(DiskError, match=f"does not fit its parent .*{name}"):
                check_parent(child, parent)
        parent.close()
    for name in ("stranger.vhdx", "stranger.vhd", "stranger.img"):
        operations.create(tmp_path / name, MIB, NewImage())
        stranger = open_disk(tmp_path / name, read_only=True)
        with pytest.raises(DiskError, match="does not fit its parent"):
            check_parent(child, stranger)
        stranger.close()
    with pytest.raises(DiskError, match="does not fit its parent what it names"):
        check_parent(child, None)
    child.close()
    base.write_bytes(other.read_bytes())
    with pytest.raises(DiskError, match="is another or has changed since"):
        open_disk(path, read_only=True)


def test_a_fixed_vhd_is_nobody_s_child(tmp_path: Path) -> None:
    options = VhdOptions(MIB, fixed=True)
    disks = [create_disk(tmp_path / f"{name}.vhd", options) for name in ("a", "b")]
    with pytest.raises(DiskError, match="does not fit its parent"):
        check_parent(disks[0], disks[1])  # type: ignore[arg-type] # none of them is raw
    for disk in disks:
        disk.close()


@pytest.mark.parametrize("name", ["a.img", "a.vhd"])
def test_only_a_vhdx_is_compacted(tmp_path: Path, name: str) -> None:
    operations.create(tmp_path / name, 4 * MIB, NewImage())
    with pytest.raises(HvHostError, match="is no VHDX; convert it"):
        operations.compact(tmp_path / name, nothing)


@pytest.mark.parametrize("suffix", ["vhdx", "vhd"])
def test_what_has_no_parent_is_not_merged(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    operations.create(path, 4 * MIB, NewImage())
    with pytest.raises(HvHostError, match="has no parent; there is nothing to merge"):
        operations.merge(path, nothing)
    assert path.exists()


def test_merging_gives_back_what_the_child_gave_back(tmp_path: Path) -> None:
    base, child = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    create_disk(base, VhdxOptions(8 * MIB, block_size=2 * MIB)).close()
    put(base, 0, b"x" * 8 * MIB)
    create_disk(child, differencing_options(child, base)).close()
    disk = open_disk(child)
    disk.unmap(2 * MIB, 4 * MIB)
    disk.close()
    before = base.stat().st_blocks
    operations.merge(child, nothing, keep=True)
    assert base.stat().st_blocks <= before - (4 * MIB - 65536) // 512
    assert get(base, 0, 8 * MIB) == b"x" * 2 * MIB + bytes(4 * MIB) + b"x" * 2 * MIB
    assert child.exists()


def test_a_size_below_the_last_partition(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    operations.create(path, 8 * MIB, NewImage())
    table = bytearray(512)
    table[446:462] = bytes((0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x18, 0, 0))  # 1 to 4 MiB
    table[510:] = b"\x55\xaa"
    put(path, 0, bytes(table))
    with pytest.raises(HvHostError, match=rf"partitions up to 4 MiB \({4 * MIB} bytes\)"):
        operations.resize(path, 4 * MIB - 512)
    assert operations.resize(path, 4 * MIB).size == 4 * MIB
    assert operations.resize(path, MIB, force=True).size == MIB
    # A larger one too is nobody's loss, though it is too small still.
    assert operations.resize(path, 2 * MIB).size == 2 * MIB


# --- other formats ------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(1020))
    return path


def play_qemu_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A program of that name that notes its words and ends with *script*; the file of words."""
    programs, noted = tmp_path / "programs", tmp_path / "noted"
    programs.mkdir()
    program = programs / "qemu-img"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {noted}\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return noted


def test_an_image_is_not_written_over(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = play_qemu_img(tmp_path, monkeypatch, "exit 0")
    there = tmp_path / "there.vhdx"
    there.write_bytes(b"precious")
    with pytest.raises(HvHostError, match="exists already; choose another name"):
        convert_foreign(source, "qcow2", there)
    assert there.read_bytes() == b"precious" and not noted.exists()


@pytest.mark.parametrize(
    ("script", "said"), [("echo first >&2; echo no room >&2", "no room"), ("", "it said nothing")]
)
def test_half_an_image_does_not_stay(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    new = tmp_path / "new.vhdx"
    noted = play_qemu_img(tmp_path, monkeypatch, f"echo half > {new}; {script}\nexit 1")
    with pytest.raises(HvHostError, match=rf"could not convert .*\({said}\); check the image"):
        convert_foreign(source, "qcow2", new)
    assert not new.exists() and f"file:{source}" in noted.read_text().splitlines()


def test_without_the_program_that_converts(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(HvHostError, match="run `apt-get install qemu-utils`"):
        convert_foreign(source, "qcow2", tmp_path / "new.vhdx")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.qcow2", "qcow2"), ("a.QCOW", "qcow2"), ("a", "qcow2"), ("a.img", None), ("a.vhdx", None)],
)
def test_whose_format_is_asked_of_the_file(tmp_path: Path, name: str, kind: str | None) -> None:
    """Of our own formats, a guest may have written anything to where a format begins."""
    path = tmp_path / name
    path.write_bytes(b"QFI\xfb")
    assert foreign_format(path) == kind
    assert foreign_format(tmp_path / "nowhere") is None and foreign_format(tmp_path) is None


def test_a_vmdk_is_known_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"KDMV" + bytes(1020))
    with pytest.raises(HvHostError, match=r"is a vmdk image; make a VHDX of it"):
        operations.info(path)
