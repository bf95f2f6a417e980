from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from hvhost.compiler import build_static
from hvhost.errors import HvHostError

needs_compiler = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("cc")), reason="needs a C compiler"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def program(tmp_path: Path, text: str = "7") -> tuple[Path, Path]:
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint main(void) { return ANSWER; }\n')
    header.write_text(f"#define ANSWER {text}\n")
    return source, header


@needs_compiler
def test_a_program_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = program(tmp_path)
    built = build_static(source, [header])
    assert subprocess.run([built], check=False).returncode == 7
    monkeypatch.setenv("CC", "/bin/false")
    assert build_static(source, [header]) == built, "no compiler is asked again"


@needs_compiler
def test_a_change_is_another_program(tmp_path: Path) -> None:
    source, header = program(tmp_path)
    first = build_static(source, [header])
    program(tmp_path, "8")
    second = build_static(source, [header])
    assert subprocess.run([second], check=False).returncode == 8
    assert first != second
    assert build_static(source, [header], ["-DX"]) not in (first, second)


@needs_compiler
def test_it_needs_nothing_of_its_computer(tmp_path: Path) -> None:
    source, header = program(tmp_path)
    built = build_static(source, [header])
    file = built.read_bytes()
    offset, size, count = struct.unpack_from("<Q14xHH", file, 32)
    kinds = [struct.unpack_from("<I", file, offset + size * i)[0] for i in range(count)]
    assert 1 in kinds, "PT_LOAD"
    assert 3 not in kinds, "PT_INTERP"


@needs_compiler
def test_a_program_that_is_wrong(tmp_path: Path, cache: Path) -> None:
    source, header = program(tmp_path, "nonsense(")
    with pytest.raises(HvHostError, match=r"could not build answer\.c \(.+\); run `apt-get"):
        build_static(source, [header])
    assert list((cache / "programs").iterdir()) == [], "nothing half-built is left"


def test_a_compiler_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = program(tmp_path)
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(HvHostError, match=r"/bin/false could not build .*\(it said nothing\)"):
        build_static(source, [header])


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = program(tmp_path)
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(HvHostError, match="/nowhere/cc could not build"):
        build_static(source, [header])


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, header = program(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HvHostError, match=r"no C compiler for answer\.c; run `apt-get install gcc"):
        build_static(source, [header])
