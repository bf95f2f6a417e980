"""File copies of a machine: the host's files, progress and end."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.copier import Copier
from hvhost.machine.model import CopyProgress, CopyState
from hvhost.services.filecopy import FileCopy
from simulated.driver import GuestService, SimulatedGuest


class Bench:
    """A copier with a guest that says yes to everything, when it is let."""

    def __init__(self) -> None:
        self.guest = SimulatedGuest()
        self.device = FileCopy()
        self.guest.server.add_device(self.device)
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), [(1, 1)])
        self.service.run()
        self.lock = threading.RLock()
        self.copier = Copier(self.device)

    def start(self, source: Path, destination: str = "/file", **flags: bool) -> CopyProgress:
        chosen = {"create_path": False, "overwrite": False, **flags}
        return self.copier.start(self.lock, str(source), destination, **chosen)

    def run(self, status: int = 0) -> None:
        while self.service.run(status=status):
            pass


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_copy_from_start_to_end(tmp_path: Path) -> None:
    bench, source = Bench(), tmp_path / "source"
    source.write_bytes(bytes(20_000))
    before = descriptors()
    progress = bench.start(source, "/a/", create_path=True, overwrite=True)
    assert (progress.size, progress.copied, progress.state) == (20_000, 0, CopyState.COPYING)
    assert progress.destination == "/a/source"
    for _ in range(3):
        bench.service.run()
    assert bench.copier.progress(0.0).copied == 12288
    bench.run()
    done = bench.copier.progress(5.0)
    assert (done.state, done.copied, done.error) == (CopyState.DONE, 20_000, None)
    assert bench.service.requests[0][1][1076] == 3  # both flags
    assert descriptors() == before
    assert bench.copier.progress(0.0) == done  # its seconds stand still


def test_a_copy_that_fails(tmp_path: Path) -> None:
    bench, source = Bench(), tmp_path / "source"
    source.write_bytes(b"x")
    before = descriptors()
    bench.start(source)
    bench.run(0x80070050)
    failed = bench.copier.progress(5.0)
    assert failed.state is CopyState.FAILED and "exists" in str(failed.error)
    assert descriptors() == before


def test_a_copy_that_is_cancelled(tmp_path: Path) -> None:
    bench, source = Bench(), tmp_path / "source"
    source.write_bytes(bytes(20_000))
    bench.start(source)
    bench.service.run()
    bench.copier.cancel(bench.lock)
    bench.run()
    assert "cancelled" in str(bench.copier.progress(5.0).error)


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    bench, source = Bench(), tmp_path / "source"
    os.mkfifo(tmp_path / "pipe")
    source.write_bytes(b"x")
    before = descriptors()
    for path, destination, words in (
        (tmp_path / "none", "/file", "No such file"),
        (tmp_path, "/file", "not a plain file"),
        (tmp_path / "pipe", "/file", "not a plain file"),
        (source, "file", "not an absolute path"),
    ):
        with pytest.raises(HvHostError, match=words):
            bench.start(path, destination)
    with pytest.raises(HvHostError, match="Nothing has been copied"):
        bench.copier.progress(0.0)
    bench.start(source)
    first = bench.copier.progress(0.0).source
    with pytest.raises(HvHostError, match="is being copied"):
        bench.start(tmp_path / "source", "/other")
    assert bench.copier.progress(0.0).destination == "/file" and first == str(source)
    bench.run()
    assert bench.copier.progress(5.0).state is CopyState.DONE
    assert descriptors() == before
