"""The programs that run in guests, for both kinds of kernel."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.guests import apt, deb
from hvhost.guests.programs import build_programs, compiler_options


def test_native_programs_are_static_and_all_there() -> None:
    built = build_programs(apt.NATIVE)
    assert [place for place, _ in built.others] == [
        f"usr/bin/hvhost-{name}" for name in ("clock", "dsync", "fill", "frame")
    ]
    for path in (built.probe, *(path for _, path in built.others)):
        assert path.read_bytes()[:5] == b"\x7fELF\2"


def test_options_for_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(
        suite: str, names: Sequence[str], *, architecture: str, progress: apt.Progress
    ) -> list[Path]:
        asked.extend(f"{suite} {name}:{architecture}" for name in names)
        return [tmp_path / "a.deb"]

    monkeypatch.setattr(apt, "download", download)
    monkeypatch.setattr(deb, "extract", lambda paths, progress: tmp_path)
    options = compiler_options(apt.I386, apt.silent)
    assert "bookworm libc6-dev:i386" in asked
    assert options[:2] == ("-m32", f"--sysroot={tmp_path}")
    assert f"-L{tmp_path}/usr/lib/i386-linux-gnu" in options
    assert "-D_TIME_BITS=64" in options


def test_an_architecture_nobody_has() -> None:
    with pytest.raises(HvHostError, match="no guests for m68k"):
        compiler_options("m68k", apt.silent)


def test_fill_keeps_memory_and_looks_at_it() -> None:
    fill = dict(build_programs(apt.NATIVE).others)["usr/bin/hvhost-fill"]
    with subprocess.Popen([str(fill), "8"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"filled {8 << 20}\n"
            process.send_signal(signal.SIGUSR1)
            report = process.stdout.readline()
            place = writable_place(process.pid, 8 << 20)
            with Path(f"/proc/{process.pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(place + 5 * 4096)
                memory.write(b"other")
            process.send_signal(signal.SIGUSR1)
            damaged = process.stdout.readline()
        finally:
            process.kill()
    assert re.match(r"pages 2048 wrong 0 above-4g \d+ highest 0x?[0-9a-f]+$", report), report
    assert damaged.startswith("pages 2048 wrong 1 ")


def writable_place(pid: int, size: int) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if last - first >= size and " rw-p " in line:
            return last - size if last - first > size else first
    raise AssertionError("not mapped")


def test_fill_takes_its_time() -> None:
    """For a rate of 20 MiB a second, 2 MiB may not take less than what that needs."""
    fill = dict(build_programs(apt.NATIVE).others)["usr/bin/hvhost-fill"]
    started = time.monotonic()
    with subprocess.Popen([str(fill), "2", "20"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == f"filled {2 << 20}\n"
        finally:
            process.kill()
    assert time.monotonic() - started >= 2 / 20


@pytest.mark.parametrize("words", [[], ["0"], ["1", "0"], ["1", "2", "3"]])
def test_fill_says_how_it_is_used(words: list[str]) -> None:
    fill = dict(build_programs(apt.NATIVE).others)["usr/bin/hvhost-fill"]
    result = subprocess.run([str(fill), *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "usage: hvhost-fill MIB [MIB-A-SECOND]" in result.stderr
