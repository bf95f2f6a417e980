"""Complete systems: a distribution with systemd, built from its packages into a VHDX.

``mmdebstrap`` installs the packages, ``mke2fs -d`` makes the file system, and our own code the
VHDX; no loop device, no mount, no root where the kernel lets users have namespaces of their own.
What boots is the distribution's kernel with its own initramfs, from Hyper-V storage and nothing
else. The same recipe on the same package versions makes the same system.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import NAMESPACE_OID, UUID, uuid5

from hvhost.errors import HvHostError
from hvhost.guests import apt, full_root
from hvhost.guests.catalog import FullRecipe, full_recipe
from hvhost.guests.probe import build_probe
from hvhost.paths import cache_dir
from hvhost.storage.operations import NewImage, convert
from hvhost.units import GIB, MIB

DISK_SIZE = 8 * GIB
# The time of every file that has none of its own: changes only together with what is built.
_EPOCH = 1_700_000_000
_NEEDED_BYTES = 4 * GIB
_ROOT_MODE, _USER_MODE = "root", "unshare"
_SUBORDINATES = (Path("/etc/subuid"), Path("/etc/subgid"))
# Documentation is much of a system and no test reads it.
_EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_PACKAGES_FILE, _DISK, _KERNEL, _INITRD = "packages", "root.vhdx", "vmlinuz", "initrd.img"
_STEP = re.compile(r"^I: (?:running |)(.*?)(?:\.\.\.)?$")
_SHOWN_STEPS = ("apt-get update", "downloading", "extracting", "installing", "cleaning")


@dataclass(frozen=True, slots=True)
class FullGuest:
    """A complete system; ``disk`` is a VHDX, never to be written to: machines get children."""

    name: str
    title: str
    kernel: Path
    initrd: Path
    disk: Path
    root: UUID

    @property
    def command_line(self) -> str:
        """What the kernel is told: its root, and to be quiet as Debian has it."""
        return f"root=UUID={self.root} ro quiet"


# The crash kernel's initramfs is made with the system, since that takes an emulated processor
# minutes. kdump-tools leave it to the first start where ischroot says that they are in a chroot.
_MAKE_CRASH_INITRAMFS = """
set -eu
mkdir /tmp/no-chroot
ln -s /bin/false /tmp/no-chroot/ischroot
for kernel in /boot/vmlinuz-*; do
    PATH=/tmp/no-chroot:$PATH /etc/kernel/postinst.d/kdump-tools "${kernel#/boot/vmlinuz-}"
    kdump-config symlinks "${kernel#/boot/vmlinuz-}"
done
rm -r /tmp/no-chroot
test -s /var/lib/kdump/initrd.img
"""

# sshd starts with the first connection: a start of the system does not wait for it. Host keys that
# its package made would be those of all machines.
_WAIT_FOR_SSH = """
set -eu
systemctl --quiet disable ssh.service
systemctl --quiet enable ssh.socket
rm -f /etc/ssh/ssh_host_*
"""

# Makes the file system in a namespace (or as root) from a tar of it, and hands back a tar: files
# cross the border of a namespace only as streams, since users inside are others outside. Device
# nodes are left out: a namespace may not make them, and the kernel does when it boots.
_MAKE_IMAGE = """
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/root" "$work/out"
tar -C "$work/root" --exclude './dev/*' --numeric-owner --xattrs --xattrs-include='*' -xpif -
chmod 755 "$work/root"
mkdir -p "$work/root/etc/systemd/network"
: >"$work/root/etc/machine-id"
mke2fs -q -F -t ext4 -m 1 -U "$1" -E "hash_seed=$1" -d "$work/root" "$work/out/root.img" "$2" >&2
cp -L "$work"/root/boot/vmlinuz-* "$work/out/vmlinuz"
cp -L "$work"/root/boot/initrd.img-* "$work/out/initrd.img"
dpkg-query --admindir="$work/root/var/lib/dpkg" -W -f '${Package} ${Version}\\n' \
    >"$work/out/packages"
tar -C "$work/out" -cSf - root.img vmlinuz initrd.img packages
"""


def installation_mode() -> str:
    """How this user can install a system into a directory; HvHostError if not at all."""
    for program, package in (("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs")):
        if _find_program(program) is None:
            raise HvHostError(
                f"{program} is not on this computer, and complete guests are built with it; run "
                f"`apt-get install {package}` (scripts/setup does)."
            )
    if os.geteuid() == 0:
        return _ROOT_MODE
    user = pwd.getpwuid(os.geteuid()).pw_name
    for path in _SUBORDINATES:
        lines = path.read_text().splitlines() if path.is_file() else []
        if not any(line.split(":")[0] in (user, str(os.geteuid())) for line in lines):
            raise HvHostError(
                f"{user} has no subordinate ids in {path}, so only root can build a complete guest "
                f"here; have root run `usermod --add-subuids 100000-165535 --add-subgids "
                f"100000-165535 {user}`, or build it as root."
            )
    if _find_program("newuidmap") is None:
        raise HvHostError(
            "newuidmap is not on this computer, and without it only root can build a complete "
            "guest; run `apt-get install uidmap`."
        )
    return _USER_MODE


def _find_program(name: str) -> str | None:
    """Users may lack the directories of system programs in their path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    return {
        **kept,
        "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": str(_EPOCH),
        "E2FSPROGS_FAKE_TIME": str(_EPOCH),  # e2fsprogs before 1.47.1 knows only this
    }


def source_lines(sources: Sequence[apt.Source], *, signed: bool) -> list[str]:
    """Lines of a sources.list; ``signed``: with the keyring, whose path is this computer's."""
    return [
        f"deb {f'[signed-by={source.signed_by}] ' if signed and source.signed_by else ''}"
        f"{source.uri} {suite} {' '.join(source.components)}"
        for source in sources
        for suite in source.suites
    ]


def install_command(
    recipe: FullRecipe,
    mode: str,
    early: Path,
    sources: Sequence[apt.Source],
    settings: Sequence[str],
) -> list[str]:
    """The mmdebstrap that writes the system to its standard output, as a tar."""
    return [
        "mmdebstrap",
        f"--mode={mode}",
        "--format=tar",
        "--variant=minbase",
        "--architectures=amd64",
        f"--include={','.join(recipe.packages)}",
        '--aptopt=APT::Sandbox::User "root"',
        '--aptopt=Acquire::Languages "none"',
        *(f"--aptopt={setting.rstrip(';')}" for setting in settings),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
        f"--essential-hook=tar-in {early} /",
        # A test guest: root has no password.
        '--customize-hook=chroot "$1" passwd --quiet --delete root',
        '--customize-hook=chroot "$1" systemctl --quiet enable systemd-networkd',
        f'--customize-hook=chroot "$1" sh -c {shlex.quote(_WAIT_FOR_SSH)}',
        f'--customize-hook=chroot "$1" sh -c {shlex.quote(_MAKE_CRASH_INITRAMFS)}',
        # A kernel that could not reach its disk would say so only after the boot's time limit.
        '--customize-hook=chroot "$1" sh -c '
        "'lsinitramfs /boot/initrd.img-* | grep -q \"/hv_storvsc\\.ko\"'",
        recipe.suite,
        "-",
        *source_lines(sources, signed=True),
    ]


def _fingerprint(recipe: FullRecipe, late: bytes) -> str:
    """Changes whenever the system would, but for the versions of its packages."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr((recipe, DISK_SIZE)).encode())
    digest.update(late)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[Path]:
    directory = cache_dir("systems")
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


def prepare_full(
    name: str, *, refresh: bool = False, progress: apt.Progress = apt.silent
) -> FullGuest:
    """A complete system of the catalogue, built if it is not cached; that takes minutes.

    ``refresh`` builds it anew with the newest packages. Raises HvHostError when it cannot be built.
    """
    recipe = full_recipe(name)
    root = uuid5(NAMESPACE_OID, f"hvhost/{name}")
    probe = build_probe().read_bytes()
    fingerprint = _fingerprint(recipe, full_root.archive(_files(probe, root, ()), _EPOCH))
    with _locked(name) as directory:
        target = directory / f"{name}-{fingerprint}"
        if refresh or not target.is_dir():
            mode = installation_mode()
            prefix = f".incoming-{name}-"
            for left in directory.glob(f"{prefix}*"):  # by a build that was killed
                shutil.rmtree(left)
            temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
            try:
                _check_room(temporary)
                _build(recipe, mode, probe, root, temporary, progress)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return FullGuest(name, recipe.title, target / _KERNEL, target / _INITRD, target / _DISK, root)


def _files(probe: bytes, root: UUID, sources: Sequence[str]) -> tuple[full_root.RootFile, ...]:
    return full_root.root_files(probe, root, sources)


def _check_room(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise HvHostError(
            f"There are {free // MIB} MiB free in {directory.parent}, and building a complete "
            f"guest takes up to {_NEEDED_BYTES // MIB}; make room, or set HVHOST_CACHE_DIR."
        )


def _build(
    recipe: FullRecipe,
    mode: str,
    probe: bytes,
    root: UUID,
    target: Path,
    progress: apt.Progress,
) -> None:
    """Leaves disk, kernel, initrd and the list of packages in the directory *target*."""
    progress(f"building {recipe.title}; this takes a few minutes, once")
    sources = apt.verified_sources(recipe.suite, progress)
    late = full_root.archive(_files(probe, root, source_lines(sources, signed=False)), _EPOCH)
    early = target / "early.tar"
    early.write_bytes(full_root.archive(full_root.initramfs_files(), _EPOCH))
    system, made = target / "system.tar", target / "made.tar"
    command = install_command(recipe, mode, early, sources, apt.inherited_settings())
    with system.open("wb") as output:
        _run(command, output, progress)
    progress("making its file system")
    prefix = [] if mode == _ROOT_MODE else ["mmdebstrap", "--unshare-helper"]
    script = [*prefix, "sh", "-c", _MAKE_IMAGE, "sh", str(root), f"{DISK_SIZE // MIB}M"]
    with system.open("rb") as tar, made.open("wb") as output:
        _run(script, output, progress, (tar, late))
    system.unlink()
    _run(["tar", "-C", str(target), "-xSf", str(made)], None, progress)
    progress("making its VHDX")
    convert(target / "root.img", target / _DISK, NewImage(), lambda _done, _size: None)
    for name in ("early.tar", "made.tar", "root.img"):
        (target / name).unlink()


def _run(
    command: Sequence[str],
    output: IO[bytes] | None,
    progress: apt.Progress,
    tars: tuple[IO[bytes], bytes] | None = None,
) -> None:
    """Run a step of the build; *tars* go one after the other into its standard input."""
    lines: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if tars is None else subprocess.PIPE,
        stdout=output if output is not None else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
    ) as process:
        assert process.stderr is not None
        feeder: threading.Thread | None = None
        if tars is not None:
            assert process.stdin is not None
            feeder = threading.Thread(target=_feed, args=(process.stdin, *tars))
            feeder.start()
        for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            lines.append(line)
            step = _STEP.match(line)
            if step is not None and step[1].startswith(_SHOWN_STEPS):
                progress(step[1])
        if feeder is not None:
            feeder.join()
    if process.returncode != 0:
        raise HvHostError(
            f"{Path(command[0]).name} could not build the guest ({_complaint(lines)}); check the "
            "network and the room in the directory for temporary files, and try again."
        )


def _feed(pipe: IO[bytes], first: IO[bytes], second: bytes) -> None:
    # A process that ends before it has read all says itself why.
    with contextlib.suppress(BrokenPipeError), pipe:
        shutil.copyfileobj(first, pipe, 1 << 20)
        pipe.write(second)


def _complaint(lines: Sequence[str]) -> str:
    """The line that says what went wrong: the first error, or else the last words."""
    errors = [line for line in lines if re.match(r"(E|dpkg|mke2fs|tar): ", line)]
    text = (errors or [line for line in lines if line] or ["it said nothing"])[0 if errors else -1]
    return re.sub(r"\s+", " ", text).removeprefix("E: ")[:300].rstrip(".")


def packages_of(guest: FullGuest) -> dict[str, str]:
    """The versions of all packages in a guest that was built."""
    lines = (guest.disk.parent / _PACKAGES_FILE).read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines)
