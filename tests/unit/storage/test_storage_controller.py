"""A machine's drives: what people do to them, and what its guest sees of it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.computer import Computer
from hvhost.machine.config_file import dump_config, load_config
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.machine.storage_model import DriveConfig, DriveKind, FibreChannelConfig
from hvhost.manager.storage import parse_drive, with_storage
from hvhost.partition.memory import GuestMemory
from hvhost.storage.controller import Storage
from hvhost.storage.images import create_disk
from hvhost.storage.names import default_names
from hvhost.storage.protocol import HV_SCSI_GUID, HV_SYNTHFC_GUID
from hvhost.verify.iso import iso_image
from hvhost.vmbus.server import VmbusServer
from simulated.driver import SimulatedGuest
from simulated.storage import Interrupts, StorageDriver, StorageHost

MIB = 1 << 20
CONFIG = MachineConfig("m1", "/vmlinuz")


@dataclass
class Board:
    """As much of a computer as storage uses, with a simulated guest on its bus."""

    guest: SimulatedGuest = field(default_factory=lambda: SimulatedGuest(pages=1024))
    lock: threading.RLock = field(default_factory=threading.RLock)
    config: MachineConfig = CONFIG

    @property
    def memory(self) -> GuestMemory:
        return self.guest.memory

    @property
    def bus(self) -> VmbusServer:
        return self.guest.server

    def memory_written(self, views: Sequence[memoryview]) -> None:
        """Nobody's translations of this memory have to be thrown away."""


class Bench:
    """A machine's storage, and its guest's drivers."""

    def __init__(self, config: MachineConfig) -> None:
        self.told: list[tuple[str, str]] = []
        self.storage = Storage(
            Surroundings(config, Loop(), Path(), lambda *event: self.told.append(event))
        )
        self.boot()

    def boot(self) -> None:
        self.board = Board()
        self.board.guest.port.interrupts = Interrupts()
        self.storage.attach(cast("Computer", self.board))
        self.board.guest.connect()

    def reset(self) -> None:
        with self.board.lock:
            self.board.guest.server.reset()
        self.storage.detach()
        self.boot()

    def driver(self, relid: int | None = None) -> StorageDriver:
        """The driver of a controller, by default of the one that was offered last."""
        self.board.guest.collect_offers()
        if relid is None:
            relid = max(self.board.guest.offers)
        with self.board.lock:
            channel = self.board.guest.open(relid, out_pages=33, in_pages=33)
        driver = StorageDriver(cast("StorageHost", self.board), channel)
        driver.initialize()
        return driver


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    create_disk(path, MIB).close()
    return path


@pytest.fixture
def bench() -> Iterator[Bench]:
    built = Bench(CONFIG)
    yield built
    with built.board.lock:
        built.board.guest.server.reset()
    built.storage.detach()
    built.storage.close()
    assert not built.board.guest.faults


def disk(path: Path, **options: object) -> DriveConfig:
    return replace(DriveConfig(str(path)), **options)  # type: ignore[arg-type] # passed on


def test_a_machine_without_drives_has_no_controller(bench: Bench) -> None:
    assert bench.storage.drives() == [] and bench.board.guest.offers == {}


def test_a_drive_added_while_the_guest_runs(bench: Bench, image: Path) -> None:
    info = bench.storage.add(disk(image))
    assert (info.address, info.size, info.path) == ("scsi0:0", MIB, str(image))
    driver = bench.driver()
    assert driver.channel.offer.if_type == HV_SCSI_GUID and driver.luns() == [0]
    assert driver.inquire(0x83).data[8:24].hex() == info.wwn
    assert driver.write(1, b"a" * 512).ok
    assert image.read_bytes()[512:1024] == b"a" * 512


def test_controllers_with_all_their_places_taken(bench: Bench, tmp_path: Path) -> None:
    names = ("scsi0", "scsi1", "fc0")
    for name in names:
        for lun in range(64):
            path = tmp_path / f"{name}-{lun}.img"
            path.write_bytes(path.name.encode().ljust(512, b"\0"))
            assert bench.storage.add(disk(path, controller=name)).address == f"{name}:{lun}"
        with pytest.raises(HvHostError, match=f"{name} has 64 drives; use another controller"):
            bench.storage.add(disk(path, controller=name))
    assert len(bench.storage.drives()) == 192
    bench.board.guest.collect_offers()
    found = []
    for relid in sorted(bench.board.guest.offers):
        driver = bench.driver(relid)
        assert driver.luns() == list(range(64))
        for lun in (0, 40, 63):
            cdb = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0)
            found.append(driver.command(cdb, lun=lun, read=512).data.rstrip(b"\0").decode())
    assert found == [f"{name}-{lun}.img" for name in names for lun in (0, 40, 63)]


def test_removing_gives_the_image_back_and_tells_the_guest(
    bench: Bench, image: Path, tmp_path: Path
) -> None:
    bench.storage.add(disk(image, lun=7))
    driver = bench.driver()
    with pytest.raises(HvHostError, match="this process"):
        bench.storage.add(disk(image))
    assert bench.storage.remove("scsi0:7").path == str(image)
    driver.look()
    assert driver.notices == [11] and driver.luns() == []
    assert driver.command(bytes(6), lun=7).srb_status == 0x20
    assert bench.storage.add(disk(image, lun=7)).address == "scsi0:7"
    assert driver.luns() == [7]


def test_a_new_drive_is_not_put_where_the_guest_still_sees_the_old_one(
    bench: Bench, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.storage.add(disk(image))
    driver = bench.driver()
    bench.storage.remove("scsi0:0")
    assert bench.storage.add(disk(image)).address == "scsi0:1"
    assert driver.command(bytes(6)).srb_status == 0x20  # now it knows
    other = tmp_path / "other.img"
    create_disk(other, MIB).close()
    assert bench.storage.add(disk(other)).address == "scsi0:0"
    # A place that is asked for is waited for, but not for ever.
    bench.storage.remove("scsi0:0")
    monkeypatch.setattr("hvhost.storage.controller._LEAVING_SECONDS", 0.05)
    assert bench.storage.add(disk(other, lun=0)).address == "scsi0:0"


def test_drives_outlive_a_reset_and_empty_controllers_do_not(bench: Bench, image: Path) -> None:
    bench.storage.add(disk(image))
    driver = bench.driver()
    caching = bytes((0, 0, 0, 0, 8, 18)) + bytes(18)
    assert driver.command(bytes((0x15, 0x10, 0, 0, len(caching), 0)), write=caching).ok
    bench.reset()
    driver = bench.driver()
    assert driver.luns() == [0]
    assert driver.command(bytes((0x1A, 8, 8, 0, 64, 0)), read=64).data[6] & 4
    bench.storage.remove("scsi0:0")
    bench.reset()
    assert bench.board.guest.offers == {}


def test_resizing(bench: Bench, tmp_path: Path) -> None:
    from hvhost.storage.vhdx_create import VhdxOptions

    path = tmp_path / "disk.vhdx"
    create_disk(path, VhdxOptions(4 * MIB, block_size=MIB)).close()
    bench.storage.add(disk(path))
    driver = bench.driver()
    assert bench.storage.resize("scsi0:0", 8 * MIB).size == 8 * MIB
    assert driver.command(bytes(6)).key == (6, 0x2A, 9)
    driver.look()
    assert driver.notices == [11]
    assert driver.write(15000, b"z" * 512).ok
    with pytest.raises(HvHostError, match="would be lost"):
        bench.storage.resize("scsi0:0", 4 * MIB)
    assert bench.storage.resize("scsi0:0", 4 * MIB, shrink=True).size == 4 * MIB


def test_a_disk_shrinks_to_its_last_partition(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    create_disk(path, 8 * MIB).close()
    bench.storage.add(disk(path))
    table = bytearray(512)
    table[446:462] = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 3 * 2048)
    table[510:] = b"\x55\xaa"
    assert bench.driver().write(0, bytes(table)).ok
    with pytest.raises(HvHostError, match=f"partitions up to {4 * MIB}"):
        bench.storage.resize("scsi0:0", 4 * MIB - 512, shrink=True)
    assert bench.storage.resize("scsi0:0", 4 * MIB, shrink=True).size == 4 * MIB
    assert bench.storage.resize("scsi0:0", MIB, shrink=True, force=True).size == MIB


def test_a_dvd_drive(bench: Bench, tmp_path: Path) -> None:
    image = tmp_path / "a.iso"
    image.write_bytes(iso_image("test", {"A.TXT": b"hello"}))
    address = bench.storage.add(DriveConfig(None, DriveKind.DVD)).address
    driver = bench.driver()
    assert driver.command(bytes(6)).key == (2, 0x3A, 0)
    bench.storage.insert(address, str(image))
    assert driver.command(bytes(6)).key == (6, 0x28, 0)
    assert driver.read(16, 1, size=2048).data[1:6] == b"CD001"
    assert driver.command(bytes((0x1E, 0, 0, 0, 1, 0))).ok
    with pytest.raises(HvHostError, match="unmount"):
        bench.storage.eject(address)
    assert bench.storage.drives()[0].locked
    assert bench.storage.eject(address, force=True).path is None
    assert driver.command(bytes(6)).key == (6, 0x28, 0)
    assert driver.command(bytes(6)).key == (2, 0x3A, 0)
    assert bench.storage.drives()[0].locked, "the guest still holds what is not there any more"
    assert bench.storage.eject(address).path is None
    bench.storage.insert(address, str(image))
    assert driver.command(bytes((0x1E, 0, 0, 0, 0, 0))).key == (6, 0x28, 0)
    assert driver.command(bytes((0x1E, 0, 0, 0, 0, 0))).ok
    assert bench.storage.eject(address).path is None


def test_limits_are_shown(bench: Bench, image: Path) -> None:
    bench.storage.add(disk(image, iops=100))
    assert bench.storage.limit("scsi0:0", 0, MIB).bandwidth == MIB
    (info,) = bench.storage.drives()
    assert (info.iops, info.bandwidth) == (0, MIB)


def test_fibre_channel(bench: Bench, image: Path) -> None:
    info = bench.storage.add(disk(image, controller="fc0", lun=2))
    assert info.adapter == default_names("m1", 0)
    driver = bench.driver()
    assert driver.channel.offer.if_type == HV_SYNTHFC_GUID
    status, body = driver.operate(12)
    assert status == 0 and body[4:12].hex() == info.adapter.port_name
    assert driver.luns() == [2]


def test_a_block_device_of_the_host_behind_fibre_channel(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "lun"
    file.write_bytes(os.urandom(MIB))
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", file], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no block device can be made here, which takes root and losetup: {error}")
    device = Path(made.stdout.strip())
    try:
        info = bench.storage.add(disk(device, controller="fc0", lun=1))
        assert info.size == MIB
        driver = bench.driver()
        data = os.urandom(4096)
        write, read = (struct.pack(">BBIBHB", opcode, 0, 16, 0, 8, 0) for opcode in (0x2A, 0x28))
        assert driver.command(write, lun=1, write=data).ok
        assert driver.command(read, lun=1, read=4096).data == data
        assert driver.command(bytes((0x35,)) + bytes(9), lun=1).ok
        assert file.read_bytes()[16 * 512 :][:4096] == data
        bench.storage.remove("fc0:1")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_adapters_of_the_configuration(image: Path) -> None:
    names = FibreChannelConfig("50014380186b1c2d", "50014380186b1c2e")
    config = replace(CONFIG, fibre_channel=(names,), drives=(disk(image, controller="fc0"),))
    assert load_config(dump_config(config)) == config
    bench = Bench(config)
    assert bench.storage.drives()[0].adapter == names
    bench.storage.remove("fc0:0")
    bench.reset()
    assert len(bench.board.guest.offers) == 1
    bench.storage.detach()
    bench.storage.close()


@pytest.mark.parametrize(
    ("drive", "words"),
    [
        (DriveConfig("/nowhere", controller="ide0"), "'ide0' is no controller"),
        (DriveConfig("/nowhere", lun=64), "LUN 64 does not exist"),
        (DriveConfig("/nowhere", lun=-1), "LUN -1 does not exist"),
        (DriveConfig(None), "has no image file"),
        (DriveConfig("/nowhere", image_format="zip"), "'zip' is no format"),
    ],
)
def test_drives_that_cannot_be(bench: Bench, drive: DriveConfig, words: str) -> None:
    with pytest.raises(HvHostError, match=words):
        bench.storage.add(drive)
    assert bench.storage.drives() == []


def test_a_file_that_is_not_there_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(FileNotFoundError):
        bench.storage.add(DriveConfig("/nowhere/disk.img"))
    assert bench.storage.drives() == [] and bench.board.guest.server.channels == ()


def test_drives_that_are_not_what_is_asked(bench: Bench, image: Path) -> None:
    bench.storage.add(disk(image))
    bench.storage.add(DriveConfig(None, DriveKind.DVD))
    with pytest.raises(HvHostError, match=r"there are: scsi0:0, scsi0:1"):
        bench.storage.remove("scsi0:9")
    with pytest.raises(HvHostError, match="is a disk"):
        bench.storage.eject("scsi0:0")
    with pytest.raises(HvHostError, match="is a DVD drive"):
        bench.storage.resize("scsi0:1", MIB)
    with pytest.raises(HvHostError, match="has a drive already"):
        bench.storage.add(disk(image, lun=1))


@pytest.mark.parametrize(
    ("text", "drive"),
    [
        ("/a/b.img", DriveConfig("/a/b.img")),
        (
            "/a.vhdx,controller=scsi1,lun=5,readonly,iops=9,bandwidth=2M,full=pause,format=raw",
            DriveConfig(
                "/a.vhdx",
                controller="scsi1",
                lun=5,
                read_only=True,
                image_format="raw",
                iops=9,
                bandwidth=2 * MIB,
                pause_when_full=True,
            ),
        ),
    ],
)
def test_drives_as_people_write_them(text: str, drive: DriveConfig) -> None:
    assert parse_drive(text, DriveKind.DISK) == drive


@pytest.mark.parametrize("text", ["", "a,lun=x", "a,lun=", "a,speed=1", "a,readonly=1", "a,full=x"])
def test_drives_nobody_can_mean(text: str) -> None:
    with pytest.raises(HvHostError):
        parse_drive(text, DriveKind.DISK)


def test_storage_of_a_new_machine() -> None:
    config = with_storage(CONFIG, ["/a.img"], [""], ["auto", "50014380186b1c2d:50014380186b1c2e"])
    assert [drive.kind for drive in config.drives] == [DriveKind.DISK, DriveKind.DVD]
    assert config.drives[1].path is None
    assert config.fibre_channel[0] == default_names("m1", 0)
    assert config.fibre_channel[1].node_name == "50014380186b1c2e"
    for wrong in ("5001", "50014380186b1c2d", "xyz:xyz"):
        with pytest.raises(HvHostError, match="world-wide name"):
            with_storage(CONFIG, (), (), [wrong])


_KILLED = """
import os, sys, struct
from pathlib import Path
from hvhost.storage.block import DiskUnit
from hvhost.storage.images import open_disk
from simulated.storage import StorageHost

driver = StorageHost.build(DiskUnit(open_disk(Path(sys.argv[1])))).connect()
for number in range(40):
    assert driver.write(number * 64, bytes((number + 1,)) * 32768).ok
assert driver.command(bytes((0x35,)) + bytes(9)).ok
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["img", "vhdx"])
def test_what_was_flushed_survives_the_end_of_the_process(tmp_path: Path, kind: str) -> None:
    from hvhost.storage.images import open_disk
    from hvhost.storage.vhdx_create import VhdxOptions

    path = tmp_path / f"disk.{kind}"
    size = 4 * MIB
    create_disk(path, size if kind == "img" else VhdxOptions(size, block_size=MIB)).close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path)], env=environment, check=False, timeout=60
    )
    assert done.returncode == -9
    opened = open_disk(path)
    for number in range(40):
        buffer = bytearray(32768)
        opened.readv(number * 32768, [memoryview(buffer)])
        assert buffer == bytes((number + 1,)) * 32768
    opened.close()
