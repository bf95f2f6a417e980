"""What is taken out of the rig's emulator, and when it is left alone."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from hvhost.rig.repair import repaired, without_note

NOTE, NOTHING = bytes.fromhex("89b310d7ffff"), bytes.fromhex("660f1f440000")
BEFORE = bytes.fromhex("0f85d7000000 410fb6f4 4489abe0330000")
BETWEEN = bytes.fromhex("c783e4330000 00000000 48c783e8330000 ffffffff f6059aa73c0102 0f856c010000")
DELIVER = bytes.fromhex("ba01000000 4889df e877a60600")
INJECTION = BEFORE + NOTE + BETWEEN + DELIVER


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVHOST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def emulator(directory: Path, content: bytes) -> Path:
    path = directory / "prefix" / "bin" / "qemu-system-x86_64"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def test_the_note_is_not_written() -> None:
    """Nothing else changes, and no byte moves."""
    assert (
        without_note(b"x" + INJECTION + b"y") == b"x" + BEFORE + NOTHING + BETWEEN + DELIVER + b"y"
    )


@pytest.mark.parametrize(
    "program",
    [
        b"",
        2 * INJECTION,
        BEFORE + NOTE + BETWEEN,  # the case of an exception: here the note is what is delivered
        BEFORE + bytes.fromhex("89b310d70000") + BETWEEN + DELIVER,  # a field of env
    ],
)
def test_another_emulator_is_left_alone(
    program: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert without_note(program) is None
    path = emulator(tmp_path, program)
    with caplog.at_level(logging.WARNING):
        assert repaired(path) == path
    assert f"{path} is an unknown build" in caplog.text


def test_a_copy_is_made_once(tmp_path: Path, cache: Path) -> None:
    """It can be executed, and has beside it what the program has; the program stays as it is."""
    path = emulator(tmp_path, INJECTION)
    (tmp_path / "prefix" / "share").mkdir()
    (tmp_path / "prefix" / "share" / "bios.bin").write_bytes(b"bios")
    copy = repaired(path)
    assert copy.is_relative_to(cache)
    assert copy.read_bytes() == without_note(INJECTION)
    assert os.access(copy, os.X_OK)
    assert (copy.parents[1] / "share" / "bios.bin").read_bytes() == b"bios"
    assert path.read_bytes() == INJECTION
    made = copy.stat()
    assert repaired(path).stat() == made
    path.write_bytes(b"-" + INJECTION)
    assert repaired(path) != copy, "another program, another copy"
    assert [file.name for file in copy.parent.iterdir()] == [path.name]


def test_no_room_for_a_copy(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = emulator(tmp_path, INJECTION)
    monkeypatch.setattr(Path, "chmod", full)
    with caplog.at_level(logging.WARNING):
        assert repaired(path) == path
    assert "No space left on device" in caplog.text
    assert not [file for file in cache.rglob("*") if file.is_file()]
