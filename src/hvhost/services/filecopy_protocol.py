"""File copy messages; no I/O.

Sources: ``uapi/linux/hyperv.h`` (``hv_start_fcopy``, ``hv_do_fcopy``), ``drivers/hv/hv_fcopy.c`` of
Linux 6.1, and both guest daemons (``tools/hv/hv_fcopy_daemon.c``, ``hv_fcopy_uio_daemon.c``), for
what guests make of them.

A copy is START, WRITE for each fragment, COMPLETE; or CANCEL instead of the rest. Each is answered
with a status before the next is sent.
"""

from __future__ import annotations

import posixpath
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from hvhost.errors import HvHostError
from hvhost.services.protocol import HV_E_FAIL, IcVersion, integration_offer

FILECOPY_VERSIONS: Final = (IcVersion(1, 1),)
#: The instance is the one that ``hv_fcopy_uio_daemon`` looks for.
FILECOPY_OFFER: Final = integration_offer(
    "file-copy", "34d14be3-dee4-41c8-9ae7-6b174977c192", "eb765408-105f-49b6-b4aa-c123b64d17d4"
)
#: Bytes of one WRITE; guests copy the whole fragment whatever it holds.
DATA_FRAGMENT: Final = 6 * 1024
#: Characters of file name and path, each with its NUL.
W_MAX_PATH: Final = 260
#: Characters of a path that ``hv_fcopy_uio_daemon`` converts without reading beyond it.
UIO_PATH_LIMIT: Final = W_MAX_PATH // 2

HV_ERROR_ALREADY_EXISTS: Final = 0x80070050
HV_ERROR_DISK_FULL: Final = 0x80070070

_HEADER = struct.Struct("<I32x")  # struct hv_fcopy_hdr: operation, service_id0, service_id1
_START = struct.Struct(f"<I32x{2 * W_MAX_PATH}s{2 * W_MAX_PATH}sIQ")
_WRITE = struct.Struct(f"<I32x4xQI{DATA_FRAGMENT}s")


class FileCopyOperation(IntEnum):
    """``enum hv_fcopy_op``."""

    START_FILE_COPY = 0
    WRITE_TO_FILE = 1
    COMPLETE_FCOPY = 2
    CANCEL_FCOPY = 3


class CopyFlags(IntFlag):
    """``copy_flags`` of a START."""

    OVER_WRITE = 1
    CREATE_PATH = 2


@dataclass(frozen=True, slots=True)
class Target:
    """A file in the guest: its directory, with a slash at the end, and its name."""

    path: str
    name: str

    def __str__(self) -> str:
        return self.path + self.name


def parse_target(destination: str, source_name: str) -> Target:
    """Where *destination* puts a file called *source_name*: a file, or a directory ending in ``/``.

    :class:`HvHostError` for what cannot be said to a guest.
    """
    if not destination.startswith("/"):
        raise HvHostError(
            f"{destination!r} is not an absolute path in the guest; begin it with a slash."
        )
    path, name = posixpath.split(destination)
    target = Target(path.rstrip("/") + "/", name or source_name)
    if "\0" in destination or target.name in ("", ".", ".."):
        raise HvHostError(f"{destination!r} names no file in the guest.")
    for text in (target.path, target.name):
        # The driver converts to UTF-8 and cuts, silently, what is longer; UTF-16 has no more units.
        if len(_utf8(text)) >= W_MAX_PATH:
            raise HvHostError(
                f"{text[:40]!r}… is too long for file copy; a directory and a file name may have "
                f"{W_MAX_PATH - 1} bytes each."
            )
    return target


def check_uio_target(target: Target) -> None:
    """:class:`HvHostError` for a target that ``hv_fcopy_uio_daemon`` would put elsewhere."""
    if not str(target).isascii():
        raise HvHostError(
            f"The guest's file copy daemon (hv_fcopy_uio_daemon) damages names that are not ASCII; "
            f"copy to another name than {str(target)!r}."
        )
    for text in (target.path, target.name):
        if len(text) >= UIO_PATH_LIMIT:
            raise HvHostError(
                f"{text[:40]!r}… is too long for the guest's file copy daemon "
                f"(hv_fcopy_uio_daemon); use at most {UIO_PATH_LIMIT - 1} characters."
            )


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le", "surrogatepass")


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise HvHostError(f"{text!r} is not valid Unicode and names no file in a guest.") from error


def start_body(target: Target, flags: CopyFlags, file_size: int) -> bytes:
    """Body of a START; *file_size* in bytes."""
    return _START.pack(
        FileCopyOperation.START_FILE_COPY,
        _utf16(target.name),
        _utf16(target.path),
        flags,
        file_size,
    )


def write_body(offset: int, data: bytes) -> bytes:
    """Body of a WRITE of up to :data:`DATA_FRAGMENT` bytes."""
    return _WRITE.pack(FileCopyOperation.WRITE_TO_FILE, offset, len(data), data)


def plain_body(operation: FileCopyOperation) -> bytes:
    """Body of a COMPLETE or CANCEL."""
    return _HEADER.pack(operation)


def refusal(status: int, target: Target) -> str:
    """What it means that the guest answered a START with *status*."""
    if status == HV_ERROR_ALREADY_EXISTS:
        return f"{target} exists in the guest already; use --overwrite to replace it."
    if status == HV_ERROR_DISK_FULL:
        return f"The guest's disk has no room for {target}; free some there."
    if status == HV_E_FAIL:
        return (
            f"The guest cannot create {target}: its directory is missing (use --create-path), "
            "cannot be written to, or the guest's file copy daemon does not run."
        )
    return f"The guest refused to create {target} (status {status:#010x}); look into its log."


def failure(status: int, target: Target) -> str:
    """What it means that the guest answered a WRITE or COMPLETE with *status*."""
    if status == HV_ERROR_DISK_FULL:
        return f"The guest's disk became full while {target} was copied; free some there."
    return (
        f"The guest could not go on writing {target} (status {status:#010x}): an error on its "
        "disk, or its file copy daemon ended; look into its log."
    )
