from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import tiny_deb
from tiny_deb import member

from hvhost.errors import HvHostError
from hvhost.guests import deb


@pytest.fixture(params=["dpkg-deb", "without dpkg-deb"])
def either_reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "dpkg-deb":
        monkeypatch.setattr(shutil, "which", lambda _name: None)


@pytest.mark.usefixtures("either_reader")
@pytest.mark.parametrize("compression", ["xz", "gz", "zst", ""])
def test_files_links_and_modes(tmp_path: Path, compression: str) -> None:
    package = tiny_deb.write(
        tmp_path / "thing_1_amd64.deb",
        [
            member("./", type=tarfile.DIRTYPE),
            member("./usr/", type=tarfile.DIRTYPE, mode=0o700),
            member("./usr/tool", b"tool", mode=0o4755),
            member("./usr/data", b"data" * 1000),
            member("./usr/again", type=tarfile.LNKTYPE, linkname="./usr/data"),
            member("./usr/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("./usr/node", type=tarfile.CHRTYPE),
            member("./usr/share/doc/thing/copyright", b"long"),
        ],
        compression,
    )
    root = deb.extract([package])
    assert (root / "usr/tool").stat().st_mode & 0o7777 == 0o755
    assert (root / "usr/data").read_bytes() == b"data" * 1000
    assert (root / "usr/again").read_bytes() == b"data" * 1000
    assert (root / "usr/link").readlink() == Path("/etc/passwd")
    assert not (root / "usr/node").exists()
    assert not (root / "usr/share/doc").exists()


def test_a_package_is_extracted_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "thing_1_amd64.deb"
    tiny_deb.write(path, tiny_deb.files({"a": b"1"}))
    said: list[str] = []
    first = deb.extract([path], said.append)
    assert deb.extract([path], said.append) == first
    assert said == ["unpacking thing"]
    tiny_deb.write(path, tiny_deb.files({"a": b"22"}))
    assert (deb.extract([path]) / "a").read_bytes() == b"22"


def test_packages_of_one_kernel_come_together(tmp_path: Path) -> None:
    first = tiny_deb.write(tmp_path / "one_1_amd64.deb", tiny_deb.files({"usr/lib/a": b"1"}))
    second = tiny_deb.write(tmp_path / "two_1_amd64.deb", tiny_deb.files({"usr/lib/b": b"2"}))
    root = deb.extract([first, second])
    assert sorted(path.name for path in (root / "usr/lib").iterdir()) == ["a", "b"]


def leftovers(cache: Path) -> list[Path]:
    return list((cache / "packages").iterdir())


@pytest.mark.usefixtures("either_reader")
@pytest.mark.parametrize(
    "members",
    [
        [
            member("./usr/out", type=tarfile.SYMTYPE, linkname="{outside}"),
            member("./usr/out/file", b"evil"),
        ],
        [member("./usr/file", type=tarfile.LNKTYPE, linkname="../outside/secret")],
        [
            member("./usr/out", type=tarfile.SYMTYPE, linkname="{outside}"),
            member("./usr/file", type=tarfile.LNKTYPE, linkname="./usr/out/secret"),
        ],
        [
            member("./usr/out", type=tarfile.SYMTYPE, linkname="{outside}"),
            member("./usr/out", type=tarfile.DIRTYPE),
        ],
    ],
    ids=["through a symlink", "hard link out", "hard link through a symlink", "directory twice"],
)
def test_a_package_cannot_reach_outside(
    tmp_path: Path, private_cache: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("kept")
    for info, _ in members:
        info.linkname = info.linkname.replace("{outside}", str(outside))
    package = tiny_deb.write(tmp_path / "evil_1_amd64.deb", members)
    with pytest.raises(HvHostError, match="do not use it"):
        deb.extract([package])
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert leftovers(private_cache) == []


@pytest.mark.usefixtures("either_reader")
def test_names_that_climb_are_left_out(tmp_path: Path, private_cache: Path) -> None:
    package = tiny_deb.write(
        tmp_path / "evil_1_amd64.deb",
        [member("./../../climbed", b"evil"), member("/absolute", b"kept inside")],
    )
    root = deb.extract([package])
    assert (root / "absolute").read_bytes() == b"kept inside"
    assert not list(private_cache.rglob("climbed"))
    assert not (tmp_path / "climbed").exists()


@pytest.mark.usefixtures("either_reader")
def test_damaged_packages_leave_nothing_behind(tmp_path: Path, private_cache: Path) -> None:
    whole = tiny_deb.write(tmp_path / "a_1_amd64.deb", tiny_deb.files({"f": b"x" * 5000}), "")
    content = whole.read_bytes()
    damaged = tmp_path / "damaged.deb"
    for cut in (0, 4, 40, 100, 300, len(content) - 9000, len(content) - 4000):
        damaged.write_bytes(content[:cut])
        with pytest.raises(HvHostError, match=str(damaged)):
            deb.extract([damaged])
    damaged.write_bytes(b"\x7fELF" + content)
    with pytest.raises(HvHostError, match=r"not a Debian package"):
        deb.extract([damaged])
    assert leftovers(private_cache) == []


@pytest.mark.usefixtures("either_reader")
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        (b"debian-binary", 48, b"-68       "),
        (b"debian-binary", 48, b"many      "),
        (b"debian-binary", 58, b"xx"),
        (b"data.tar.xz", 48, b"-1        "),
    ],
    ids=["negative size", "no size", "wrong end", "negative size of the files"],
)
def test_member_headers_that_lie(tmp_path: Path, name: bytes, place: int, value: bytes) -> None:
    path = tiny_deb.write(tmp_path / "a_1_amd64.deb", tiny_deb.files({"f": b"x"}))
    content = bytearray(path.read_bytes())
    start = content.index(name) + place
    content[start : start + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(HvHostError, match="damaged"):
        deb.extract([path])


@pytest.mark.usefixtures("either_reader")
def test_a_directory_is_no_package(tmp_path: Path, private_cache: Path) -> None:
    with pytest.raises(HvHostError, match=r"is not a file; give an existing \.deb file"):
        deb.extract([tmp_path])
    assert leftovers(private_cache) == []


def test_who_is_slower_takes_what_is_there(tmp_path: Path, private_cache: Path) -> None:
    path = tiny_deb.write(tmp_path / "thing_1_amd64.deb", tiny_deb.files({"a": b"1"}))
    others: list[Path] = []
    found = deb.extract([path], lambda _text: others.append(deb.extract([path])))
    assert others == [found] == leftovers(private_cache)
    assert (found / "a").read_bytes() == b"1"


def test_something_else_in_a_packages_place_is_not_taken_for_it(
    tmp_path: Path, private_cache: Path
) -> None:
    path = tiny_deb.write(tmp_path / "thing_1_amd64.deb", tiny_deb.files({"a": b"1"}))
    found = deb.extract([path])
    shutil.rmtree(found)
    found.write_text("a file")
    with pytest.raises(NotADirectoryError, match=found.name):
        deb.extract([path])
    assert leftovers(private_cache) == [found]


def test_a_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match="cannot be read"):
        deb.extract([tmp_path / "none.deb"])
