"""Reading Debian binary packages: deb(5), an ar archive that holds a tar of the files.

Packages given by a person are not trusted: nothing is written outside the target directory, and
device nodes, owners and set-id bits are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from hvhost.errors import HvHostError
from hvhost.guests.compression import decompress
from hvhost.paths import cache_dir

log = logging.getLogger(__name__)

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # name 16, mtime 12, uid 6, gid 6, mode 8, size 10, magic 2: ar(5)
# Documentation is most of a package's files and no guest reads it.
_UNWANTED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian")


def _ar_member(path: Path, prefix: str) -> tuple[str, bytes]:
    """The first member of an ar archive whose name starts with ``prefix``: its name and content."""
    with path.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise HvHostError(f"{path} is not a Debian package; give a .deb file.")
        while header := file.read(_AR_HEADER):
            digits = header[48:58].strip()
            if header[58:] != b"`\n" or not digits.isdigit():
                raise HvHostError(f"{path} is damaged; download or build the package again.")
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(digits)
            if name.startswith(prefix):
                content = file.read(size)
                if len(content) != size:
                    break
                return name, content
            file.seek(size + size % 2, os.SEEK_CUR)
    raise HvHostError(f"{path} is incomplete; download or build the package again.")


@contextlib.contextmanager
def open_files(path: Path) -> Iterator[tarfile.TarFile]:
    """The package's files as a tar stream, read with dpkg-deb where there is one.

    Raises HvHostError when ``path`` is no Debian package or is damaged.
    """
    if not path.is_file():
        raise HvHostError(f"{path} is not a file; give an existing .deb file.")
    damaged = HvHostError(f"{path} is damaged or not a Debian package; download it again.")
    dpkg_deb = shutil.which("dpkg-deb")
    try:
        if dpkg_deb is None:
            name, content = _ar_member(path, "data.tar")
            plain = io.BytesIO(decompress(content, PurePosixPath(name).suffix))
            with tarfile.open(fileobj=plain, mode="r|") as tar:
                yield tar
            return
        with subprocess.Popen(
            [dpkg_deb, "--fsys-tarfile", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                yield tar
                while process.stdout.read(1 << 16):  # a closed pipe would fail dpkg-deb
                    pass
        if process.returncode != 0:
            raise damaged
    except (tarfile.TarError, ValueError) as error:
        raise damaged from error


def _safe_name(name: str) -> str | None:
    """A tar member's path relative to the root; ``None`` for the root or a path that climbs out."""
    parts = PurePosixPath(name.lstrip("/")).parts
    if not parts or ".." in parts:
        return None
    return "/".join(parts)


def _unpack(tar: tarfile.TarFile, target: Path) -> None:
    root = target.resolve()
    for member in tar:
        name = _safe_name(member.name)
        if name is None or name.startswith(_UNWANTED):
            continue
        path = root / name
        # A symlink of the package must not lead a later file out of the target.
        if not path.parent.resolve().is_relative_to(root):
            raise HvHostError(f"The package writes outside its own tree ({name}); do not use it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.isdir():
            if path.is_symlink():
                raise HvHostError(f"The package contains {name} twice; do not use it.")
            path.mkdir(exist_ok=True)
        elif member.issym():
            path.unlink(missing_ok=True)
            path.symlink_to(member.linkname)
        elif member.islnk():
            linked = _safe_name(member.linkname)
            if linked is None or not (root / linked).resolve().is_relative_to(root):
                raise HvHostError(
                    f"The package links outside its own tree ({name}); do not use it."
                )
            path.unlink(missing_ok=True)
            path.hardlink_to(root / linked)
        elif member.isreg():
            source = tar.extractfile(member)
            assert source is not None
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)


def extract(paths: Sequence[Path], progress: Callable[[str], None] = log.debug) -> Path:
    """The directory that holds the files of some packages together, extracted once and cached.

    Packages of one kernel belong together: newer suites spread it over several. Raises HvHostError
    when one is no Debian package or is damaged.
    """
    identity = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise HvHostError(
                f"{path} cannot be read: {error.strerror}; give an existing .deb file."
            ) from error
        identity.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    base = cache_dir("packages")
    target = base / f"{paths[0].stem}-{identity.hexdigest()[:16]}"
    if target.is_dir():
        return target
    temporary = Path(tempfile.mkdtemp(prefix=".incoming-", dir=base))
    try:
        for path in paths:
            progress(f"unpacking {path.name.split('_')[0]}")
            with open_files(path) as tar:
                _unpack(tar, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
