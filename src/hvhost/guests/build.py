"""From what a person names (a distribution, a package, a kernel file) to what a machine boots."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.firmware.image import open_kernel
from hvhost.guests import apt, deb
from hvhost.guests.catalog import (
    DEFAULT_GUEST,
    DEFAULT_GUEST_32,
    UIO_DAEMONS_GUEST,
    UIO_SINCE,
    GuestRecipe,
    is_newer,
    recipe,
)
from hvhost.guests.initramfs import InitramfsSpec, build_initramfs
from hvhost.guests.lsvmbus import lsvmbus_script, python_files
from hvhost.guests.modules import MODULE_DIRECTORIES, ModuleTree, find_tree
from hvhost.guests.programs import build_programs
from hvhost.paths import cache_dir

_HEADER_MAGIC = 0x202  # Linux x86 boot protocol: "HdrS"
_KERNEL_VERSION = 0x20E
_LIBC = "libc6"
_BANNER = re.compile(rb"Linux version (\d[^\s\0]*) \(")


@dataclass(frozen=True, slots=True)
class GuestImages:
    """What a machine boots: ``modules`` is ``None`` if the kernel's modules are not at hand.

    ``architecture`` is Debian's name for what its programs are made for; ``command_line`` is what
    the kernel cannot do without; ``daemons_of`` is the guest of the catalogue whose distribution
    the daemons are from.
    """

    kernel: Path
    initrd: Path
    modules: ModuleTree | None
    title: str
    release: str
    daemons: tuple[str, ...]
    architecture: str = apt.NATIVE
    command_line: str = ""
    daemons_of: str = DEFAULT_GUEST


def kernel_release(path: Path) -> str:
    """The release a kernel file gives itself (``uname -r``), from a bzImage or a vmlinux.

    Raises HvHostError when the file is no Linux kernel. Source: Linux x86 boot protocol.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HvHostError(f"{path} cannot be read: {error.strerror}; give a kernel.") from error
    header = data[_HEADER_MAGIC : _KERNEL_VERSION + 2]
    if len(header) == _KERNEL_VERSION + 2 - _HEADER_MAGIC and header.startswith(b"HdrS"):
        (offset,) = struct.unpack_from("<H", data, _KERNEL_VERSION)
        text = data[offset + 0x200 : offset + 0x300].split(b"\0", 1)[0].split()
        if offset and text:
            return text[0].decode("ascii", "replace")
    elif data[:4] == b"\x7fELF" and (match := _BANNER.search(data)):
        return match[1].decode("ascii", "replace")
    raise HvHostError(
        f"{path} is not a Linux kernel; give a bzImage (vmlinuz) or an uncompressed vmlinux."
    )


def _find_kernel(root: Path) -> Path | None:
    """The kernel in extracted packages, where older or newer packages put it."""
    for pattern in ("boot/vmlinu[zx]-*", "usr/lib/modules/*/vmlinuz", "lib/modules/*/vmlinuz"):
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(root)) for path in found)
            raise HvHostError(
                f"The packages hold several kernels ({names}); give the packages of one."
            )
        if found:
            return found[0]
    return None


def _find_file(roots: Sequence[Path], names: Sequence[str]) -> Path | None:
    for root in roots:
        for name in names:
            if (root / name).is_file():
                return root / name
    return None


def _programs(packages: Sequence[Path]) -> tuple[Path, tuple[Path, ...]]:
    """busybox and the daemons, for Hyper-V's services and for time, of extracted packages."""
    busybox = _find_file(packages, ("bin/busybox", "usr/bin/busybox"))
    if busybox is None:
        raise HvHostError("The downloaded packages hold no busybox; clear the cache and try again.")
    daemons = tuple(
        path
        for root in packages
        for base in ("usr/sbin", "sbin", "usr/bin")
        for pattern in ("hv_*_daemon", "chronyd", "ethtool", "mke2fs", "resize2fs")
        for path in sorted((root / base).glob(pattern))
    )
    return busybox, daemons


def kernel_architecture(path: Path) -> str:
    """What a kernel's user space is made for; :class:`HvHostError` if it is no kernel."""
    return apt.NATIVE if open_kernel(path).is_64_bit else apt.I386


def _assemble(
    kernel: Path,
    modules: ModuleTree | None,
    packages: Sequence[Path],
    daemons_of: str,
    title: str,
    progress: apt.Progress,
    kernel_source: Path | None = None,
) -> GuestImages:
    architecture = kernel_architecture(kernel)
    programs = build_programs(architecture, progress)
    busybox, daemons = _programs(packages)
    extra: list[tuple[str, Path]] = []
    if kernel_source is not None:
        python, extra = python_files(packages)
        daemons += (python,)
        extra.append(("usr/sbin/lsvmbus", lsvmbus_script(kernel_source, progress)))
    spec = InitramfsSpec(
        busybox=busybox,
        probe=programs.probe,
        modules=modules,
        daemons=daemons,
        library_roots=tuple(packages),
        title=title,
        extra_files=(*programs.others, *extra),
    )
    return GuestImages(
        kernel,
        build_initramfs(spec, progress),
        modules,
        title,
        kernel_release(kernel),
        tuple(path.name for path in daemons),
        architecture,
        daemons_of=daemons_of,
    )


def _userland(
    chosen: GuestRecipe,
    progress: apt.Progress,
    *,
    daemons: GuestRecipe | None = None,
    refresh: bool = False,
) -> list[Path]:
    """Extracted packages of a guest other than its kernel; *daemons* of another one, if given.

    With daemons of a later release comes its C library, which runs the other programs too; not so
    the other way round.
    """
    names = list(chosen.userland)
    sources = [(chosen.suite, names)]
    if daemons is not None:
        foreign = [daemons.daemons]
        names.remove(chosen.daemons)
        if is_newer(daemons, chosen):
            names.remove(_LIBC)
            foreign.append(_LIBC)
        sources.append((daemons.suite, foreign))
    paths: list[Path] = []
    for suite, packages in sources:
        paths += apt.download(
            suite,
            packages,
            architecture=chosen.architecture,
            refresh=refresh,
            progress=progress,
        )
    return [deb.extract([path], progress) for path in paths]


def _version(kernel: Path) -> tuple[int, int]:
    """Major and minor number of a kernel's release."""
    numbers = re.match(r"(\d+)\.(\d+)", kernel_release(kernel))
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _default_userland(
    kernel: Path, progress: apt.Progress, *, daemons: GuestRecipe | None = None
) -> tuple[list[Path], str]:
    """The default guest's programs, for a kernel that comes without any.

    Its Hyper-V daemons are those that go with the kernel, unless *daemons* says which; the name is
    that of the guest whose they are.
    """
    is_native = kernel_architecture(kernel) == apt.NATIVE
    chosen = recipe(DEFAULT_GUEST if is_native else DEFAULT_GUEST_32)
    if daemons is None and is_native and _version(kernel) >= UIO_SINCE:
        daemons = recipe(UIO_DAEMONS_GUEST)
    return _userland(chosen, progress, daemons=daemons), (daemons or chosen).name


def _from_packages(
    paths: Sequence[Path],
    userland: tuple[Sequence[Path], str] | None,
    title: str | None,
    progress: apt.Progress,
    kernel_source: Path | None = None,
    *,
    daemons: GuestRecipe | None = None,
) -> GuestImages:
    root = deb.extract(paths, progress)
    source = ", ".join(path.name for path in paths)
    kernel = _find_kernel(root)
    if kernel is None:
        raise HvHostError(
            f"There is no kernel in {source}; give the linux-image package that holds "
            "boot/vmlinuz-… itself, not a meta package."
        )
    release = kernel_release(kernel)
    places = [root / base / release for base in MODULE_DIRECTORIES]
    trees = [place for place in places if (place / "kernel").is_dir()]
    if not trees:
        raise HvHostError(
            f"There are no modules of {release} in {source}; give the package that holds them too."
        )
    if userland is None:
        userland = _default_userland(kernel, progress, daemons=daemons)
    title = title or f"Linux {release}"
    return _assemble(kernel, ModuleTree(trees[0]), *userland, title, progress, kernel_source)


def prepare_named(
    guest: str,
    *,
    daemons: GuestRecipe | None = None,
    refresh: bool = False,
    progress: apt.Progress,
) -> GuestImages:
    """A guest of the catalogue, downloaded if it is not cached."""
    chosen: GuestRecipe = recipe(guest)
    kernel = apt.download(
        chosen.suite,
        (chosen.kernel,),
        architecture=chosen.architecture,
        refresh=refresh,
        progress=progress,
    )
    userland = _userland(chosen, progress, daemons=daemons, refresh=refresh)
    source: Path | None = None
    if chosen.kernel_source:
        names = (chosen.kernel_source,)
        (source,) = apt.download(chosen.suite, names, refresh=refresh, progress=progress)
    whole = (userland, (daemons or chosen).name)
    images = _from_packages(kernel, whole, chosen.title, progress, source)
    return replace(images, command_line=chosen.command_line)


def prepare_debs(
    paths: Sequence[Path], *, daemons: GuestRecipe | None = None, progress: apt.Progress
) -> GuestImages:
    """A guest from linux-image packages that a person has, with the default guest's userspace."""
    return _from_packages(paths, None, None, progress, daemons=daemons)


def prepare_kernel(
    kernel: Path,
    modules: Path | None = None,
    *,
    daemons: GuestRecipe | None = None,
    progress: apt.Progress,
) -> GuestImages:
    """A guest from a kernel file; without ``modules``, those installed here are used."""
    release = kernel_release(kernel)
    tree: ModuleTree | None = None
    if modules is not None:
        tree = ModuleTree(find_tree(modules, release))
    elif (installed := Path("/lib/modules") / release).is_dir():
        tree = ModuleTree(installed)
    userland = _default_userland(kernel, progress, daemons=daemons)
    return _assemble(kernel, tree, *userland, f"Linux {release}", progress)


def prepare_guest(
    guest: str | None = None,
    *,
    kernel: Path | None = None,
    modules: Path | None = None,
    debs: Sequence[Path] = (),
    daemons: str | None = None,
    refresh: bool = False,
    progress: apt.Progress = apt.silent,
) -> GuestImages:
    """What to boot for ``--guest NAME``, ``--kernel FILE [--modules DIR]`` or ``--deb FILE…``.

    At most one of the three; none means the default guest. ``daemons`` names a guest whose
    distribution's Hyper-V daemons are taken in place of its own. Raises HvHostError for anything
    that cannot become a guest.
    """
    if sum((guest is not None, kernel is not None, bool(debs))) > 1:
        raise HvHostError("Give only one of --guest, --kernel and --deb.")
    if modules is not None and kernel is None:
        raise HvHostError("--modules belongs to --kernel; give the kernel too.")
    other = None if daemons is None else recipe(daemons)
    try:
        if kernel is not None:
            images = prepare_kernel(kernel, modules, daemons=other, progress=progress)
        elif debs:
            images = prepare_debs(debs, daemons=other, progress=progress)
        else:
            name = guest or DEFAULT_GUEST
            images = prepare_named(name, daemons=other, refresh=refresh, progress=progress)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        why = error.strerror or error
        raise HvHostError(
            f"The guest could not be prepared ({where}{why}); look at the space and permissions "
            f"of {cache_dir()}, or set HVHOST_CACHE_DIR."
        ) from error
    if other is None:
        return images
    return replace(images, title=f"{images.title}, daemons of {other.title.partition(',')[0]}")


def main(arguments: Sequence[str]) -> int:
    """Print kernel and initrd of a guest: ``python -m hvhost.guests.build [NAME]``."""

    def show(message: str) -> None:
        print(message, file=sys.stderr)

    try:
        images = prepare_guest(arguments[0] if arguments else None, progress=show)
    except HvHostError as error:
        print(error, file=sys.stderr)
        return 1
    print(images.kernel)
    print(images.initrd)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
