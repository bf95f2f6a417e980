"""Makes Debian packages for the tests, well-formed ones and others."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import zstandard

CONTROL = (
    "Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: T <t@example.org>\n"
)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """One tar member; ``fields`` are attributes of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A tar archive of ``members``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _ar(parts: Mapping[str, bytes]) -> bytes:
    content = b"!<arch>\n"
    for name, data in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    return content


def write(
    path: Path,
    members: Sequence[tuple[tarfile.TarInfo, bytes]],
    compression: str = "xz",
    *,
    version: str = "1",
    depends: str = "",
) -> Path:
    """Write a package of ``members`` whose name is what ``path`` starts with."""
    control = CONTROL.format(name=path.name.split("_")[0], version=version)
    if depends:
        control += f"Depends: {depends}\n"
    control += "Description: for tests\n"
    packers: dict[str, Callable[[bytes], bytes]] = {
        "xz": lzma.compress,
        "gz": gzip.compress,
        "zst": zstandard.ZstdCompressor().compress,
        "": bytes,
    }
    suffix = f".{compression}" if compression else ""
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": gzip.compress(tar([member("./control", control.encode())])),
        f"data.tar{suffix}": packers[compression](tar(members)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_ar(parts))
    return path


def files(content: Mapping[str, bytes]) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Members for plain files, with the directories they need."""
    directories: dict[str, None] = {}
    for name in content:
        parts = name.split("/")[:-1]
        for depth in range(len(parts)):
            directories.setdefault("/".join(parts[: depth + 1]))
    members = [member(f"./{d}/", type=tarfile.DIRTYPE, mode=0o755) for d in directories]
    return members + [member(f"./{n}", data, mode=0o755) for n, data in content.items()]
