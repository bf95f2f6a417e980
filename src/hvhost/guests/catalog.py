"""The guests we know by name: which suite and packages make each of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hvhost.errors import HvHostError
from hvhost.guests.apt import I386, NATIVE


@dataclass(frozen=True, slots=True)
class GuestRecipe:
    """One guest: ``suite`` is Debian's, the rest are package names in it.

    ``pae`` names the guest of the same distribution that has a 32-bit kernel, if there is one.
    ``command_line`` is what its kernel cannot do without.
    """

    name: str
    title: str
    suite: str
    kernel: str
    daemons: str = "hyperv-daemons"
    busybox: str = "busybox-static"
    time_daemon: str = "chrony"
    network_tool: str = "ethtool"
    disk_tools: str = "e2fsprogs"
    libraries: tuple[str, ...] = ("libc6",)
    #: Packages of a Python, and of the kernel source whose ``lsvmbus`` it runs.
    python: tuple[str, ...] = ()
    kernel_source: str = ""
    architecture: str = NATIVE
    pae: str | None = None
    command_line: str = ""

    @property
    def userland(self) -> tuple[str, ...]:
        """What to download besides the kernel."""
        return (
            self.daemons,
            self.busybox,
            self.time_daemon,
            self.network_tool,
            self.disk_tools,
            *self.libraries,
            *self.python,
        )


# What chronyd, ethtool and e2fsprogs are linked with. Packages got new names when time became 64
# bits wide ("t64").
_LIBRARIES = (
    "libblkid1", "libc6", "libcap2", "libcom-err2", "libgmp10", "libidn2-0", "libmnl0",
    "libp11-kit0", "libseccomp2", "libtasn1-6", "libuuid1",
)  # fmt: skip
_RENAMED = ("libext2fs2", "libgnutls30", "libhogweed6", "libnettle8")
_RENAMED_T64 = ("libext2fs2t64", "libgnutls30t64", "libhogweed6t64", "libnettle8t64")
_SUITES = (
    ("debian-11", "Debian 11", "bullseye", (*_RENAMED, "libunistring2", "libffi7")),
    ("debian-12", "Debian 12", "bookworm", (*_RENAMED, "libunistring2", "libffi8")),
    ("debian-13", "Debian 13", "trixie", (*_RENAMED_T64, "libunistring5", "libffi8")),
    ("sid", "Debian sid", "sid", (*_RENAMED_T64, "libunistring5", "libffi8")),
)

# 32-bit kernels of Linux 6.1 call the hypercall page by a stack slot, and a retpoline, which
# processors without enhanced IBRS get, looks one slot off: the kernel jumps to where its number of
# pages stands as soon as it flushes another processor's TLB.
_WITHOUT_RETPOLINES = "spectre_v2=off"

DEFAULT_GUEST = "debian-12"
DEFAULT_GUEST_32 = "debian-12-pae"
#: Kernels from this release on have no driver for hv_fcopy_daemon, but one for hv_fcopy_uio_daemon,
#: which the guest named here has.
UIO_SINCE = (6, 10)
UIO_DAEMONS_GUEST = "sid"
_PAE_SUITES = ("debian-12",)  # the last with 32-bit kernels
GUESTS: dict[str, GuestRecipe] = {
    recipe.name: recipe
    for name, title, suite, libraries in _SUITES
    for recipe in (
        GuestRecipe(
            f"{name}{variant}",
            f"{title}, {kind} kernel",
            suite,
            kernel,
            libraries=_LIBRARIES + libraries,
            architecture=architecture,
            command_line=_WITHOUT_RETPOLINES if architecture == I386 else "",
            pae=f"{name}-pae" if name in _PAE_SUITES else None,
        )
        for variant, kind, kernel, architecture in (
            ("", "cloud", "linux-image-cloud-amd64", NATIVE),
            ("-generic", "full", "linux-image-amd64", NATIVE),
            ("-pae", "32-bit", "linux-image-686-pae", I386),
        )
        if architecture == NATIVE or name in _PAE_SUITES
    )
}
# For what the kernel source has as a script: its lsvmbus. The source is a large download.
GUESTS["debian-12-python"] = replace(
    GUESTS["debian-12"],
    name="debian-12-python",
    title="Debian 12, cloud kernel and Python",
    python=("python3.11-minimal", "libpython3.11-minimal", "libexpat1", "zlib1g"),
    kernel_source="linux-source-6.1",
)


@dataclass(frozen=True, slots=True)
class FullRecipe:
    """A complete system: ``packages`` are those beside the suite's essential ones."""

    title: str
    suite: str
    packages: tuple[str, ...]


_SYSTEM = (
    "linux-image-cloud-amd64", "initramfs-tools", "lz4", "systemd-sysv", "systemd-resolved", "udev",
    "dbus", "hyperv-daemons", "chrony", "e2fsprogs", "iproute2", "kmod", "procps", "ethtool",
    "ca-certificates", "kdump-tools", "makedumpfile", "openssh-server",
)  # fmt: skip
FULL_GUESTS: dict[str, FullRecipe] = {
    f"{name}-full": FullRecipe(f"{title}, complete", suite, _SYSTEM)
    for name, title, suite, _ in _SUITES
    if name != "debian-11"  # its systemd has no resolved of its own
}


def full_recipe(name: str) -> FullRecipe:
    """The recipe of a complete guest; HvHostError with the known names if there is none."""
    try:
        return FULL_GUESTS[name]
    except KeyError:
        raise HvHostError(
            f"There is no complete guest {name}; choose one of {', '.join(FULL_GUESTS)}."
        ) from None


def base_guest(name: str) -> str:
    """The guest that *name*, one of the catalogue, is a variant of: same suite, same processors."""
    chosen = GUESTS[name]
    return next(
        each.name
        for each in GUESTS.values()
        if (each.suite, each.architecture) == (chosen.suite, chosen.architecture)
    )


def is_newer(one: GuestRecipe, other: GuestRecipe) -> bool:
    """Whether *one* is of a later release of Debian than *other*."""
    order = [suite for _, _, suite, _ in _SUITES]
    return order.index(one.suite) > order.index(other.suite)


def check_guest(name: str, otherwise: str = "") -> None:
    """HvHostError with the known names if *name* is none; *otherwise* is what to do instead."""
    if name not in GUESTS and name not in FULL_GUESTS:
        known = ", ".join((*GUESTS, *FULL_GUESTS))
        instead = f", or {otherwise}" if otherwise else ""
        raise HvHostError(f"There is no guest {name}; choose one of {known}{instead}.")


def recipe(name: str) -> GuestRecipe:
    """The recipe of a guest; HvHostError with the known names if there is none."""
    if name in FULL_GUESTS:
        raise HvHostError(
            f"{name} is a complete system, which `hvhost run` boots; its kernel without it is "
            f"{name.removesuffix('-full')}."
        )
    check_guest(name)
    return GUESTS[name]
