"""Where hvhost keeps things, by the XDG base directory rules; every directory is its owner's."""

from __future__ import annotations

import os
from pathlib import Path

from hvhost.errors import HvHostError

_CACHE, _RUNTIME = "HVHOST_CACHE_DIR", "HVHOST_RUNTIME_DIR"


def _private(path: Path, variable: str) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise HvHostError(
            f"{path} cannot be made ({error.strerror}); set {variable} to a directory of yours."
        ) from error
    if owner != os.geteuid():
        raise HvHostError(
            f"{path} belongs to another user; set {variable} to a directory of yours."
        )
    return path


def cache_dir(name: str = "") -> Path:
    """Things that can be made again: packages, extracted kernels, initramfs, the rig's image."""
    base = os.environ.get(_CACHE)
    root = (
        Path(base)
        if base
        else (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvhost")
    )
    return _private(root / name, _CACHE)


def runtime_dir(name: str = "") -> Path:
    """Sockets and locks of what runs now; gone after a restart of the computer."""
    base = os.environ.get(_RUNTIME)
    if base:
        root = Path(base)
    elif xdg := os.environ.get("XDG_RUNTIME_DIR"):
        root = Path(xdg) / "hvhost"
    else:
        root = Path("/run/hvhost" if os.geteuid() == 0 else f"/tmp/hvhost-{os.geteuid()}")
    _private(root, _RUNTIME)
    return _private(root / name, _RUNTIME)


def write_whole(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a file that others see whole or not at all; :class:`OSError` if that cannot be."""
    import tempfile  # not for those who only ask where things are

    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        incoming = Path(file.name)
        try:
            file.write(content)
            file.close()
            incoming.chmod(mode)
            incoming.replace(path)
        finally:
            incoming.unlink(missing_ok=True)


def python_environment() -> dict[str, str]:
    """Environment for a Python process of ours that must find this very package."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
