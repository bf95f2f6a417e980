"""Our own small programs for guests, static, for the architecture of the guest's kernel.

Those for 32-bit guests are made by the same compiler with the headers and libraries of Debian's
i386 packages, so that nothing has to be installed for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvhost.compiler import build_static
from hvhost.errors import HvHostError
from hvhost.guests import apt, deb
from hvhost.guests.probe import SOURCE as PROBE_SOURCE

_HERE = Path(__file__).parent
_LIBRARY_SUITE = "bookworm"
_LIBRARIES = ("libc6-dev", "linux-libc-dev", "libgcc-12-dev")
_LIBRARY_PLACES = ("usr/lib/gcc/i686-linux-gnu/12", "usr/lib/i386-linux-gnu")
# As on 64-bit guests: times and file sizes beyond 2**31.
_WIDE = ("-D_FILE_OFFSET_BITS=64", "-D_TIME_BITS=64")


@dataclass(frozen=True, slots=True)
class Programs:
    """The probe, and what else rows use, by their places in the guest."""

    probe: Path
    others: tuple[tuple[str, Path], ...]


def compiler_options(architecture: str, progress: apt.Progress) -> tuple[str, ...]:
    """What the compiler must be told for *architecture*; downloads what it needs.

    :class:`HvHostError` for an architecture that no guest here has, and for packages that cannot
    be had.
    """
    if architecture == apt.NATIVE:
        return ()
    if architecture != apt.I386:
        raise HvHostError(f"There are no guests for {architecture}; choose amd64 or i386.")
    packages = apt.download(
        _LIBRARY_SUITE, _LIBRARIES, architecture=architecture, progress=progress
    )
    root = deb.extract(packages, progress)
    places = [root / place for place in _LIBRARY_PLACES]
    return (
        "-m32",
        f"--sysroot={root}",
        *(option for place in places for option in (f"-B{place}", f"-L{place}")),
        *_WIDE,
    )


def build_programs(architecture: str, progress: apt.Progress = apt.silent) -> Programs:
    """Each program compiled once for each version of its source."""
    options = compiler_options(architecture, progress)
    return Programs(
        build_static(PROBE_SOURCE, options=options),
        tuple(
            (f"usr/bin/hvhost-{name}", build_static(_HERE / f"{name}.c", options=options))
            for name in ("clock", "dsync", "fill", "frame")
        ),
    )
