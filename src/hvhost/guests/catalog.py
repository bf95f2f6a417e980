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
    libraries: tuple[str, ...] = ("libc6",)

    @property
    def userland(self) -> tuple[str, ...]:
        """What to download besides the kernel."""
        return (self.daemons, self.busybox, *self.libraries)


_SUITES = (
    ("debian-11", "Debian 11", "bullseye"),
    ("debian-12", "Debian 12", "bookworm"),
    ("debian-13", "Debian 13", "trixie"),
    ("sid", "Debian sid", "sid"),
)

DEFAULT_GUEST = "debian-12"
GUESTS: dict[str, GuestRecipe] = {
    recipe.name: recipe
    for name, title, suite in _SUITES
    for recipe in (
        GuestRecipe(name, f"{title}, cloud kernel", suite, "linux-image-cloud-amd64"),
        GuestRecipe(f"{name}-full", f"{title}, full kernel", suite, "linux-image-amd64"),
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
