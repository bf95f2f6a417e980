"""A guest's whole userspace in one archive: busybox, modules, daemons, and the probe.

It is not compressed: a guest on emulated virtual processors decompresses far more slowly than the
host copies. Modules are stored decompressed for the same reason, and loaded by busybox's modprobe
from indexes written here, so that only drivers of devices that exist are loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hvhost.errors import HvHostError
from hvhost.guests import cpio, elf
from hvhost.guests.modules import Module, ModuleTree, read_module
from hvhost.guests.probe import READY_FILE
from hvhost.paths import cache_dir, write_whole

log = logging.getLogger(__name__)

HYPERV_MODULES = (
    "hv_vmbus",
    "hv_utils",
    "hv_balloon",
    "hv_storvsc",
    "hv_netvsc",
    "hyperv_drm",
    "hyperv_fb",
    "hyperv_keyboard",
    "hid_hyperv",
    "hv_sock",
    "pci_hyperv",
    "uio_hv_generic",
)
# What the devices behind those drivers need before a guest can use them.
COMPANION_MODULES = (
    "sd_mod",
    "sr_mod",
    "sg",
    "ext4",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_utf8",
    "af_packet",
    "ipv6",
    "8021q",
    "evdev",
    "hid_generic",
    "atkbd",
    "vsock_diag",
)

READY_LINE = "hvhost-guest: ready"
SHUTDOWN_LINE = "hvhost-guest: shutdown path of init"

# Drivers are loaded beside the probe, not before it: a driver that hangs can be looked at.
_INITTAB = """\
::sysinit:/etc/rcS
::once:/etc/load-drivers
::respawn:/sbin/hvhost-probe /dev/ttyS1
::respawn:/sbin/hvhost-probe sockets
{shell}::ctrlaltdel:/sbin/reboot
::shutdown:/etc/rcK
"""

_RC_S = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
hostname hvhost-guest
"""

# The console is given the line itself: printk may be silenced ("quiet"), but is kept for dmesg.
_LOAD_DRIVERS = f"""\
#!/bin/sh
{{load}}
/sbin/hvhost-probe hotplug
: > {READY_FILE}
echo '<7>{READY_LINE}' > /dev/kmsg
echo '{READY_LINE}' > /dev/console
"""

_RC_K = f"""\
#!/bin/sh
echo '<7>{SHUTDOWN_LINE}' > /dev/kmsg
echo '{SHUTDOWN_LINE}' > /dev/console
sync
umount -a -r 2>/dev/null
"""

_NSS_FILES = "libnss_files.so.2"
_DIRECTORIES = (
    "bin", "dev", "etc", "lib", "lib64", "mnt", "proc", "root", "run", "sbin", "sys", "tmp",
    "usr", "usr/bin", "usr/lib", "usr/sbin", "var", "var/lib", "var/lib/hyperv", "var/log",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class InitramfsSpec:
    """What goes into an initramfs; ``busybox`` and ``probe`` are static programs.

    ``daemons`` are dynamically linked programs for ``/usr/sbin``, whose libraries are looked for in
    ``library_roots`` (extracted packages). ``module_names`` that the kernel does not have are left
    out. ``extra_files`` maps guest paths, without leading slash, to host files.
    """

    busybox: Path
    probe: Path
    modules: ModuleTree | None = None
    module_names: tuple[str, ...] = HYPERV_MODULES + COMPANION_MODULES
    load_first: tuple[str, ...] = ("hv_vmbus", "hv_utils")
    daemons: tuple[Path, ...] = ()
    library_roots: tuple[Path, ...] = ()
    title: str = "Linux"
    console_shell: bool = True
    extra_files: tuple[tuple[str, Path], ...] = field(default=())


def applets(busybox: Path) -> list[str]:
    """The names a busybox program answers to. Raises HvHostError if it does not run."""
    try:
        done = subprocess.run(
            [str(busybox), "--list"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HvHostError(f"{busybox} does not run ({error}); give a static busybox.") from error
    return sorted(set(done.stdout.split()) - {"busybox"})


def find_library(soname: str, roots: Iterable[Path]) -> Path:
    """A shared library in extracted packages; HvHostError with its name if it is not there."""
    for root in roots:
        for base in ("lib", "lib64", "usr/lib", "usr/lib64"):
            found = sorted((root / base).rglob(soname)) if (root / base).is_dir() else []
            if found:
                return found[0]
    raise HvHostError(
        f"No package at hand holds the library {soname} that a guest program needs; add the "
        "package that has it."
    )


def libraries_of(programs: Iterable[Path], roots: Iterable[Path]) -> dict[str, Path]:
    """Every library that ``programs`` need, by the guest path where the linker will find it."""
    roots = tuple(roots)
    found: dict[str, Path] = {}
    pending = list(programs)
    while pending:
        linkage = elf.linkage(pending.pop().read_bytes())
        wanted = [(name, f"lib/{name}") for name in linkage.needed]
        interpreter = (linkage.interpreter or "").lstrip("/")
        if interpreter:
            wanted.append((PurePosixPath(interpreter).name, interpreter))
        names = {PurePosixPath(known).name for known in found}
        for soname, place in wanted:
            # The interpreter is also named as a needed library; one copy, at its own path, will do.
            is_there = place in found if place == interpreter else soname in names
            if is_there:
                continue
            path = find_library(soname, roots)
            found[place] = path
            pending.append(path)
            if soname == "libc.so.6":
                # Before 2.34 glibc opens this when a program asks for a user's name.
                with contextlib.suppress(HvHostError):
                    found[f"lib/{_NSS_FILES}"] = find_library(_NSS_FILES, roots)
    return found


def present_modules(tree: ModuleTree, names: Iterable[str]) -> list[Module]:
    """The loadable modules among ``names`` that have all they need, with that, in load order."""
    usable = []
    for name in names:
        if name in tree:
            try:
                tree.closure([name])
            except HvHostError as error:
                log.info("module %s is left out: %s", name, error)
            else:
                usable.append(name)
    return tree.closure(usable)


def _index_files(tree: ModuleTree, chosen: list[Module]) -> dict[str, bytes]:
    """``modules.dep``, ``modules.alias`` and ``modules.builtin`` of just these modules."""
    places = {module.name: f"{module.name}.ko" for module in chosen}
    order = {module.name: index for index, module in enumerate(chosen)}
    dep, alias = [], []
    has_drm = "hyperv_drm" in places
    for module in chosen:
        needed = [m.name for m in tree.closure([module.name]) if m.name != module.name]
        needed.sort(key=lambda name: order[name], reverse=True)  # modules.dep: last loaded first
        dep.append(f"{places[module.name]}:" + "".join(f" {places[n]}" for n in needed))
        if module.name == "hyperv_fb" and has_drm:
            continue  # both claim the same device; distributions prefer the newer driver
        alias += [f"alias {pattern} {module.name}" for pattern in module.aliases]
    builtin = tree.root / "modules.builtin"
    return {
        "modules.dep": "".join(line + "\n" for line in dep).encode(),
        "modules.alias": "".join(line + "\n" for line in alias).encode(),
        "modules.builtin": builtin.read_bytes() if builtin.is_file() else b"",
    }


def _os_release(title: str) -> bytes:
    name, _, version = title.partition(",")[0].rpartition(" ")
    return (
        f'PRETTY_NAME="{title}"\nNAME="{name or title}"\nVERSION_ID="{version}"\nID=debian\n'
    ).encode()


def _entries(spec: InitramfsSpec) -> list[cpio.Entry]:
    files: dict[str, cpio.Entry] = {}

    def add(entry: cpio.Entry) -> None:
        files.setdefault(entry.name, entry)

    def add_file(place: str, path: Path, mode: int = 0o755) -> None:
        add(cpio.file(place, path.read_bytes(), mode))

    add_file("bin/busybox", spec.busybox)
    add_file("sbin/hvhost-probe", spec.probe)
    for place, path in spec.extra_files:
        add_file(place, path, 0o755 if os.access(path, os.X_OK) else 0o644)
    for path in spec.daemons:
        add_file(f"usr/sbin/{path.name}", path)
    for place, path in libraries_of(spec.daemons, spec.library_roots).items():
        add_file(place, path)
    for name in applets(spec.busybox):
        add(cpio.symlink(f"bin/{name}", "busybox"))
    for name in ("init", "modprobe", "poweroff", "reboot", "halt"):
        add(cpio.symlink(f"sbin/{name}", "../bin/busybox"))
    add(cpio.symlink("init", "bin/busybox"))
    add(cpio.character_device("dev/console", 5, 1))
    add(cpio.character_device("dev/null", 1, 3, 0o666))

    first: list[str] = []
    if spec.modules is not None:
        chosen = present_modules(spec.modules, spec.module_names)
        base = f"lib/modules/{spec.modules.release}"
        for module in chosen:
            content = read_module(spec.modules.root / module.path)
            add(cpio.file(f"{base}/{module.name}.ko", content))
        for name, content in _index_files(spec.modules, chosen).items():
            add(cpio.file(f"{base}/{name}", content))
        there = {module.name for module in chosen}
        first = [name for name in spec.load_first if name in there]
    shell = "ttyS0::askfirst:-/bin/sh\n" if spec.console_shell else ""
    add(cpio.file("etc/inittab", _INITTAB.format(shell=shell).encode()))
    add(cpio.file("etc/rcS", _RC_S.encode(), 0o755))
    load = f"modprobe -q -a {' '.join(first)}" if first else ""
    add(cpio.file("etc/load-drivers", _LOAD_DRIVERS.format(load=load).encode(), 0o755))
    add(cpio.file("etc/rcK", _RC_K.encode(), 0o755))
    add(cpio.file("etc/os-release", _os_release(spec.title)))
    add(cpio.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n"))
    add(cpio.file("etc/group", b"root:x:0:\n"))
    add(cpio.file("etc/nsswitch.conf", b"passwd: files\ngroup: files\n"))

    directories = dict.fromkeys(_DIRECTORIES)
    for name in files:
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            directories.setdefault(str(parent))
    ordered = sorted(directories, key=lambda name: (name.count("/"), name))
    modes = {"tmp": 0o1777, "root": 0o700}
    return [
        *(cpio.directory(name, modes.get(name, 0o755)) for name in ordered),
        *(files[name] for name in sorted(files)),
    ]


def _fingerprint(spec: InitramfsSpec) -> str:
    """Changes whenever the archive would: what it is made of, and the code that makes it."""
    digest = hashlib.sha256()
    for source in (__file__, cpio.__file__):
        digest.update(Path(source).read_bytes())
    paths = [spec.busybox, spec.probe, *spec.daemons, *spec.library_roots]
    paths += [path for _, path in spec.extra_files]
    if spec.modules is not None:
        chosen = present_modules(spec.modules, spec.module_names)
        paths += [spec.modules.root / module.path for module in chosen]
    for path in paths:
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    named = (
        spec.module_names,
        spec.load_first,
        spec.title,
        spec.console_shell,
        [place for place, _ in spec.extra_files],
    )
    digest.update(repr(named).encode())
    return digest.hexdigest()[:20]


def build_initramfs(spec: InitramfsSpec, progress: Callable[[str], None] = log.debug) -> Path:
    """The archive for ``spec``, made once per content. Raises HvHostError for missing parts."""
    release = spec.modules.release if spec.modules is not None else "no-modules"
    target = cache_dir("initramfs") / f"{release}-{_fingerprint(spec)}.cpio"
    if target.exists():
        return target
    progress("making the initramfs")
    content = cpio.archive(_entries(spec))
    write_whole(target, content)
    log.debug("wrote %s (%d bytes)", target, len(content))
    return target
