"""Images of formats that are not ours: ``qemu-img`` makes VHDX files of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hvhost.errors import HvHostError

#: How files of these formats begin.
_BEGINNINGS: Final = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk"}
#: Files with other names are what our own formats say, whatever their guest wrote into them.
_SUFFIXES: Final = (".qcow2", ".qcow", ".vmdk", "")


def foreign_format(path: Path) -> str | None:
    """The format's name for ``qemu-img``, if it is none of ours."""
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return None
    with path.open("rb") as file:
        return _BEGINNINGS.get(file.read(4))


def convert_foreign(source: Path, kind: str, destination: Path) -> None:
    """Make a new dynamic VHDX of the image, with what it is based on copied in.

    :class:`HvHostError` if there is no ``qemu-img`` or it cannot; nothing is left then.
    """
    program = shutil.which("qemu-img")
    if program is None:
        raise HvHostError(
            f"{source} is a {kind} image, which qemu-img would make a VHDX of, and that is not on "
            "this computer; run `apt-get install qemu-utils`."
        )
    if destination.exists():
        raise HvHostError(f"{destination} exists already; choose another name.")
    command = [program, "convert", "-f", kind, "-O", "vhdx", "-o", "subformat=dynamic"]
    done = subprocess.run(
        [*command, f"file:{source.absolute()}", str(destination)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        destination.unlink(missing_ok=True)
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise HvHostError(f"qemu-img could not convert {source} ({said}); check the image.")


def prepare_foreign(path: Path, kind: str, progress: Callable[[str], None]) -> Path:
    """A VHDX of the image as it is now, from the cache if it was made before; only to be read."""
    from hvhost.paths import cache_dir

    status = path.stat()
    words = (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)
    key = hashlib.sha256(repr(words).encode()).hexdigest()[:16]
    directory = cache_dir("images")
    made = directory / f"{path.stem}-{key}.vhdx"
    with (directory / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            progress(f"making a VHDX of {path.name}, once")
            new = directory / f"{key}.incoming.vhdx"
            with contextlib.suppress(FileNotFoundError):
                new.unlink()
            convert_foreign(path, kind, new)
            new.replace(made)
    return made
