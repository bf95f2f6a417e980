"""Independent witnesses: qemu-img and dissect.hypervisor, on our images and on qemu-img's."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dissect.hypervisor.disk.vhd import VHD
from dissect.hypervisor.disk.vhdx import VHDX

from hvhost.storage.disk import Disk
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.operations import NewImage, compact, convert, merge, resize
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_create import VhdxOptions

MIB = 1 << 20
SIZE = 24 * MIB + 4096
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


def qemu_img(*words: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"qemu-img {words}: {done.stdout} {done.stderr}"
    return done.stdout


def nothing(done: int, total: int) -> None:
    assert 0 <= done <= total


def content(disk: Disk) -> bytes:
    data = bytearray(disk.size)
    disk.readv(0, [memoryview(data)])
    return bytes(data)


def content_of(path: Path) -> bytes:
    disk = open_disk(path, read_only=True)
    try:
        return content(disk)
    finally:
        disk.close()


def scribble(disk: Disk, seed: int, align: int = 4096) -> None:
    """Data here and there, some of it unmapped again."""
    chance = random.Random(seed)
    for _ in range(12):
        offset = chance.randrange(disk.size // align) * align
        data = chance.randbytes(min(disk.size - offset, chance.choice([align, 65536, 3 * MIB])))
        disk.writev(offset, [memoryview(data)])
    disk.unmap(2 * MIB, 3 * MIB)
    disk.unmap(9 * MIB + align, 2 * align)


def qemu_sees(path: Path, driver: str, raw: Path) -> bytes:
    """What qemu-img reads from an image."""
    qemu_img("convert", "-f", driver, "-O", "raw", path, raw)
    return raw.read_bytes()


def same(one: bytes, other: bytes) -> bool:
    return hashlib.sha256(one).digest() == hashlib.sha256(other).digest()


NEW_IMAGES = [
    ("a.vhdx", NewImage()),
    ("a.vhdx", NewImage(fixed=True)),
    ("a.vhdx", NewImage(block_size=MIB)),
    ("a.vhdx", NewImage(block_size=256 * MIB)),
    ("a.vhd", NewImage()),
    ("a.vhd", NewImage(fixed=True)),
]


@pytest.mark.parametrize(("name", "new"), NEW_IMAGES)
def test_qemu_reads_what_we_wrote(tmp_path: Path, name: str, new: NewImage) -> None:
    path = tmp_path / name
    driver = {".vhdx": "vhdx", ".vhd": "vpc"}[path.suffix]
    disk = create_disk(path, new.options(path, SIZE))
    scribble(disk, 1)
    expected = content(disk)
    disk.close()
    if driver == "vhdx":
        qemu_img("check", "-f", driver, path)
    described = json.loads(qemu_img("info", "--output", "json", "-f", driver, path))
    assert described["virtual-size"] == SIZE
    assert same(qemu_sees(path, driver, tmp_path / "raw"), expected)
    resize(path, SIZE + 40 * MIB)
    assert same(qemu_sees(path, driver, tmp_path / "raw"), expected + bytes(40 * MIB))


def test_qemu_replays_our_log(tmp_path: Path) -> None:
    """The image of a process that was killed: its log is in use, its table not yet in place."""
    path, copy = tmp_path / "a.vhdx", tmp_path / "b.vhdx"
    disk = create_disk(path, VhdxOptions(SIZE, block_size=MIB))
    assert isinstance(disk, VhdxDisk)
    scribble(disk, 2)
    disk.flush()
    expected = content(disk)
    image = bytearray(path.read_bytes())
    bat = disk.layout.bat
    image[bat.file_offset : bat.file_offset + 4096] = bytes(4096)
    copy.write_bytes(image)
    disk.close()
    again = tmp_path / "c.vhdx"
    shutil.copy(copy, again)
    qemu_img("check", "-f", "vhdx", "-r", "all", copy)
    assert same(qemu_sees(copy, "vhdx", tmp_path / "raw"), expected)
    assert same(content_of(again), expected), "and so do we, reading only"
    assert again.read_bytes() == bytes(image), "which changed nothing"


QEMU_OPTIONS = [
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "subformat=fixed,block_size=16M,log_size=2M"),
    ("vpc", "subformat=dynamic,force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
]


@pytest.mark.parametrize(("driver", "options"), QEMU_OPTIONS)
def test_we_read_and_change_what_qemu_wrote(tmp_path: Path, driver: str, options: str) -> None:
    raw = tmp_path / "a.img"
    disk = create_disk(raw, SIZE)
    scribble(disk, 3)
    expected = content(disk)
    disk.close()
    path = tmp_path / ("a.vhdx" if driver == "vhdx" else "a.vhd")
    qemu_img("convert", "-f", "raw", "-O", driver, "-o", options, raw, path)
    assert same(content_of(path), expected)
    disk = open_disk(path)
    scribble(disk, 4)
    disk.resize(SIZE + 5 * MIB)
    scribble(disk, 5)
    expected = content(disk)
    disk.close()
    if driver == "vhdx":
        qemu_img("check", "-f", driver, path)
    assert same(qemu_sees(path, driver, tmp_path / "raw"), expected)


def test_conversion_and_compare(tmp_path: Path) -> None:
    source = tmp_path / "a.img"
    disk = create_disk(source, SIZE)
    scribble(disk, 6)
    disk.close()
    for name, driver in (("b.vhdx", "vhdx"), ("b.vhd", "vpc"), ("c.img", "raw")):
        convert(source, tmp_path / name, NewImage(), nothing)
        qemu_img("compare", "-f", "raw", "-F", driver, source, tmp_path / name)


def test_compaction(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    disk = create_disk(path, VhdxOptions(SIZE, block_size=MIB))
    scribble(disk, 7)
    disk.writev(0, [memoryview(bytes([1]) * (20 * MIB))])
    disk.writev(0, [memoryview(bytes(8 * MIB))])
    disk.unmap(12 * MIB, 2 * MIB)
    expected = content(disk)
    disk.close()
    before = path.stat().st_size
    compact(path, nothing)
    assert path.stat().st_size <= before - 10 * MIB
    qemu_img("check", "-f", "vhdx", path)
    assert same(qemu_sees(path, "vhdx", tmp_path / "raw"), expected)


def dissect_sees(path: Path) -> bytes:
    with path.open("rb") as file:
        disk: Any = VHDX(path) if path.suffix == ".vhdx" else VHD(file)
        return bytes(disk.read(disk.size))


@pytest.mark.parametrize(("name", "new"), [*NEW_IMAGES, ("a.vhdx", NewImage(False, MIB, 4096))])
def test_dissect_reads_what_we_wrote(tmp_path: Path, name: str, new: NewImage) -> None:
    path = tmp_path / name
    disk = create_disk(path, new.options(path, SIZE))
    scribble(disk, 8)
    expected = content(disk)
    disk.close()
    assert same(dissect_sees(path), expected)


@pytest.mark.parametrize("sector", [512, 4096])
def test_dissect_reads_our_chains(tmp_path: Path, sector: int) -> None:
    base, middle, leaf = (tmp_path / name for name in ("base.vhdx", "middle.vhdx", "leaf.vhdx"))
    # dissect.hypervisor misreads runs that begin inside a byte of a parent's sector bitmap.
    align = 8 * sector
    disk = create_disk(base, NewImage(logical_sector_size=sector).options(base, SIZE))
    scribble(disk, 9, align)
    disk.close()
    contents = []
    for seed, path, parent in ((10, middle, base), (11, leaf, middle)):
        disk = create_disk(path, differencing_options(path, parent))
        scribble(disk, seed, align)
        contents.append(content(disk))
        disk.close()
    assert same(dissect_sees(middle), contents[0])
    assert same(dissect_sees(leaf), contents[1])
    assert same(content_of(leaf), contents[1])
    merge(leaf, nothing)
    assert not leaf.exists()
    assert same(dissect_sees(middle), contents[1])
    merge(middle, nothing)
    assert same(dissect_sees(base), contents[1])
    if sector == 512:  # qemu-img knows no other
        assert same(qemu_sees(base, "vhdx", tmp_path / "raw"), contents[1])


def test_a_chain_of_vhd(tmp_path: Path) -> None:
    base, leaf = tmp_path / "base.vhd", tmp_path / "leaf.vhd"
    disk = create_disk(base, NewImage().options(base, SIZE))
    scribble(disk, 12)
    disk.close()
    disk = create_disk(leaf, differencing_options(leaf, base))
    scribble(disk, 13)
    expected = content(disk)
    disk.close()
    assert same(content_of(leaf), expected)
    merge(leaf, nothing)
    assert same(qemu_sees(base, "vpc", tmp_path / "raw"), expected)
