"""Drives whose writes vanish."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.storage_model import DriveKind
from hvhost.manager.storage import parse_drive
from hvhost.paths import cache_dir
from hvhost.storage.images import ImageFormat, create_disk, open_disk
from hvhost.storage.temporary import open_temporary
from hvhost.storage.vhd_create import VhdOptions
from hvhost.storage.vhdx_create import VhdxOptions

SIZE = 8 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("suffix", "options"), [("vhdx", VhdxOptions), ("vhd", VhdOptions)])
def test_two_machines_write_and_the_image_stays(
    tmp_path: Path, suffix: str, options: type[VhdxOptions] | type[VhdOptions]
) -> None:
    path = tmp_path / f"base.{suffix}"
    base = create_disk(path, options(SIZE))
    base.writev(0, [memoryview(b"base" * 1024)])
    base.close()
    before = path.read_bytes()
    one, two = open_temporary(path), open_temporary(path)
    one.writev(0, [memoryview(b"one!" * 1024)])
    one.flush()
    for disk, expected in ((one, b"one!"), (two, b"base")):
        found = bytearray(512)
        disk.readv(0, [memoryview(found)])
        assert found == expected * 128
    assert not list(cache_dir("temporary").iterdir()), "nothing has to be cleared away"
    with pytest.raises(HvHostError, match="cannot be written to now"):
        open_disk(path)
    one.close()
    two.close()
    assert path.read_bytes() == before


def test_a_raw_image_cannot_be_a_parent(tmp_path: Path) -> None:
    create_disk(tmp_path / "raw.img", SIZE).close()
    with pytest.raises(HvHostError, match="convert it to a VHDX"):
        open_temporary(tmp_path / "raw.img")


def test_a_format_that_is_not_the_image_s(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    create_disk(path, VhdOptions(SIZE)).close()
    open_temporary(path, ImageFormat.VHD).close()
    with pytest.raises(HvHostError, match=r"a vhd image and not for vhdx; leave the format out"):
        open_temporary(path, ImageFormat.VHDX)
    with pytest.raises(HvHostError, match="is raw"):
        open_temporary(path, ImageFormat.RAW)
    path.rename(path.with_suffix(".img"))
    with pytest.raises(HvHostError, match=r"a raw image and not for vhd; .* name it \*.vhd\."):
        open_temporary(path.with_suffix(".img"), ImageFormat.VHD)
    assert not list(cache_dir("temporary").iterdir())


def test_how_it_is_asked_for() -> None:
    assert parse_drive("a.vhdx,temporary", DriveKind.DISK).temporary
    with pytest.raises(HvHostError, match="no option of a drive"):
        parse_drive("a.vhdx,temporary=1", DriveKind.DISK)
