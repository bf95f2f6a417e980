from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import tiny_deb

from hvhost.errors import HvHostError
from hvhost.guests.lsvmbus import lsvmbus_script, python_files

SCRIPT = b"#!/usr/bin/env python\nprint('VMBUS ID 1')\n"


def source_package(path: Path, inner: dict[str, bytes]) -> Path:
    tree = lzma.compress(tiny_deb.tar(tiny_deb.files(inner)))
    files = {
        "usr/share/doc/linux-source-6.1/README": b"",
        "usr/src/linux-source-6.1.tar.xz": tree,
    }
    return tiny_deb.write(path / "linux-source-6.1_6.1.1_all.deb", tiny_deb.files(files))


@pytest.mark.parametrize("has_dpkg", [True, False])
def test_the_script_is_taken_out_of_the_source_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_dpkg: bool
) -> None:
    if not has_dpkg:
        monkeypatch.setattr("shutil.which", lambda name: None)
    inner = {
        "linux-source-6.1/lsvmbus": b"wrong",
        "linux-source-6.1/scripts/tools/hv/lsvmbus": b"wrong",
        "linux-source-6.1/tools/hv/lsvmbus": SCRIPT,
    }
    package = source_package(tmp_path, inner)
    said: list[str] = []
    script = lsvmbus_script(package, said.append)
    assert script.read_bytes() == SCRIPT
    assert script.name == "lsvmbus"
    assert script.stat().st_mode & 0o777 == 0o755
    assert said == ["looking for lsvmbus in linux-source-6.1"]
    assert lsvmbus_script(package, said.append) == script
    assert len(said) == 1, "cached"


def test_a_package_without_it(tmp_path: Path) -> None:
    package = source_package(tmp_path, {"linux-source-6.1/tools/hv/hv_kvp_daemon.c": b""})
    with pytest.raises(HvHostError, match=r"no tools/hv/lsvmbus in .*give a linux-source package"):
        lsvmbus_script(package)
    other = tiny_deb.write(tmp_path / "x_1_all.deb", tiny_deb.files({"usr/bin/x": b""}))
    with pytest.raises(HvHostError, match="no tools/hv/lsvmbus"):
        lsvmbus_script(other)


def test_python_of_packages(tmp_path: Path) -> None:
    program, library = tmp_path / "python3.11-minimal-1", tmp_path / "libpython3.11-minimal-1"
    for path in (program / "usr/bin/python3.11", library / "usr/lib/python3.11/os.py"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    named, files = python_files([tmp_path / "other", library, program])
    assert named.name == "python3"
    assert named.resolve() == program / "usr/bin/python3.11"
    assert files == [("usr/lib/python3.11/os.py", library / "usr/lib/python3.11/os.py")]
    assert python_files([program, library])[0] == named
    with pytest.raises(HvHostError, match="no Python"):
        python_files([library])
