"""A machine's storage in a process of its own: the guest sees no difference."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvhost.errors import GuestMemoryError, HvHostError, RemoteProtocolError
from hvhost.machine.storage_model import DriveConfig
from hvhost.partition.memory import PAGE_SIZE
from hvhost.storage.images import create_disk
from hvhost.vmbus.protocol import OpenChannel, OpenChannelResult
from simulated.driver import GuestService
from simulated.elsewhere import MORE, SECONDS, MachineElsewhere
from simulated.storage import StorageDriver

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    create_disk(path, MIB).close()
    return path


@pytest.fixture
def bench(tmp_path: Path, image: Path) -> Iterator[MachineElsewhere]:
    bench = MachineElsewhere(tmp_path, DriveConfig(str(image)))
    yield bench
    bench.close()


def initialized(bench: MachineElsewhere) -> StorageDriver:
    driver = bench.driver()
    driver.initialize()
    return driver


def test_data_go_between_guest_and_image(bench: MachineElsewhere, image: Path) -> None:
    driver = initialized(bench)
    assert driver.luns() == [0]
    data = os.urandom(64 << 10)
    assert driver.write(8, data, shape=(100, False, 1)).ok
    assert driver.read(8, 128).data == data
    assert driver.command(bytes((0x35,)) + bytes(9)).ok
    assert image.read_bytes()[4096:][: len(data)] == data
    assert not bench.board.written and not bench.guest.faults
    status = Path(f"/proc/{bench.storage.process.pid}/status").read_text()
    assert "\nNoNewPrivs:\t1\n" in status and "\nSeccomp:\t2\n" in status


def test_many_at_once_on_all_channels(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    (first,) = bench.relids()
    assert driver.operate(13, struct.pack("<H", 1))[0] == 0
    bench.until(lambda: len(bench.relids()) == 2, "the sub-channel's offer")
    sub = bench.driver(bench.relids()[-1])
    assert sub.channel.offer.sub_channel_index == 1 and bench.relids()[0] == first
    tags = []
    for number in range(64):
        cdb = struct.pack(">BBIBHB", 0x2A, 0, number, 0, 1, 0)
        tags.append((driver, sub)[number % 2].start(cdb, write=bytes([number]) * 512))
    for number, tag in enumerate(tags):
        assert (driver, sub)[number % 2].finish(tag).ok
    assert driver.read(0, 64).data == b"".join(bytes([number]) * 512 for number in range(64))
    # The guest closes the first channel: the others go with it, and come again.
    with bench.lock:
        bench.guest.close(first)
    bench.until(lambda: bench.guest.take_rescinds(), "the sub-channel's end")
    again = bench.driver(first)
    again.initialize()
    assert again.operate(13, struct.pack("<H", 1))[0] == 0
    bench.until(lambda: len(bench.relids()) == 2, "the sub-channel's second offer")


def test_a_sub_channel_that_goes_while_it_is_opened(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    (first,) = bench.relids()
    assert driver.operate(13, struct.pack("<H", 1))[0] == 0
    bench.until(lambda: len(bench.relids()) == 2, "the sub-channel's offer")
    sub = bench.relids()[-1]
    with bench.lock:  # so neither the bus nor the guest knows yet that it is gone
        pfns = bench.guest.allocate(8)
        handle, _ = bench.guest.make_gpadl(sub, [(8 * PAGE_SIZE, 0, pfns)])
        bench.guest.close(first)
        bench.guest.post(OpenChannel(sub, sub, handle, 0, 4))
        assert bench.guest.reply(OpenChannelResult).status != 0
    assert "its device is gone" in bench.guest.faults[0]
    bench.until(lambda: bench.guest.take_rescinds() == [sub], "the sub-channel's end")
    again = bench.driver(first)
    again.initialize()
    assert again.luns() == [0]


def test_the_guest_is_interrupted_where_it_wants(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    relid, interrupts = driver.channel.offer.child_relid, bench.guest.port.interrupts
    bench.until(lambda: (0, relid) in interrupts, "an interrupt")
    for vp in (3, 1):
        with bench.lock:
            assert bench.guest.move(relid, vp) == 0
        time.sleep(0.05)  # what was on its way to the other one has arrived
        interrupts.clear()
        assert driver.luns() == [0]
        bench.until(lambda: interrupts, "an interrupt")
        assert set(interrupts) == {(vp, relid)}
    # A guest that has no page for event flags is not written to.
    flags = bench.board.flags[1] * PAGE_SIZE
    bench.board.synics[1].registers_changed(1, flags, 0)
    time.sleep(0.05)
    interrupts.clear()
    tag = driver.start(bytes(6))
    time.sleep(0.3)
    assert not interrupts and not any(bench.board.memory.read(flags, PAGE_SIZE))
    bench.board.synics[1].registers_changed(1, flags | 1, 0)
    assert driver.finish(tag).ok


def test_a_transport_that_must_know_is_told_what_was_read(tmp_path: Path, image: Path) -> None:
    image.write_bytes(os.urandom(MIB))
    bench = MachineElsewhere(tmp_path, DriveConfig(str(image)), notices_writes=True)
    driver = initialized(bench)
    data = driver.read(3, 20, shape=(0, False, 1)).data
    assert data == image.read_bytes()[1536:][: 20 * 512]
    assert b"".join(bench.board.written) == data
    bench.close()


def test_people_reach_the_disks(bench: MachineElsewhere, tmp_path: Path) -> None:
    (drive,) = bench.call("drives")
    assert (drive["address"], drive["size"]) == ("scsi0:0", MIB)
    driver = initialized(bench)
    assert bench.call("drive_resize", address="scsi0:0", size=2 * MIB)["size"] == 2 * MIB
    assert driver.command(bytes(6)).key == (6, 0x2A, 9)
    driver.look()
    assert driver.notices == [11]
    assert ("drive", f"scsi0:0 resized to {2 * MIB} bytes") in bench.told
    other = tmp_path / "other.img"
    create_disk(other, MIB).close()
    before = bench.relids()
    assert bench.call("drive_add", path=str(other), controller="scsi1")["address"] == "scsi1:0"
    bench.until(lambda: len(bench.relids()) == len(before) + 1, "the new controller's offer")
    second = initialized(bench)
    assert second.write(0, b"x" * 512).ok
    assert bench.call("drive_remove", address="scsi1:0")["path"] == str(other)
    assert other.read_bytes()[:512] == b"x" * 512
    with pytest.raises(HvHostError, match="there are: scsi0:0"):
        bench.call("drive_remove", address="scsi1:0")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bench.call("drive_add", path=str(tmp_path / "nowhere.img"))
    with pytest.raises(HvHostError, match="no route"):
        bench.call("machine_stop")


def test_a_disk_that_cannot_be_opened_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MachineElsewhere(tmp_path, DriveConfig(str(tmp_path / "nowhere.img")))


def test_more_processors_than_files_that_go_at_once(tmp_path: Path, image: Path) -> None:
    bench = MachineElsewhere(tmp_path, DriveConfig(str(image)), cpus=251)
    assert initialized(bench).luns() == [0]
    bench.close()
    with pytest.raises(HvHostError, match="up to 251 virtual processors"):
        MachineElsewhere(tmp_path, DriveConfig(str(image)), cpus=252)


def test_what_a_guest_does_wrong_is_told_by_the_bus(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    relid = driver.channel.offer.child_relid
    driver.send(struct.pack("<III", 99, 1, 0).ljust(64, b"\0"))
    bench.until(lambda: bench.guest.faults, "the fault")
    assert bench.guest.faults[0].startswith(f"channel {relid} (scsi0) faulted: ")
    assert "99" in bench.guest.faults[0]
    with bench.lock:
        bench.guest.close(relid)
    again = bench.driver(relid)
    again.initialize()
    assert again.luns() == [0] and len(bench.guest.faults) == 1


def test_a_fault_of_an_earlier_opening_is_late(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    relid = driver.channel.offer.child_relid
    with bench.lock:  # so the fault is known here only when the channel is another one
        driver.send(struct.pack("<III", 99, 1, 0).ljust(64, b"\0"))
        time.sleep(0.2)
        bench.guest.close(relid)
        again = bench.driver(relid)
    again.initialize()
    assert again.luns() == [0] and not bench.guest.faults


def test_rings_that_are_none_are_refused(bench: MachineElsewhere) -> None:
    (relid,) = bench.relids()
    with bench.lock:
        pfns = bench.guest.allocate(4)
        handle, _ = bench.guest.make_gpadl(relid, [(4 * PAGE_SIZE, 0, pfns)])
        for downstream in (0, 4, 3):  # the last leaves one page, a ring without room
            bench.guest.post(OpenChannel(relid, relid, handle, 0, downstream))
            assert bench.guest.reply(OpenChannelResult).status != 0
    assert len(bench.guest.faults) == 3
    driver = initialized(bench)
    driver.guest.memory.write(driver.channel.out.base, struct.pack("<I", 3))  # no packet boundary
    driver.channel.signal()
    bench.until(lambda: len(bench.guest.faults) == 4, "the ring's fault")


def test_memory_that_comes_later(bench: MachineElsewhere) -> None:
    driver = initialized(bench)
    last = bench.board.memory.regions[-1]
    pfn = (last.guest_address + last.size) // PAGE_SIZE
    read = struct.pack(
        "<HBBBBBBBBBBI16s",
        52,
        *(0, 0, 2, 0, 0, 0, 10, 20, 1, 0, 4096),
        struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0),
    )
    packet = (struct.pack("<III", 3, 1, 0) + read).ljust(64, b"\0")
    header = struct.pack("<IIIIQ", 0, 1, 4096, 0, pfn)
    assert driver.write(0, b"m" * 4096).ok
    bench.board.plug_memory()
    assert driver.wait(driver.send(packet, header))[14] == 1
    assert bench.board.memory.read(pfn * PAGE_SIZE, 4096) == b"m" * 4096
    # What lies behind even that is no memory.
    driver.send(packet, struct.pack("<IIIIQ", 0, 1, 4096, 0, pfn + MORE))
    bench.until(lambda: bench.guest.faults, "the fault")


def test_a_reset_finds_the_disks_again(bench: MachineElsewhere) -> None:
    assert initialized(bench).write(0, b"1" * 512).ok
    old = bench.board.transport
    bench.power_down()
    bench.boot()
    driver = initialized(bench)
    assert driver.read(0, 1).data == b"1" * 512 and bench.board.transport is not old


def test_a_channel_of_another_process_is_not_saved(bench: MachineElsewhere) -> None:
    initialized(bench)
    with pytest.raises(HvHostError, match="served by another process"), bench.lock:
        bench.guest.server.save()


def test_a_storage_process_that_dies_takes_the_machine_along(tmp_path: Path, image: Path) -> None:
    bench = MachineElsewhere(tmp_path, DriveConfig(str(image)))
    driver = initialized(bench)
    os.kill(bench.storage.process.pid, signal.SIGKILL)
    assert bench.board.failed.wait(SECONDS)
    assert bench.board.why == [
        "the storage process ended (signal 9, SIGKILL); start the machine again."
    ]
    with pytest.raises(HvHostError, match="is gone"):
        bench.call("drives")
    with bench.lock:  # nothing waits for the dead
        bench.guest.close(driver.channel.offer.child_relid)
    bench.power_down()
    bench.loop.stop()
    bench.storage.close()


_WORKER = """
import os, sys
from pathlib import Path
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig
from hvhost.machine.peripheral import Surroundings
from hvhost.storage.elsewhere import StorageElsewhere

config = MachineConfig("m1", "/vmlinuz", storage_process=True)
storage = StorageElsewhere(Surroundings(config, Loop(), Path(), lambda kind, detail: None))
print(storage.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_nothing_is_left_of_a_worker_that_is_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WORKER], stdout=subprocess.PIPE, check=False, timeout=SECONDS
    )
    assert done.returncode == -9
    process = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + SECONDS
    while process.exists() and process.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def guest_freezes(
    bench: MachineElsewhere, statuses: dict[int, int]
) -> tuple[list[int], threading.Event]:
    """The guest's snapshot service; what it was asked, and what ends it."""
    asked, over = list[int](), threading.Event()
    with bench.lock:
        (relid,) = (
            number
            for number, offer in bench.guest.offers.items()
            if offer.if_type == bench.vss.offer.interface_type
        )
        service = GuestService(bench.guest.open(relid), [(5, 0)])
        service.run()

    def run() -> None:
        while not over.wait(0.005):
            with bench.lock:
                for packet in service.channel.read():
                    message = bytearray(packet.payload)
                    asked.append(message[28])
                    struct.pack_into("<I", message, 20, statuses.get(message[28], 0))
                    message[25] = 5
                    service.channel.write(bytes(message), transaction_id=packet.transaction_id)

    threading.Thread(target=run, daemon=True).start()
    return asked, over


CHECK, FREEZE, THAW = 0, 1, 2


def back_up(bench: MachineElsewhere, target: Path) -> Any:
    bench.call("backup_start", directory=str(target), allow_same_volume=True)
    return bench.call("backup_progress", timeout=SECONDS)


def test_a_backup_freezes_the_guest_and_thaws_it(
    bench: MachineElsewhere, image: Path, tmp_path: Path
) -> None:
    driver = initialized(bench)
    assert driver.write(0, b"kept" * 128).ok
    asked, over = guest_freezes(bench, {})
    info = back_up(bench, tmp_path / "backups")
    assert (info["state"], info["error"], info["consistency"]) == ("done", None, "file-system")
    assert len(asked) == 3 and asked[1:] != asked[:2]
    (copy,) = Path(info["path"]).glob("*.vhdx")
    from hvhost.storage.images import open_disk

    disk, data = open_disk(copy, read_only=True), bytearray(MIB)
    disk.readv(0, [memoryview(data)])
    disk.close()
    assert data == image.read_bytes()
    over.set()


def test_a_guest_that_cannot_freeze_is_said(bench: MachineElsewhere, tmp_path: Path) -> None:
    info = back_up(bench, tmp_path / "backups")
    assert info["state"] == "failed" and "takes no snapshot requests" in info["error"]
    bench.board.paused = True
    with pytest.raises(HvHostError, match="is paused"):
        back_up(bench, tmp_path / "backups")
    bench.board.paused = False
    asked, over = guest_freezes(bench, {})
    bench.power_down()
    info = back_up(bench, tmp_path / "backups")
    assert info["state"] == "failed" and "is being reset" in info["error"] and asked == []
    over.set()
    bench.boot()


def test_a_machine_that_ends_while_a_backup_asks_the_guest(tmp_path: Path, image: Path) -> None:
    bench = MachineElsewhere(tmp_path, DriveConfig(str(image)))
    bench.loop.stop()  # as a worker's does before its devices are closed
    bench.thread.join()
    bench.call("backup_start", directory=str(tmp_path / "backups"), allow_same_volume=True)
    bench.until(lambda: bench.storage._waiting, "the backup's question")
    started = time.monotonic()
    bench.storage.close()
    assert bench.storage.process.returncode == 0 and time.monotonic() - started < SECONDS / 2
    assert not list((tmp_path / "backups").iterdir())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HvHostError("a"), HvHostError),
        (RemoteProtocolError("b"), RemoteProtocolError),
        (GuestMemoryError("c"), GuestMemoryError),
        (ValueError("d"), HvHostError),
        (OSError(28, "No space left on device", "/x"), OSError),
    ],
)
def test_errors_come_as_they_were(error: Exception, kind: type[Exception]) -> None:
    from hvhost.machine.link import Failure

    there = Failure.of(error).exception()
    assert type(there) is kind and str(there) == str(error)
