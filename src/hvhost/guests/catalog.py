"""The guests we know by name: which suite and packages make each of them."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.errors import HvHostError


@dataclass(frozen=True, slots=True)
class GuestRecipe:
    """One guest: ``suite`` is Debian's, the rest are package names in it."""

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

DEFAULT_GUEST = "debian-12"
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
        )
        for variant, kind, kernel in (
            ("", "cloud", "linux-image-cloud-amd64"),
            ("-full", "full", "linux-image-amd64"),
        )
    )
}


def recipe(name: str) -> GuestRecipe:
    """The recipe of a guest; HvHostError with the known names if there is none."""
    try:
        return GUESTS[name]
    except KeyError:
        raise HvHostError(
            f"There is no guest {name}; choose one of {', '.join(GUESTS)}, or give a kernel with "
            "--kernel or --deb."
        ) from None
