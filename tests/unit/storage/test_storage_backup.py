"""Backups of a machine whose guest freezes, does not, or dies over it."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions, BackupState, Consistency
from hvhost.machine.computer import Computer
from hvhost.machine.config_file import load_config
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.machine.storage_model import DriveConfig, DriveKind
from hvhost.services.vss import FROZEN_SECONDS, Vss
from hvhost.services.vss_protocol import VssOperation
from hvhost.storage.backup import Backup, hold
from hvhost.storage.backup_base import Whole
from hvhost.storage.block import DiskUnit
from hvhost.storage.controller import Drive, Storage
from hvhost.storage.file import HostFile
from hvhost.storage.images import create_disk, differencing_options, open_disk
from hvhost.storage.shared_copy import SharedCopy
from hvhost.storage.snapshot import CHUNK, Snapshot
from hvhost.storage.vhdx_create import VhdxOptions
from simulated.driver import GuestService, SimulatedGuest

SIZE = 40 * CHUNK
CHECK, FREEZE, THAW = VssOperation


class Board:
    """As much of a computer as backups use; the guest answers at once."""

    require_running = Computer.require_running

    def __init__(self, config: MachineConfig, vss: Vss) -> None:
        self.config, self.paused = config, False
        self.lock = threading.RLock()
        self.guest = SimulatedGuest()
        self.guest.server.add_device(vss)
        self.guest.connect()
        self.service = GuestService(self.guest.open(1), [(5, 0)])
        self.service.run()


class Bench:
    """A machine with two disks and a DVD drive. ``statuses``: what the guest answers."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.told = directory, list[tuple[str, str]]()
        files = [directory / "a.vhdx", directory / "b.img"]
        create_disk(files[0], VhdxOptions(SIZE)).close()
        create_disk(files[1], SIZE).close()
        drives = [DriveConfig(str(each)) for each in files]
        self.config = MachineConfig(
            "m1", "/vmlinuz", drives=(*drives, DriveConfig(None, kind=DriveKind.DVD))
        )
        self.vss = Vss()
        around = Surroundings(
            self.config, Loop(), directory, lambda *event: self.told.append(event), self.vss
        )
        self.storage = Storage(around)
        self.backup = Backup(around, self.storage)
        self.board = Board(self.config, self.vss)
        self.backup.attach(cast("Computer", self.board))
        self.statuses: dict[int, int] = {}
        self.asked: list[int] = []
        self.on: dict[int, Callable[[], None]] = {}
        #: The machine is paused as soon as the guest was asked this, so no answer comes.
        self.paused_over: VssOperation | None = None
        request = self.vss.request

        def answered(operation: VssOperation, done: Callable[..., None]) -> None:
            request(operation, done)
            if operation is self.paused_over:
                self.board.paused = True
            else:
                self.answer()

        self.vss.request = answered  # type: ignore[method-assign]

    def answer(self) -> None:
        while packets := self.board.service.channel.read():
            for packet in packets:
                message = bytearray(packet.payload)
                operation = message[28]
                self.asked.append(operation)
                self.on.get(operation, lambda: None)()
                struct.pack_into("<I", message, 20, self.statuses.get(operation, 0))
                message[25] = 5
                self.board.service.channel.write(
                    bytes(message), transaction_id=packet.transaction_id
                )

    @property
    def drives(self) -> list[Drive]:
        return self.storage.disks()

    def write(self, number: int, offset: int, byte: int, length: int = CHUNK) -> None:
        """As the guest does, through the drive's worker."""
        drive = self.drives[number]
        unit = cast("DiskUnit", drive.unit)
        data = memoryview(bytes([byte]) * length)
        drive.worker.call(lambda: unit.disk.writev(offset, [data]))

    def run(self, *, crash_consistent: bool = False, incremental: bool = False) -> BackupInfo:
        target = self.directory / "backups"
        options = BackupOptions(
            str(target),
            crash_consistent=crash_consistent,
            allow_same_volume=True,
            incremental=incremental,
        )
        self.backup.start(options)
        return self.backup.progress(30.0)

    def left(self) -> list[str]:
        return [path.name for path in (self.directory / "backups").glob("*")]


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    directory: Path = getattr(request, "param", plain)(tmp_path, request)
    bench = Bench(directory)
    yield bench
    bench.backup.close()
    bench.storage.close()
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


def plain(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory whose files may be unable to share their blocks."""
    return tmp_path


def sharing(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory whose files can share their blocks: played, by copying them at once."""

    def share_with(self: HostFile, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self.path.read_bytes(), 0)

    request.getfixturevalue("monkeypatch").setattr(HostFile, "share_with", share_with)
    return tmp_path


def btrfs(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory whose files can share their blocks."""
    image, mount = tmp_path / "btrfs.img", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(256 << 20)
    commands = ["mkfs.btrfs", "-q", str(image)], ["mount", "-o", "loop", str(image), str(mount)]
    for command in commands:
        if shutil.which(command[0]) is None:
            pytest.skip(f"there is no {command[0]}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no Btrfs can be mounted here: {done.stderr.strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", mount], check=True))
    return mount


def kept_by(info: BackupInfo) -> list[str]:
    disks = json.loads(Path(info.path, "backup.json").read_text())["disks"]
    return [each["kept_by"] for each in disks]


def contents(info: BackupInfo, name: str) -> bytes:
    disk = open_disk(Path(info.path, name), read_only=True)
    data = bytearray(disk.size)
    disk.readv(0, [memoryview(data)])
    disk.close()
    return bytes(data)


def refused(info: BackupInfo) -> str:
    assert info.state is BackupState.FAILED and info.error is not None
    assert info.error.endswith(".")
    return info.error


KINDS = [(plain, "copy-before-write"), (sharing, "reflink"), (btrfs, "reflink")]


@pytest.mark.parametrize(
    ("bench", "kept"), KINDS, indirect=["bench"], ids=["plain", "played", "btrfs"]
)
def test_all_disks_as_they_were_while_the_guest_was_frozen(bench: Bench, kept: str) -> None:
    bench.write(0, 0, 1)
    bench.write(1, 5 * CHUNK, 2)
    bench.on[FREEZE] = lambda: bench.write(1, 7 * CHUNK, 3)  # what was not written back yet

    def overwrite() -> None:
        for number in (0, 1):
            bench.write(number, 0, 9, SIZE)

    bench.on[THAW] = overwrite
    info = bench.run()
    assert info.error is None and info.warning is None
    assert info.consistency is Consistency.FILE_SYSTEM
    assert bench.asked == [CHECK, FREEZE, THAW]
    one, other = contents(info, "scsi0-0.vhdx"), contents(info, "scsi0-1.vhdx")
    assert one == b"\1" * CHUNK + bytes(SIZE - CHUNK)
    parts = {5: b"\2", 7: b"\3"}
    assert other == b"".join(parts.get(number, b"\0") * CHUNK for number in range(40))
    assert info.copied == info.size == 2 * SIZE
    assert 0 < info.pause_seconds < info.seconds
    assert not any(isinstance(cast("DiskUnit", each.unit).disk, Snapshot) for each in bench.drives)
    assert bench.told[-1] == ("backup", f"{info.path} is whole")
    manifest = json.loads(Path(info.path, "backup.json").read_text())
    assert load_config(json.dumps(manifest["machine"])) == bench.config
    assert [each["address"] for each in manifest["disks"]] == ["scsi0:0", "scsi0:1"]
    assert manifest["disks"][0]["source"] == str(bench.directory / "a.vhdx")
    assert kept_by(info) == [kept, kept]


@pytest.mark.parametrize("bench", [plain, sharing], indirect=True)
def test_an_incremental_backup_holds_what_is_different(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = iter(f"2026010{day}T000000Z" for day in range(1, 10))
    monkeypatch.setattr(time, "strftime", lambda *_: next(stamps))
    bench.write(0, 0, 1, 8 * CHUNK)
    first = bench.run(incremental=True)
    assert first.base is None, "there is none to build on"
    bench.write(0, 2 * CHUNK, 2)
    bench.drives[0].worker.call(
        lambda: cast("DiskUnit", bench.drives[0].unit).disk.unmap(4 * CHUNK, CHUNK)
    )
    second = bench.run(incremental=True)
    bench.write(1, 0, 3)
    third = bench.run(incremental=True)
    assert (second.base, third.base) == (first.path, second.path)
    assert (second.stored, third.stored) == (2 * CHUNK, CHUNK)
    expected = b"\1" * 2 * CHUNK + b"\2" * CHUNK + b"\1" * CHUNK + bytes(CHUNK)
    for info, b in ((second, b"\0"), (third, b"\3")):
        assert contents(info, "scsi0-0.vhdx") == expected + b"\1" * 3 * CHUNK + bytes(32 * CHUNK)
        assert contents(info, "scsi0-1.vhdx") == b * CHUNK + bytes(SIZE - CHUNK)
    assert contents(first, "scsi0-0.vhdx") == b"\1" * 8 * CHUNK + bytes(32 * CHUNK)
    disks = json.loads(Path(third.path, "backup.json").read_text())["disks"]
    assert disks[0]["parent"] == f"../{Path(second.path).name}/scsi0-0.vhdx"

    # A disk that is not what it was is copied whole; one whose earlier copy is gone cannot be.
    bench.storage.resize("scsi0:0", 2 * SIZE)
    fourth = bench.run(incremental=True)
    disks = json.loads(Path(fourth.path, "backup.json").read_text())["disks"]
    assert disks[0]["parent"] is None and disks[1]["parent"] is not None
    Path(first.path, "scsi0-1.vhdx").unlink()
    assert "Without --incremental" in refused(bench.run(incremental=True))
    assert bench.run().state is BackupState.DONE


@pytest.mark.parametrize("bench", [btrfs], indirect=True)
def test_a_child_is_kept_with_its_parent(bench: Bench) -> None:
    """The second file finds the parent as the image does; the guest's commands wait for nothing."""
    child = bench.directory / "child.vhdx"
    bench.write(0, 0, 1)
    bench.storage.remove("scsi0:0")
    create_disk(child, differencing_options(child, bench.directory / "a.vhdx")).close()
    bench.storage.add(DriveConfig(str(child)))
    bench.write(0, CHUNK, 2)
    bench.on[THAW] = lambda: bench.write(0, 0, 9, SIZE)
    info = bench.run()
    assert contents(info, "scsi0-0.vhdx") == b"\1" * CHUNK + b"\2" * CHUNK + bytes(38 * CHUNK)


@pytest.mark.parametrize("bench", [sharing], indirect=True)
@pytest.mark.parametrize("at", [2, 3, 4])
def test_where_sharing_fails_at_the_last_moment_the_old_way_is_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """As where the file system is full: once in preparing, or when it counts, for one or both."""
    real, calls = HostFile.share_with, list[int]()

    def share_with(self: HostFile, descriptor: int) -> None:
        calls.append(1)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, "no room")
        real(self, descriptor)

    monkeypatch.setattr(HostFile, "share_with", share_with)
    bench.write(1, 0, 5)
    bench.on[THAW] = lambda: bench.write(1, 0, 9, SIZE)
    info = bench.run()
    kept = ["copy-before-write" if at < 4 else "reflink", "copy-before-write"]
    assert info.error is None and kept_by(info) == kept
    assert contents(info, "scsi0-1.vhdx") == b"\5" * CHUNK + bytes(39 * CHUNK)
    bench.write(1, 0, 6)


@pytest.mark.parametrize("bench", [sharing], indirect=True)
def test_a_shared_copy_that_does_not_open_ends_the_backup(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SharedCopy) -> None:
        raise HvHostError("It is damaged; look at the file system.")

    monkeypatch.setattr(SharedCopy, "open", broken)
    assert "damaged" in refused(bench.run())
    assert bench.asked == [CHECK, FREEZE, THAW] and not bench.left()


def test_other_files_of_that_name_are_no_backups(bench: Bench) -> None:
    for number, text in enumerate(("", "[]", "{}", '{"machine": {"name": "m1"}, "disks": [1]}')):
        path = bench.directory / "backups" / f"m1-{number}"
        path.mkdir(parents=True)
        (path / "backup.json").write_text(text)
    info = bench.run(incremental=True)
    assert info.state is BackupState.DONE and info.base is None


def test_a_guest_without_a_daemon_is_backed_up_only_if_that_is_said(bench: Bench) -> None:
    bench.statuses = {CHECK: 0x80004005}
    assert "--crash-consistent" in refused(bench.run())
    assert bench.asked == [CHECK] and bench.left() == []
    info = bench.run(crash_consistent=True)
    assert info.state is BackupState.DONE and info.consistency is Consistency.CRASH
    assert bench.asked == [CHECK]


def test_a_guest_that_fails_to_freeze_is_thawed_and_not_backed_up(bench: Bench) -> None:
    bench.statuses = {FREEZE: 0x80004005}
    assert "could not freeze" in refused(bench.run())
    assert bench.asked == [CHECK, FREEZE, THAW] and bench.left() == []


def test_a_guest_is_thawed_whatever_goes_wrong(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem in (OSError(28, "No space left"), HvHostError("no."), ZeroDivisionError("a bug")):

        def fail(*_: object, problem: Exception = problem) -> None:
            raise problem

        monkeypatch.setattr("hvhost.storage.backup._snapshots", fail)
        bench.asked.clear()
        refused(bench.run())
        assert bench.asked == [CHECK, FREEZE, THAW] and bench.left() == []
        assert not bench.vss.state.frozen


def test_a_daemon_that_dies_while_frozen_is_told_of(bench: Bench) -> None:
    bench.statuses = {THAW: 0x80004005}
    info = bench.run()
    assert info.state is BackupState.DONE
    assert info.warning is not None and "may still be frozen" in info.warning
    assert bench.vss.state.frozen
    bench.statuses = {}
    bench.vss.tick(0.0)
    bench.answer()
    assert not bench.vss.state.frozen


def test_a_guest_that_was_thawed_too_early_is_not_backed_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvhost.storage import backup

    take = backup._snapshots

    def late(job: backup.Job, copies: list[backup.Copy]) -> None:
        take(job, copies)
        with bench.board.lock:
            bench.vss.tick(0.0)
            bench.vss.tick(FROZEN_SECONDS)
            bench.answer()

    monkeypatch.setattr(backup, "_snapshots", late)
    assert "did not stay frozen" in refused(bench.run())
    assert bench.left() == []


def test_a_machine_without_a_driver_says_so(bench: Bench) -> None:
    bench.board.guest.server.reset()
    assert "hv_utils" in refused(bench.run())


def test_a_paused_machine_is_backed_up_only_without_its_guest(bench: Bench) -> None:
    bench.board.paused = True
    with pytest.raises(HvHostError, match=r"'m1' is paused; `hvhost resume m1`"):
        bench.run()
    assert bench.asked == [] and bench.left() == []
    info = bench.run(crash_consistent=True)
    assert info.state is BackupState.DONE and bench.asked == []


def test_a_machine_that_is_paused_while_it_freezes(bench: Bench) -> None:
    bench.paused_over = FREEZE
    assert "is paused" in refused(bench.run())
    assert bench.left() == []
    bench.board.paused = False
    bench.answer()
    assert bench.asked == [CHECK, FREEZE, THAW] and not bench.vss.state.frozen


def test_a_machine_that_is_paused_while_it_is_thawed(bench: Bench) -> None:
    bench.paused_over = THAW
    info = bench.run()
    assert info.state is BackupState.DONE
    assert info.warning is not None and "is paused" in info.warning
    bench.answer()
    assert bench.asked == [CHECK, FREEZE, THAW] and not bench.vss.state.frozen


@contextmanager
def held_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backup under way that goes on at the end."""
    reached, go_on = threading.Event(), threading.Event()
    take = Snapshot.take

    def slow(snapshot: Snapshot, chunk: int) -> object:
        reached.set()
        go_on.wait(10.0)
        return take(snapshot, chunk)

    bench.write(0, 0, 1)
    monkeypatch.setattr(Snapshot, "take", slow)
    bench.backup.start(BackupOptions(str(bench.directory / "backups"), allow_same_volume=True))
    assert reached.wait(10.0)
    yield
    go_on.set()


def test_disks_stay_while_they_are_backed_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_copy(bench, monkeypatch):
        with pytest.raises(HvHostError, match="being backed up"):
            bench.storage.remove("scsi0:1")
        with pytest.raises(HvHostError, match="being backed up"):
            bench.storage.resize("scsi0:0", 2 * SIZE)
        with pytest.raises(HvHostError, match="is being backed up already; wait or cancel"):
            bench.run()
        assert bench.backup.progress().state is BackupState.COPYING
    assert bench.backup.progress(10.0).state is BackupState.DONE
    bench.storage.remove("scsi0:1")


def test_a_backup_that_is_cancelled_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_copy(bench, monkeypatch):
        bench.backup.cancel()
    assert "cancelled" in refused(bench.backup.progress(10.0))
    assert bench.left() == []


def test_a_machine_that_ends_gives_its_backup_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_copy(bench, monkeypatch):
        threading.Thread(target=bench.backup.close).start()
        while not bench.backup._job or not bench.backup._job.cancelled:
            pass
    assert "cancelled" in refused(bench.backup.progress(10.0))


def test_what_the_guest_overwrites_and_nobody_can_keep(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest goes on, and the backup is given up: it would hold what the guest wrote since."""

    def full(self: Whole, offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "no room")

    bench.write(1, 0, 1)
    with held_copy(bench, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(Whole, "put", full)
        bench.write(1, 0, 7)
    error = refused(bench.backup.progress(10.0))
    assert error.startswith("The backup of scsi0:1 failed, nothing of it is left: ")
    assert "no room" in error and bench.left() == []


def test_two_backups_in_one_second(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101T000000Z")
    bench.write(0, 0, 1)
    info = bench.run(crash_consistent=True)
    bench.write(0, 0, 2)
    with pytest.raises(HvHostError, match="m1-20260101T000000Z exists already; wait a second"):
        bench.run(crash_consistent=True)
    assert contents(info, "scsi0-0.vhdx")[:CHUNK] == b"\1" * CHUNK


def test_a_guest_that_does_not_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvhost.storage.backup._WAIT_SECONDS", 0.05)
    monkeypatch.setattr("hvhost.storage.backup._LOOK_SECONDS", 0.01)
    monkeypatch.setattr(bench, "answer", lambda: None)
    assert "did not answer HOT_BACKUP; see whether it hangs" in refused(bench.run())
    assert bench.left() == []


def test_a_machine_that_is_reset(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its guest was asked, and when that was frozen: another one runs then, which is not."""
    from hvhost.storage import backup

    bench.backup.detach()
    assert "is being reset; try again" in refused(bench.run())
    bench.backup.attach(cast("Computer", bench.board))
    take = backup._snapshots

    def reset(job: backup.Job, copies: list[backup.Copy]) -> None:
        take(job, copies)
        bench.backup.attach(cast("Computer", copy.copy(bench.board)))

    monkeypatch.setattr(backup, "_snapshots", reset)
    assert "did not stay frozen" in refused(bench.run())
    assert bench.left() == []


def test_what_an_incremental_backup_is_built_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only this machine's, though another's name may begin alike; disks that are new come whole."""
    stamps = iter(f"2026010{day}T000000Z" for day in range(1, 10))
    monkeypatch.setattr(time, "strftime", lambda *_: next(stamps))
    first = bench.run(crash_consistent=True)
    other = Path(first.path).with_name("m1-b-20260109T000000Z")
    shutil.copytree(first.path, other)
    manifest = json.loads((other / "backup.json").read_text())
    manifest["machine"]["name"] = "m1-b"
    (other / "backup.json").write_text(json.dumps(manifest))
    create_disk(bench.directory / "c.img", SIZE).close()
    bench.storage.add(DriveConfig(str(bench.directory / "c.img")))
    second = bench.run(crash_consistent=True, incremental=True)
    assert second.base == first.path
    disks = json.loads(Path(second.path, "backup.json").read_text())["disks"]
    earlier = f"../{Path(first.path).name}"
    assert [each["parent"] for each in disks] == [
        f"{earlier}/scsi0-0.vhdx",
        f"{earlier}/scsi0-1.vhdx",
        None,
    ]


def test_what_cannot_be_backed_up_is_refused_at_once(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(HvHostError, match="has not been backed up"):
        bench.backup.progress()
    with pytest.raises(HvHostError, match="--allow-same-volume"):
        bench.backup.start(BackupOptions(str(tmp_path)))
    with pytest.raises(HvHostError, match="absolute"):
        bench.backup.start(BackupOptions("backups"))
    for drive in bench.drives:
        bench.storage.remove(drive.address)
    with pytest.raises(HvHostError, match="no disks"):
        bench.backup.start(BackupOptions(str(tmp_path)))


def test_a_disk_that_cannot_be_held_keeps_no_other_for_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the one worker delivers answers, and who has the bus's lock waits for the other."""
    monkeypatch.setattr("hvhost.storage.backup._HOLD_SECONDS", 0.1)
    one, other = bench.drives
    busy, freed = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        assert freed.wait(10.0)

    threading.Thread(target=lambda: other.worker.call(work)).start()
    assert busy.wait(10.0)

    def needs_the_first() -> None:
        with one.worker.running:
            freed.set()

    held: list[float] = []
    ran: list[int] = []
    holder = threading.Thread(target=lambda: held.append(hold([one, other], lambda: ran.append(1))))
    holder.start()
    while not one.worker.running.locked():
        pass
    needs_the_first()
    holder.join(10.0)
    assert ran == [1] and len(held) == 1
