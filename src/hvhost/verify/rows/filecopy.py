"""``file-copy``: files of the host in the guest, whole or not at all.

What is in the guest is told by its own ``sha256sum`` and ``ls``.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.model import CopyProgress
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.session import Session

SIZE = 4 << 20
LARGE_SIZE = 48 << 20
PLACE = "/tmp/hvhost-copy"
KERNEL_DAEMON = "hv_fcopy_daemon"
UIO_DAEMON = "hv_fcopy_uio_daemon"


class _Enough(Exception):  # noqa: N818 — ends a copy that is to be cancelled
    pass


def _run(probe: Probe, script: str, timeout: float = 60.0) -> str:
    return probe.run(["sh", "-c", script], timeout).output.strip()


def _refused(session: Session, source: Path, destination: str, word: str, what: str) -> str:
    """A copy that has to fail with *word* in its message."""
    try:
        session.machine.copy(source, destination)
    except HvHostError as error:
        if word not in str(error):
            raise RowFailed(f"{what}: the message is {str(error)!r}, without {word!r}") from error
        return str(error)
    raise RowFailed(f"{what}: the copy did not fail")


def _wait_ready(session: Session) -> None:
    deadline = time.monotonic() + session.timing.event
    while not session.machine.info().file_copy_ready:
        if time.monotonic() >= deadline:
            raise RowFailed("the guest's file copy service did not open its channel")
        time.sleep(session.timing.poll)


def _running_daemon(session: Session, probe: Probe) -> str:
    """The one daemon's name; two, which UIO allows, take each other's messages."""
    deadline = time.monotonic() + session.timing.event
    while True:
        running = [
            name
            for name in (KERNEL_DAEMON, UIO_DAEMON)
            for _ in _run(probe, f"pidof {name}").split()
        ]
        if len(running) == 1:
            return running[0]
        if time.monotonic() >= deadline:
            number = len(running) or "no"
            what = f"{number} file copy daemon{'s run' if running else ' runs'} in the guest"
            raise RowFailed(what, [_run(probe, "ps")])
        time.sleep(session.timing.poll)


def _await_daemon(session: Session, probe: Probe, source: Path) -> None:
    """Wait until a daemon that was started takes a file; it registers in its own time.

    The kernel's driver has its channel open without one, and answers with an error meanwhile.
    """
    deadline = time.monotonic() + session.timing.event
    _wait_ready(session)
    while True:
        try:
            session.machine.copy(source, f"{PLACE}/taken", create_path=True, overwrite=True)
        except HvHostError as error:
            if time.monotonic() >= deadline:
                raise RowFailed(
                    "the guest's file copy daemon does not take files", [str(error)]
                ) from error
            time.sleep(session.timing.poll)
        else:
            break
    if _run(probe, f"cat {PLACE}/taken").encode() != source.read_bytes():
        raise RowFailed("the guest's file copy daemon took a file, but it is not there")


def _whole(session: Session, probe: Probe, source: Path, digest: str) -> Iterator[str]:
    session.step("copying a file")
    target = f"{PLACE}/a/b/file"
    _refused(session, source, target, "directory is missing", "a missing directory")
    done = session.machine.copy(source, target, create_path=True)
    told = _run(probe, f"sha256sum {target}")
    if not told.startswith(digest):
        raise RowFailed("the file in the guest is not the one that was copied", [told, digest])
    yield (
        f"{SIZE >> 20} MiB at {SIZE / done.seconds / (1 << 20):.1f} MiB/s, sha256 {digest[:12]}… "
        "said by the guest; refused without --create-path, made with it"
    )


def _existing(session: Session, probe: Probe, other: Path, digest: str) -> Iterator[str]:
    session.step("copying onto a file that is there")
    target = f"{PLACE}/a/b/file"
    _refused(session, other, target, "exists", "an existing file")
    if not _run(probe, f"sha256sum {target}").startswith(digest):
        raise RowFailed("a refused copy changed the file that was there")
    session.machine.copy(other, target, overwrite=True)
    if _run(probe, f"cat {target}").encode() != other.read_bytes():
        raise RowFailed("--overwrite did not replace the file")
    yield "existing file: refused and untouched; replaced with --overwrite"


def _left(probe: Probe, target: str) -> str:
    """What is left of a copy that failed: nothing, or an empty file where no more is possible."""
    size = _run(probe, f"stat -c %s {target} 2>/dev/null")
    return "nothing left" if not size else f"{size} bytes left"


def _check_left(left: str, daemon: str, what: str) -> None:
    allowed = ("nothing left", "0 bytes left") if daemon == UIO_DAEMON else ("nothing left",)
    if left not in allowed:
        raise RowFailed(f"{what}: {left} in the guest")


def _full(session: Session, probe: Probe, source: Path, daemon: str) -> Iterator[str]:
    session.step("filling the guest's disk")
    _run(probe, f"mkdir -p {PLACE}/small; mount -t tmpfs -o size=1m none {PLACE}/small")
    _refused(session, source, f"{PLACE}/small/file", "became full", "a full disk")
    left = _left(probe, f"{PLACE}/small/file")
    _check_left(left, daemon, "after a full disk")
    _run(probe, f"umount {PLACE}/small")
    yield f"full disk: told so; {left}"


def _cancelled(session: Session, probe: Probe, large: Path, daemon: str) -> Iterator[str]:
    session.step("cancelling a copy")
    target = f"{PLACE}/large"

    def watch(progress: CopyProgress) -> None:
        if progress.copied:
            raise _Enough

    try:
        session.machine.copy(large, target, watch=watch)
    except _Enough:
        pass
    else:
        raise RowFailed("the copy was over before it could be cancelled")
    left = _left(probe, target)
    _check_left(left, daemon, "after a cancelled copy")
    yield f"cancelled half-way: {left}"


def _killed(session: Session, probe: Probe, large: Path, daemon: str) -> Iterator[str]:
    session.step("killing the guest's daemon half-way")
    killed: list[int] = []

    def watch(progress: CopyProgress) -> None:
        if progress.copied and not killed:
            killed.append(progress.copied)
            _run(probe, f"killall -9 {daemon}")

    try:
        session.machine.copy(large, f"{PLACE}/killed", watch=watch)
    except HvHostError as error:
        if not killed:
            raise
        message = str(error)
    else:
        raise RowFailed("the guest's daemon was killed half-way, but the copy is said to be whole")
    if "incomplete" not in message:
        raise RowFailed(f"the daemon was killed half-way; the message is {message!r}")
    _run(probe, f"rm -f {PLACE}/killed; {daemon}")
    yield f"daemon killed half-way: {message}"


def prove(session: Session) -> Iterator[str]:
    """A whole file, and every way in which it can fail."""
    probe = session.running()
    _wait_ready(session)
    daemon = _running_daemon(session, probe)
    with tempfile.TemporaryDirectory(prefix="hvhost-verify-") as name:
        source, other, large = (Path(name) / each for each in ("source", "other", "large"))
        source.write_bytes(os.urandom(SIZE))
        other.write_bytes(b"another file")
        with large.open("wb") as file:
            file.truncate(LARGE_SIZE)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        _await_daemon(session, probe, other)
        yield from _whole(session, probe, source, digest)
        yield from _existing(session, probe, other, digest)
        yield from _full(session, probe, source, daemon)
        yield from _cancelled(session, probe, large, daemon)
        yield from _killed(session, probe, large, daemon)
        _await_daemon(session, probe, other)
        _run(probe, f"rm -rf {PLACE}")
    yield (
        f"copied whole with {daemon}; existing file, missing directory, full disk, cancelled and "
        "daemon killed half-way each told, and no half file taken for a whole one"
    )
