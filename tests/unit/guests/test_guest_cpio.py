from __future__ import annotations

import stat

import pytest
import read_cpio
from hypothesis import given
from hypothesis import strategies as st

from hvhost.guests import cpio

names = st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=9).filter(
    lambda name: not name.startswith("/") and name != "TRAILER!!!"
)


@given(st.dictionaries(names, st.binary(max_size=30)))
def test_files_come_back_as_they_were(files: dict[str, bytes]) -> None:
    archive = cpio.archive([cpio.file(name, data) for name, data in files.items()])
    assert {name: item.data for name, item in read_cpio.read(archive).items()} == files
    assert len(archive) % 512 == 0
    assert archive == cpio.archive([cpio.file(name, data) for name, data in files.items()])


def test_every_kind_of_file() -> None:
    items = read_cpio.read(
        cpio.archive(
            [
                cpio.directory("dev"),
                cpio.character_device("dev/console", 5, 1),
                cpio.symlink("init", "bin/busybox"),
                cpio.file("etc", b"x", 0o755),
            ]
        )
    )
    assert stat.S_ISDIR(items["dev"].mode)
    assert items["dev"].links == 2
    assert stat.S_ISCHR(items["dev/console"].mode)
    assert items["dev/console"].device == (5, 1)
    assert stat.S_ISLNK(items["init"].mode)
    assert items["init"].data == b"bin/busybox"
    assert items["etc"].mode == stat.S_IFREG | 0o755
    assert len({item.inode for item in items.values()}) == 4


@pytest.mark.parametrize("bad", [["a", "a"], ["/a"], [""]])
def test_names_the_kernel_would_misread(bad: list[str]) -> None:
    with pytest.raises(ValueError, match="bad or repeated name"):
        cpio.archive([cpio.file(name, b"") for name in bad])


def test_a_file_of_four_gigabytes_does_not_fit() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with pytest.raises(ValueError, match="below 4 GiB"):
        cpio.archive([cpio.file("huge", Huge())])
