"""Disk images in use, and what crashes make of them.

The writes and flushes of a busy session are recorded. Then the file is made again as a crash could
leave it: at each write, with that one whole, torn between sectors, or missing, and with writes
since the last flush lost. Each time the disk must open, be clean, and hold in every sector what was
there at the last flush that returned, or something written after that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from uuid import UUID

from hvhost.errors import HvHostError
from hvhost.storage.vhd import VhdDisk
from hvhost.storage.vhd_create import VhdOptions, VhdParent, create_vhd
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_check import check_vhdx
from hvhost.storage.vhdx_compact import compact
from hvhost.storage.vhdx_create import VhdxOptions, create_vhdx
from hvhost.storage.vhdx_format import NO_GUID
from hvhost.storage.vhdx_layout import read_headers, read_replay
from simulated.image_files import SECTOR, Flush, MemoryFile, Operation, Write, apply

MIB, GIB = 1 << 20, 1 << 30
PIECE = 64 << 10  # a session writes pieces of this, each of one byte's value
_FEW = 4  # of so many writes since a flush, each is lost once by itself
UNIFORM = [bytes([value]) * PIECE for value in range(256)]
Image = VhdxDisk | VhdDisk
Opener = Callable[[MemoryFile], Image]


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

    def resize(self, size: int, new_pieces: list[int], torn: int | None = None) -> None:
        """*torn* may be anything until all is done."""
        self.sizes.add(size)
        for piece in new_pieces:
            self.allowed[piece] = {0}
            self.latest[piece] = 0
        if torn is not None:
            self.allowed[torn] = set(range(256))
        self.note()
        self.disk.resize(size)
        self.sizes = {size}
        for piece in [each for each in self.allowed if each * PIECE >= size]:
            del self.allowed[piece], self.latest[piece]
        self.flushed()

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
            if isinstance(self.disk, VhdxDisk):
                _check_log(MemoryFile(content), where)
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


def _check_log(file: MemoryFile, where: str) -> None:
    """Others take a log that is in use for damaged if no entry in it is whole; hvhost does not."""
    header, _, _ = read_headers(file)
    if header.log_guid != NO_GUID:
        assert read_replay(file, header).last_file_offset, f"{where}: the log is empty"


class Creation(Session):
    """An image being made, in a file that is empty before.

    Until it is whole it is refused; a VHDX is not even taken for one.
    """

    def __init__(self, create: Callable[[MemoryFile], None], opened: Callable[..., Image]) -> None:
        self.file = MemoryFile()
        self.base = b""
        create(self.file)
        self._made = len(self.file.recorded)
        self.file.clear(0, 0)  # nothing, but there is a crash after it
        self._opened = opened

    def examine(self, content: bytearray, operations: int, how: str) -> None:
        try:
            disk = self._opened(MemoryFile(content))
        except HvHostError as error:
            said = str(error)
            assert operations <= self._made, f"{how}: {said}"
            if self._opened is VhdxDisk:
                assert "is not a VHDX" in said or "too short to be a VHDX" in said, f"{how}: {said}"
            return
        assert disk.size == 4 * MIB
        assert all(value_of(disk, piece) == {0} for piece in range(64))
        disk.writev(PIECE, [memoryview(UNIFORM[1])])
        assert value_of(disk, 1) == {1}
        disk.close()


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
    for lost in range(len(epoch) if 1 < len(epoch) <= _FEW else 0):
        yield "one before lost", [*epoch[:lost], *epoch[lost + 1 :], operation]
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
    work(session)
    session.close()


def work(session: Session) -> None:
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


def vhd_image(parent: VhdParent | None = None, *, fixed: bool = False) -> bytes:
    file = MemoryFile()
    create_vhd(file, VhdOptions(4 * MIB, fixed, MIB, parent))
    return bytes(file.content)


def vhd_fixed() -> Session:
    """Where its footer was before, or was to be, a crash while it is resized may leave it."""
    session = Session(vhd_image(fixed=True), VhdDisk, list(range(64)))
    work(session)
    session.resize(5 * MIB, list(range(64, 80)), torn=64)
    session.write(64, 2, 10)
    session.resize(2 * MIB, [], torn=32)
    session.close()
    return session


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


def vhd_growing() -> Session:
    """Over what it held before it was made smaller, in a block and in the table."""
    before = Session(vhd_image(), VhdDisk, list(range(64)))
    before.write(32, 32, 1)
    before.resize(2 * MIB + PIECE, [])
    # As if the smaller size had become stable and nothing behind it.
    recorded = before.file.recorded
    (*_, cleared) = (
        number
        for number, each in enumerate(recorded)
        if isinstance(each, Write) and each.data[:4] == b"\xff" * 4  # entries of the table
    )
    content = bytearray(before.base)
    apply(content, recorded[:cleared])
    session = Session(bytes(content), VhdDisk, list(range(33)))
    assert session.disk.size == 2 * MIB + PIECE
    session.resize(2 * MIB + 8 * PIECE, list(range(33, 40)))
    session.resize(4 * MIB, list(range(40, 64)))
    session.write(39, 10, 2)
    session.close()
    return session


def compacting() -> Session:
    session = Session(filled(new_image(size=4 * MIB), 0xDD), plain, list(range(64)))
    session.write(50, 2, 1)
    session.write(0, 32, 0)
    session.unmap(32, 16)
    session.flush()
    assert isinstance(session.disk, VhdxDisk)
    compact(session.disk, lambda done, total: None)
    assert session.file.size() == 5 * MIB, "4 MiB of metadata, one block"
    session.flushed()
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


def creating() -> Session:
    return Creation(lambda file: create_vhdx(file, VhdxOptions(4 * MIB, block_size=MIB)), VhdxDisk)


def creating_fixed() -> Session:
    options = VhdxOptions(4 * MIB, fixed=True, block_size=MIB)
    return Creation(lambda file: create_vhdx(file, options), VhdxDisk)


def vhd_creating() -> Session:
    return Creation(lambda file: create_vhd(file, VhdOptions(4 * MIB, block_size=MIB)), VhdDisk)


def vhd_creating_fixed() -> Session:
    return Creation(lambda file: create_vhd(file, VhdOptions(4 * MIB, fixed=True)), VhdDisk)


SESSIONS = [
    creating,
    creating_fixed,
    vhd_creating,
    vhd_creating_fixed,
    recovering,
    dynamic,
    fixed,
    differencing,
    resizing,
    table_moving,
    compacting,
    vhd_fixed,
    vhd_dynamic,
    vhd_differencing,
    vhd_resizing,
    vhd_growing,
]
