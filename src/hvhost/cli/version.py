"""``hvhost version``."""

from __future__ import annotations


def version() -> None:
    """Print the version of hvhost."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        print(f"hvhost {version_of('hvhost')}")
    except PackageNotFoundError:
        print("hvhost (not installed: run from its source tree)")
