"""Crash safety: every cut through the writes of an image leaves a disk that opens and is whole.

And every flush of the formats is needed for that: with any one of them left out, some crash does
harm.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.storage import vhdx
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhdx import VhdxDisk
from simulated import crash_sessions as of
from simulated.crash_sessions import SESSIONS, Session
from simulated.image_files import MemoryFile

HERE = Path(vhdx.__file__).parent


@pytest.mark.parametrize("use_a_disk", SESSIONS, ids=lambda each: each.__name__)
def test_every_crash_leaves_a_whole_disk(use_a_disk: Callable[[], Session]) -> None:
    assert use_a_disk().examine_all() >= 7


def flushes() -> dict[tuple[str, int], str]:
    """Every call of a flush in the formats' modules, by module and line: its function's name.

    Of several in one function, the further ones are numbered.
    """
    found: dict[tuple[str, int], str] = {}
    for path in sorted([*HERE.glob("vhdx*.py"), *HERE.glob("vhd.py"), *HERE.glob("vhd_*.py")]):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            lines = sorted(
                call.lineno
                for call in ast.walk(function)
                if isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "flush"
            )
            for number, line in enumerate(lines, 1):
                suffix = f" {number}" if number > 1 else ""
                found[path.stem, line] = f"{path.stem}.{function.name}{suffix}"
    return found


FLUSHES = flushes()
#: For each flush, a session that suffers if it is left out.
SUFFERS: dict[str, Callable[[], Session]] = {
    "vhd.flush": of.vhd_fixed,
    "vhd.flush 2": of.vhd_differencing,
    "vhd.flush 3": of.vhd_dynamic,
    "vhd.resize": of.vhd_resizing,
    "vhd.close": of.vhd_growing,
    "vhd_create.create_vhd": of.vhd_creating_fixed,
    "vhd_create.create_vhd 2": of.vhd_creating,
    "vhd_resize._resize_fixed": of.vhd_fixed,
    "vhd_resize._resize_fixed 2": of.vhd_fixed,
    "vhd_resize._resize_dynamic": of.vhd_growing,
    "vhd_resize._resize_dynamic 2": of.vhd_growing,
    "vhd_resize._move_table": of.vhd_resizing,
    "vhd_resize._move_table 2": of.vhd_resizing,
    "vhd_resize._write_end": of.vhd_growing,
    "vhdx.flush": of.fixed,
    "vhdx.close": of.recovering,
    # Without these two a compaction does not come to its end.
    "vhdx_compact._drop_zeros": of.compacting,
    "vhdx_compact._move_to_front": of.compacting,
    "vhdx_create.create_vhdx": of.creating_fixed,
    "vhdx_create.create_vhdx 2": of.creating,
    "vhdx_journal.replay": of.recovering,
    "vhdx_journal.begin": of.fixed,
    "vhdx_journal.commit": of.recovering,
    "vhdx_journal.commit 2": of.dynamic,
    "vhdx_journal.end": of.compacting,
    "vhdx_journal._write_header": of.fixed,
    "vhdx_resize._shrink": of.resizing,
}


def test_every_flush_has_its_session() -> None:
    assert sorted(FLUSHES.values()) == sorted(SUFFERS)


@pytest.mark.parametrize("left_out", SUFFERS)
def test_a_flush_left_out_is_found(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = 0

    def without(honest: Callable[[object], None]) -> Callable[[object], None]:
        def flush(self: object) -> None:
            nonlocal times
            caller = sys._getframe(1)
            place = Path(caller.f_code.co_filename).stem, caller.f_lineno
            if FLUSHES.get(place) == left_out:
                times += 1
            else:
                honest(self)

        return flush

    with monkeypatch.context() as patch:
        for kind in (MemoryFile, VhdxDisk, VhdDisk):
            patch.setattr(kind, "flush", without(kind.flush))  # type: ignore[arg-type] # of each
        with pytest.raises((AssertionError, HvHostError)):
            SUFFERS[left_out]().examine_all()
    assert times
