"""Crash safety: every cut through the writes of an image leaves a disk that opens and is whole.

The writes and flushes of a busy session are recorded. Then the file is made again as a crash could
leave it: at each write, with that one whole, torn between sectors, or missing, and with writes
since the last flush lost. Each time the disk must open, be clean, and hold in every sector what was
there at the last flush that returned, or something written after that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from hvhost.errors import HvHostError
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_check import check_vhdx
from hvhost.storage.vhdx_compact import compact
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from simulated.image_files import SECTOR, Flush, MemoryFile, Operation, Write, apply

MIB, GIB = 1 << 20, 1 << 30
PIECE = 64 << 10  # a session writes pieces of this, each of one byte's value
UNIFORM = [bytes([value]) * PIECE for value in range(256)]
Image = VhdxDisk | VhdDisk
Opener = Callable[[MemoryFile], Image]
IgnoreFlush = Callable[[list[Operation]], bool]


def value_of(disk: Image, piece: int) -> set[int]:
    data = bytearray(PIECE)
    disk.readv(piece * PIECE, [memoryview(data)])
    return {data[0]} if data == UNIFORM[data[0]] else set(data)


def data_guid(disk: Image) -> UUID | None:
    return disk.journal.header.data_write_guid if isinstance(disk, VhdxDisk) else None


class Session:
    """A disk in use; knows what a reader may find after a crash, for each moment."""

    def __init__(self, content: bytes, opened: Opener, pieces: list[int]) -> None:
        self.file = MemoryFile(content)
        self.base = bytes(content)
        self.opened = opened
        self.disk = opened(self.file)
        self.guid = data_guid(self.disk)
        self.first = {piece: value_of(self.disk, piece) for piece in pieces}
        self.allowed = {piece: set(values) for piece, values in self.first.items()}
        self.latest = {piece: min(values) for piece, values in self.first.items()}
        self.sizes = {self.disk.size}
        self.moments: list[tuple[int, dict[int, set[int]], set[int]]] = []
        self.note()
        self.moments[0] = (0, *self.moments[0][1:])  # opening may have replayed a log

    def note(self) -> None:
        """From the next operation of the file on, this is what a crash may leave."""
        allowed = {piece: set(values) for piece, values in self.allowed.items()}
        self.moments.append((len(self.file.recorded), allowed, set(self.sizes)))

    def _change(self, piece: int, count: int, value: int) -> None:
        for each in range(piece, piece + count):
            self.allowed[each].add(value)
            self.latest[each] = value
        self.note()

    def write(self, piece: int, count: int, value: int) -> None:
        self._change(piece, count, value)
        self.disk.writev(piece * PIECE, [memoryview(bytes([value]) * (count * PIECE))])

    def unmap(self, piece: int, count: int) -> None:
        self._change(piece, count, 0)
        self.disk.unmap(piece * PIECE, count * PIECE)

    def flushed(self) -> None:
        self.allowed = {piece: {value} for piece, value in self.latest.items()}
        self.note()

    def flush(self) -> None:
        self.disk.flush()
        self.flushed()

    def resize(self, size: int, new_pieces: list[int]) -> None:
        self.flush()
        self.sizes.add(size)
        for piece in new_pieces:
            self.allowed[piece] = {0}
            self.latest[piece] = 0
        self.note()
        self.disk.resize(size)
        self.sizes = {size}
        for piece in [each for each in self.allowed if each * PIECE >= size]:
            del self.allowed[piece], self.latest[piece]
        self.note()

    def close(self) -> None:
        self.disk.close()
        self.flushed()

    # --- crashes ------------------------------------------------------------------------------

    def examine(self, content: bytearray, operations: int, how: str) -> None:
        """After a crash that left *content* when that many operations had been issued."""
        _, allowed, sizes = [each for each in self.moments if each[0] <= operations][-1]
        where = f"{how} at operation {operations}"
        # Each way a user can come back: to go on, and now and then only to look at it.
        for read_only in (False,) if operations % 3 else (False, True):
            disk = type(self.disk)(MemoryFile(content), read_only=read_only)
            if self.disk.parent is not None:
                disk.attach(self.disk.parent)
            if isinstance(disk, VhdxDisk):
                report = check_vhdx(disk)
                assert report.clean, f"{where}: {report.errors}"
            assert disk.size in sizes, where
            changed = False
            for piece, values in allowed.items():
                if (piece + 1) * PIECE <= disk.size:
                    found = value_of(disk, piece)
                    assert found <= values, f"{where}: {found} in {piece}, not {values}"
                    changed |= found != self.first.get(piece, {0})
            # A child of this disk must be able to see that it is another now.
            if changed and isinstance(disk, VhdxDisk):
                assert data_guid(disk) != self.guid, where
            disk.close()

    def crashes(self, chance: random.Random) -> Iterator[tuple[bytearray, int, str]]:
        """What each crash leaves, after how many operations, and how it came."""
        stable = bytearray(self.base)
        epoch: list[Operation] = []  # since the last flush
        for number, operation in enumerate(self.file.recorded, 1):
            if isinstance(operation, Flush):
                apply(stable, epoch)
                epoch = []
                continue
            for how, kept in _outcomes(epoch, operation, chance):
                content = bytearray(stable)
                apply(content, kept)
                yield content, number, how
            epoch.append(operation)
        apply(stable, epoch)
        yield stable, len(self.file.recorded), "the end"

    def examine_all(self) -> int:
        """Every crash; how many there were."""
        count = 0
        for content, operations, how in self.crashes(random.Random(1)):
            self.examine(content, operations, how)
            count += 1
        return count


def _outcomes(
    epoch: list[Operation], operation: Operation, chance: random.Random
) -> Iterator[tuple[str, list[Operation]]]:
    """What may have reached the disk of *epoch* and the *operation* after it."""
    yield "prefix", [*epoch, operation]
    if epoch:
        yield "all before lost", [operation]
        some = [each for each in epoch if chance.random() < 0.5]
        yield "some before lost", [*some, operation]
        yield "some before lost, and it", some
    if isinstance(operation, Write) and len(operation.data) > SECTOR:
        sectors = [
            Write(operation.offset + start, operation.data[start : start + SECTOR])
            for start in range(0, len(operation.data), SECTOR)
        ]
        yield "torn in the middle", [*epoch, *sectors[: len(sectors) // 2]]
        yield "torn before its end", [*epoch, *sectors[:-1]]
        yield "torn anywhere", [*epoch, *(each for each in sectors if chance.random() < 0.5)]


# --- sessions -----------------------------------------------------------------------------------


def new_image(**options: object) -> bytes:
    file = MemoryFile()
    create_vhdx(file, VhdxOptions(**{"block_size": MIB, **options}))  # type: ignore[arg-type]
    return bytes(file.content)


def filled(content: bytes, value: int) -> bytes:
    """The image, with its first three blocks full of *value* and the log closed."""
    file = MemoryFile(content)
    disk = VhdxDisk(file)
    disk.writev(0, [memoryview(bytes([value]) * (3 * MIB))])
    disk.close()
    return bytes(file.content)


def plain(file: MemoryFile) -> VhdxDisk:
    return VhdxDisk(file)


PARENT = filled(new_image(size=4 * MIB), 0xAA)


def with_parent(file: MemoryFile) -> VhdxDisk:
    disk = VhdxDisk(file)
    disk.attach(VhdxDisk(MemoryFile(PARENT), read_only=True))
    return disk


def use(session: Session) -> None:
    """New blocks, blocks written over, parts and wholes unmapped, places used again."""
    session.write(0, 1, 1)
    session.write(40, 12, 2)
    session.flush()
    session.write(1, 2, 3)
    session.write(0, 1, 4)
    session.unmap(40, 2)
    session.flush()
    session.unmap(0, 16)
    session.write(20, 1, 5)
    session.flush()
    session.write(56, 8, 6)
    session.unmap(50, 4)
    session.write(0, 16, 7)
    session.flush()
    session.write(63, 1, 8)
    session.close()


def dynamic() -> Session:
    session = Session(new_image(size=4 * MIB), plain, list(range(64)))
    use(session)
    return session


def fixed() -> Session:
    session = Session(filled(new_image(size=4 * MIB, fixed=True), 0xBB), plain, list(range(64)))
    use(session)
    return session


def differencing() -> Session:
    content = new_image(size=4 * MIB, locator={"parent_linkage": "any"})
    session = Session(content, with_parent, list(range(64)))
    use(session)
    return session


def resizing() -> Session:
    session = Session(filled(new_image(size=4 * MIB), 0xCC), plain, list(range(64)))
    session.write(60, 4, 1)
    session.resize(6 * MIB, list(range(64, 96)))
    session.write(90, 4, 2)
    session.flush()
    session.resize(2 * MIB + PIECE, [])
    session.write(32, 1, 3)
    session.resize(3 * MIB, list(range(33, 48)))
    session.close()
    return session


def table_moving() -> Session:
    """128 GiB fill a table of 1 MiB; more need another place for it."""
    pieces = [0, 1, 16, (100 * GIB) // PIECE]
    session = Session(new_image(size=128 * GIB), plain, pieces)
    session.write(0, 2, 1)
    session.write(pieces[-1], 1, 2)
    session.resize(129 * GIB, [129 * GIB // PIECE - 1])
    session.write(129 * GIB // PIECE - 1, 1, 3)
    session.write(16, 1, 4)
    session.flush()
    session.close()
    return session


def vhd_image(parent: VhdParent | None = None) -> bytes:
    file = MemoryFile()
    create_vhd(file, VhdOptions(4 * MIB, block_size=MIB, parent=parent))
    return bytes(file.content)


def vhd_dynamic() -> Session:
    session = Session(vhd_image(), VhdDisk, list(range(64)))
    use(session)
    return session


def vhd_differencing() -> Session:
    def opened(file: MemoryFile) -> VhdDisk:
        disk = VhdDisk(file)
        disk.attach(VhdxDisk(MemoryFile(PARENT), read_only=True))
        return disk

    session = Session(vhd_image(VhdParent(bytes(16), "a", "b")), opened, list(range(64)))
    use(session)
    return session


def vhd_resizing() -> Session:
    """The table has room for 128 blocks: one more needs another place for it."""
    session = Session(vhd_image(), VhdDisk, list(range(64)))
    session.write(60, 4, 1)
    session.resize(6 * MIB, list(range(64, 96)))
    session.write(90, 4, 2)
    session.resize(129 * MIB, list(range(96, 100)))
    session.write(96, 4, 3)
    session.flush()
    session.resize(2 * MIB + PIECE, [])
    session.write(32, 1, 4)
    session.close()
    return session


def compacting() -> Session:
    session = Session(filled(new_image(size=4 * MIB), 0xDD), plain, list(range(64)))
    session.write(50, 2, 1)
    session.unmap(0, 16)
    session.flush()
    assert isinstance(session.disk, VhdxDisk)
    compact(session.disk, lambda done, total: None)
    session.write(5, 1, 2)
    session.flush()
    session.close()
    return session


def recovering() -> Session:
    """The crash comes while the log of an earlier crash is replayed."""
    before = differencing()
    entries = [
        number
        for number, each in enumerate(before.file.recorded)
        if isinstance(each, Write) and each.data[:4] == b"loge"
    ]
    content = bytearray(before.base)
    apply(content, before.file.recorded[: entries[-2] + 2])  # one entry and its flush, no more
    session = Session(bytes(content), with_parent, list(range(64)))
    assert len(session.file.recorded) > 2
    session.write(3, 2, 9)
    session.close()
    return session


SESSIONS = [
    recovering,
    dynamic,
    fixed,
    differencing,
    resizing,
    table_moving,
    compacting,
    vhd_dynamic,
    vhd_differencing,
    vhd_resizing,
]


@pytest.mark.parametrize("use_a_disk", SESSIONS, ids=lambda each: each.__name__)
def test_every_crash_leaves_a_whole_disk(use_a_disk: Callable[[], Session]) -> None:
    assert use_a_disk().examine_all() > 40


def last_write(recorded: list[Operation]) -> bytes:
    return next((each.data for each in reversed(recorded) if isinstance(each, Write)), b"")


FLUSHES: dict[str, IgnoreFlush] = {
    "before a log entry": lambda done: last_write(done)[:4] not in (b"loge", b"head"),
    "after a log entry": lambda done: last_write(done)[:4] == b"loge",
    "after a header": lambda done: last_write(done)[:4] == b"head",
    "after a guest's data, in a VHD": lambda done: len(set(last_write(done)[:PIECE])) == 1,
}


SUFFERS = {"after a header": fixed, "after a guest's data, in a VHD": vhd_differencing}


@pytest.mark.parametrize("left_out", FLUSHES)
def test_a_flush_left_out_is_found(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the flushes that the order is made of, some crash does harm."""
    honest = MemoryFile.flush

    def flush(self: MemoryFile) -> None:
        if not FLUSHES[left_out](self.recorded):
            honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "flush", flush)
        session = SUFFERS.get(left_out, differencing)()
    with pytest.raises((AssertionError, HvHostError)):
        session.examine_all()
