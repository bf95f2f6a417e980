"""Where hvhost keeps things, by the XDG base directory rules; every directory is its owner's."""

from __future__ import annotations

import os
from pathlib import Path

from hvhost.errors import HvHostError


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.geteuid():
        raise HvHostError(
            f"{path} belongs to another user; set HVHOST_RUNTIME_DIR to a directory of yours."
        )
    return path


def cache_dir(name: str = "") -> Path:
    """Things that can be made again: packages, extracted kernels, initramfs, the rig's image."""
    base = os.environ.get("HVHOST_CACHE_DIR")
    root = (
        Path(base)
        if base
        else (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvhost")
    )
    return _private(root / name)


def runtime_dir(name: str = "") -> Path:
    """Sockets and locks of what runs now; gone after a restart of the computer."""
    base = os.environ.get("HVHOST_RUNTIME_DIR")
    if base:
        root = Path(base)
    elif xdg := os.environ.get("XDG_RUNTIME_DIR"):
        root = Path(xdg) / "hvhost"
    else:
        root = Path("/run/hvhost" if os.geteuid() == 0 else f"/tmp/hvhost-{os.geteuid()}")
    _private(root)
    return _private(root / name)


def python_environment() -> dict[str, str]:
    """Environment for a Python process of ours that must find this very package."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
