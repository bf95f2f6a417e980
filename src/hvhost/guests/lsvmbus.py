"""``lsvmbus`` for a guest that has Python: the kernel source's script, which no package ships."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hvhost.errors import HvHostError
from hvhost.guests import deb
from hvhost.paths import cache_dir, write_whole

log = logging.getLogger(__name__)

_IN_SOURCE = "tools/hv/lsvmbus"


def lsvmbus_script(package: Path, progress: Callable[[str], None] = log.debug) -> Path:
    """The script in a ``linux-source`` package, taken out once and cached.

    The source is a compressed tar within the package's own, so this reads a good part of it.
    Raises HvHostError when the package is none or does not hold it.
    """
    target = cache_dir("packages") / f"lsvmbus-{package.stem}" / "lsvmbus"
    if target.is_file():
        return target
    progress(f"looking for lsvmbus in {package.name.split('_')[0]}")
    content: bytes | None = None
    with deb.open_files(package) as files:
        for member in files:
            if not member.name.endswith((".tar.xz", ".tar.bz2", ".tar.gz")):
                continue
            with tarfile.open(fileobj=files.extractfile(member), mode="r|*") as source:
                content = _find(source)
            break
    if content is None:
        raise HvHostError(f"There is no {_IN_SOURCE} in {package}; give a linux-source package.")
    target.parent.mkdir(exist_ok=True)
    write_whole(target, content, 0o755)
    return target


def _find(source: tarfile.TarFile) -> bytes | None:
    for member in source:
        if member.isreg() and member.name.removeprefix("./").partition("/")[2] == _IN_SOURCE:
            file = source.extractfile(member)
            assert file is not None
            return file.read()
    return None


def python_files(packages: Sequence[Path]) -> tuple[Path, list[tuple[str, Path]]]:
    """Of extracted packages, a program named ``python3`` and its library as (guest path, file).

    Raises HvHostError when there is no Python in them.
    """
    for root in packages:
        for program in sorted(root.glob("usr/bin/python3.*")):
            named = cache_dir("packages") / f"python3-{root.name}" / "python3"
            named.parent.mkdir(exist_ok=True)
            if not named.exists():
                temporary = named.with_name(f".{os.getpid()}")
                temporary.symlink_to(program)
                temporary.replace(named)
            files = [
                (str(path.relative_to(each)), path)
                for each in packages
                for path in sorted(each.glob(f"usr/lib/{program.name}/**/*.py"))
            ]
            return named, files
    raise HvHostError("The downloaded packages hold no Python; clear the cache and try again.")
