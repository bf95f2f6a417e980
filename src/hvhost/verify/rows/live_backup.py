"""``live-backup``: a disk copied while the guest writes to it, in the state of one frozen moment.

Witnesses: the guest's ``hv_vss_daemon``, which says in the guest's own log what it froze and
thawed, and the guest's ext4, which refuses a write-protected disk that is not clean. A copy that
was made without freezing shows that it would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.machine.backup_model import BackupInfo, BackupOptions, Consistency
from hvhost.machine.storage_model import DriveConfig
from hvhost.units import format_size
from hvhost.verify.drives import MIB, MOUNT_POINT, await_gone, find, require, told_digest, workplace
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.script import run
from hvhost.verify.session import Session

SIZE, FILE_SIZE = 192 * MIB, 24 * MIB
#: Lines that the writer has written before the backup begins.
LEAST = 200
DAEMON = "/usr/sbin/hv_vss_daemon"
LOG, COPY = "/tmp/hvhost-syslog", "/tmp/hvhost-backup"
STOP = "/tmp/hvhost-writer-stop"
#: Numbers one line after the other until it is told to stop, on the disk's file system.
WRITER = f"""\
i=0
while [ ! -e {STOP} ]; do
  echo $i >> {MOUNT_POINT}/numbers
  i=$((i+1))
done
"""
_LOOK_ATTEMPTS = 100


def _log(probe: Probe, word: str) -> int:
    """How many lines of the guest's log have *word*."""
    return int(run(probe, f"grep -c '{word}' {LOG} || true"))


def _await_daemon(session: Session, probe: Probe) -> None:
    """Until the guest's kernel has said that a daemon registered."""
    script = "pidof hv_vss_daemon && dmesg | grep -q 'VSS: userspace daemon'"
    for _ in range(_LOOK_ATTEMPTS):
        if not probe.run(["sh", "-c", script], 20.0).status:
            return
        time.sleep(session.timing.poll)
    raise RowFailed("no hv_vss_daemon registered in the guest", [run(probe, "ps; dmesg | tail -5")])


def _back_up(session: Session, directory: Path, *, crash_consistent: bool = False) -> BackupInfo:
    options = BackupOptions(
        str(directory / "backups"), crash_consistent=crash_consistent, allow_same_volume=True
    )
    return session.machine.back_up(options)


def _refused(session: Session, options: BackupOptions, word: str) -> str:
    """A backup that has to be refused with *word* in the sentence."""
    try:
        session.machine.back_up(options)
    except HvHostError as error:
        require(word in str(error), f"the refusal is {str(error)!r}, without {word!r}")
        return str(error)
    raise RowFailed(f"a backup that should be refused with {word!r} was made")


def _fill(session: Session, probe: Probe, path: Path) -> tuple[str, str, str]:
    """A file system with a file that is not written back yet and a writer at work.

    Its address, its block device, and the file's digest.
    """
    drive = session.machine.drives.add(DriveConfig(str(path)))
    device = f"/dev/{find(session, probe, drive)}"
    run(probe, f"/usr/sbin/mke2fs -q -F -t ext4 {device} && mount -t ext4 {device} {MOUNT_POINT}")
    run(probe, f"dd if=/dev/urandom of={MOUNT_POINT}/large bs=1M count={FILE_SIZE // MIB}", 120.0)
    digest = told_digest(probe, f"{MOUNT_POINT}/large")
    run(probe, f"rm -f {STOP}; echo '{WRITER}' > /tmp/writer")
    run(probe, "setsid sh /tmp/writer </dev/null >/dev/null 2>&1 &")
    run(probe, f"until [ $(cat {MOUNT_POINT}/numbers | wc -l) -ge {LEAST} ]; do sleep 0.1; done")
    return drive.address, device, digest


def _numbers(probe: Probe, path: str) -> int:
    """How many lines there are; :class:`RowFailed` unless they are 0, 1, 2… without a gap."""
    script = f"awk '$0 != NR - 1 {{ print NR; exit }}' {path}"
    require(not (gap := run(probe, script)), f"line {gap} of {path} is not what was written there")
    return int(run(probe, f"wc -l < {path}"))


def _count(probe: Probe) -> int:
    """How many lines the writer has written."""
    return int(run(probe, f"wc -l < {MOUNT_POINT}/numbers"))


def _attach(session: Session, probe: Probe, info: BackupInfo, live: str) -> tuple[str, str]:
    """The copy of drive *live* as a write-protected one; its address and block device."""
    path = Path(info.path, f"{live.replace(':', '-')}.vhdx")
    drive = session.machine.drives.add(DriveConfig(str(path), read_only=True))
    return drive.address, f"/dev/{_find_copy(session, probe, drive.address)}"


def _find_copy(session: Session, probe: Probe, address: str) -> str:
    # A copy has the disk's own world-wide name, so it is known by its place.
    lun = address.rpartition(":")[2]
    for _ in range(_LOOK_ATTEMPTS):
        found = probe.read_all("/sys/block/sd*/ro")
        for path in found:
            name = path.split("/")[3]
            place = run(probe, f"basename $(readlink -f /sys/block/{name}/device)")
            if place.rpartition(":")[2] == lun:
                return name
        time.sleep(session.timing.poll)
    raise RowFailed(f"the guest did not find the copy at {address}")


def _detach(session: Session, probe: Probe, address: str, device: str) -> None:
    session.machine.drives.remove(address)
    await_gone(session, probe, device.rpartition("/")[2])


def _consistent(
    session: Session, probe: Probe, directory: Path, live: str, digest: str
) -> Iterator[str]:
    session.step("backing up while the guest writes")
    info = _back_up(session, directory)
    live_count = _count(probe)
    require(info.consistency is Consistency.FILE_SYSTEM, f"the backup is {info.consistency}")
    require(info.warning is None, f"the backup warns: {info.warning}")
    freezes, thaws = _log(probe, "op=FREEZE: succeeded"), _log(probe, "op=THAW: succeeded")
    require(
        (freezes, thaws) == (1, 1),
        f"the guest's log has {freezes} freezes and {thaws} thaws, not one each",
        run(probe, f"tail -5 {LOG}"),
    )
    words = run(probe, f"grep 'VSS: op=' {LOG}").splitlines()
    yield f"the guest's log: {'; '.join(line.partition(': ')[2] for line in words)}"
    session.step("reading the backup")
    address, device = _attach(session, probe, info, live)
    mounted = f"mkdir -p {COPY} && mount -t ext4 -o ro {device} {COPY}"
    run(probe, f"dmesg -c > /dev/null; {mounted}")
    told = run(probe, "dmesg")
    require("recover" not in told, "the backup's journal had to be recovered", told)
    require(
        told_digest(probe, f"{COPY}/large") == digest,
        "a file that was written before the backup differs in it",
    )
    copied = _numbers(probe, f"{COPY}/numbers")
    run(probe, f"umount {COPY}")
    _detach(session, probe, address, device)
    require(
        LEAST <= copied < live_count,
        f"the backup has {copied} of the writer's numbers, and {live_count} were there at its end",
    )
    yield (
        f"the backup's ext4 is clean on a write-protected disk; {format_size(FILE_SIZE)} written "
        f"before it are whole, and of a writer at work it has the first {copied} lines without a "
        f"gap; when it was done there were {live_count}"
    )
    yield (
        f"{format_size(info.size)} in {info.seconds:.1f} s; file systems frozen for "
        f"{info.frozen_seconds * 1000:.0f} ms at most, commands to the disk held for "
        f"{info.pause_seconds * 1000:.1f} ms at most"
    )


def _without_daemon(session: Session, probe: Probe, directory: Path, live: str) -> Iterator[str]:
    session.step("backing up without a daemon")
    run(probe, "killall hv_vss_daemon && sleep 1")
    options = BackupOptions(str(directory / "backups"), allow_same_volume=True)
    yield f"without a daemon: {_refused(session, options, '--crash-consistent')}"
    info = _back_up(session, directory, crash_consistent=True)
    run(probe, f"{DAEMON}")
    address, device = _attach(session, probe, info, live)
    result = probe.run(["mount", "-t", "ext4", "-o", "ro", device, COPY], 60.0)
    told = run(probe, "dmesg | tail -5")
    require(
        result.status != 0 and "recovery required" in told,
        "the crash-consistent backup is clean: the check of the other one proves nothing",
        told,
    )
    _detach(session, probe, address, device)
    yield "crash-consistent, asked for by name: ext4 says that it needs recovery, as it should"


def prove(session: Session) -> Iterator[str]:
    """Frozen and thawed by the guest's daemon; clean without recovery; refused without a daemon."""
    from hvhost.storage.images import create_disk
    from hvhost.storage.vhdx_create import VhdxOptions

    probe = session.running()
    _await_daemon(session, probe)
    with workplace(session) as directory:
        path = directory / "disk.vhdx"
        create_disk(path, VhdxOptions(SIZE, block_size=2 * MIB)).close()
        run(probe, f"rm -f {LOG}; syslogd -O {LOG} -S")
        live, device, digest = _fill(session, probe, path)
        same = _refused(session, BackupOptions(str(directory)), "--allow-same-volume")
        yield f"refused: {same.replace(str(directory), '…')}"
        yield from _consistent(session, probe, directory, live, digest)
        yield from _without_daemon(session, probe, directory, live)
        run(probe, f"touch {STOP}; sleep 1; umount {MOUNT_POINT}; killall syslogd")
        _detach(session, probe, live, device)
    yield (
        "backed up while it ran, frozen and thawed by the guest's own daemon, clean without "
        "recovery; without a daemon only when asked for"
    )
