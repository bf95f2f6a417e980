"""Which hvhost this is."""

from __future__ import annotations


def own_version() -> str | None:
    """The version that is installed; ``None`` where this runs from a source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hvhost")
    except PackageNotFoundError:
        return None


def say_version() -> None:
    """What ``hvhost --version`` prints."""
    found = own_version()
    print(f"hvhost {found or '(not installed: run from its source tree)'}")
