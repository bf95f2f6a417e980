"""A write that was answered before a flush was survives ``kill -9`` of the process that did it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvhost.storage.disk import ImageDisk
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.operations import check
from hvhost.storage.vhdx_create import VhdxOptions
from simulated.endless_writer import BLOCKS, block, lba

SIZE = BLOCKS * 512
TESTS = Path(__file__).parents[2]


def make(directory: Path, kind: str) -> Path:
    path = directory / ("disk.img" if kind == "raw" else "disk.vhdx")
    if kind == "differencing":
        create_disk(directory / "parent.vhdx", VhdxOptions(SIZE)).close()
        create_disk(path, differencing_options(path, directory / "parent.vhdx")).close()
    elif kind == "raw":
        create_disk(path, SIZE).close()
    else:
        create_disk(path, VhdxOptions(SIZE, block_size=1 << 20, fixed=kind == "fixed")).close()
    return path


def killed_at_work(path: Path, flushes: int, *arguments: str) -> int:
    """Kill a writer after so many flushes; the writes that are to be on the disk."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "simulated.endless_writer", str(path), *arguments],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    try:
        promised = [int(writer.stdout.readline()) for _ in range(flushes)][-1]
    finally:
        writer.kill()
    promised = max([promised, *(int(line) for line in writer.stdout if line.endswith("\n"))])
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    return promised


def lost(disk: ImageDisk, promised: int) -> list[int]:
    found = []
    for number in range(promised):
        data = bytearray(512)
        disk.readv(lba(number) * 512, [memoryview(data)])
        if data != block(number):
            found.append(number)
    return found


@pytest.mark.parametrize("kind", ["raw", "dynamic", "fixed", "differencing"])
def test_what_was_flushed_survives_the_death_of_the_host(tmp_path: Path, kind: str) -> None:
    path = make(tmp_path, kind)
    for flushes in (1, 7, 40):  # each time on what the one before left
        promised = killed_at_work(path, flushes)
        disk = open_disk(path)
        assert promised >= 16 * flushes and lost(disk, promised) == []
        disk.close()
        assert check(path).errors == []


def test_a_host_that_does_not_flush_is_found_out(tmp_path: Path) -> None:
    path = make(tmp_path, "dynamic")
    promised = killed_at_work(path, 3, "careless")
    disk = open_disk(path)
    assert len(lost(disk, promised)) > promised // 2
    disk.close()
