"""Volume snapshot (VSS) messages; no I/O.

Sources: ``uapi/linux/hyperv.h`` (``enum hv_vss_op``, ``hv_vss_msg``), ``drivers/hv/hv_snapshot.c``
and ``tools/hv/hv_vss_daemon.c`` of Linux 6.1, for what guests make of them.

Every request of the host is answered with a status before the next is sent. HOT_BACKUP asks whether
the guest can be backed up while it runs; Linux's driver answers it for its daemon, which has to be
there. FREEZE has the daemon freeze every file system on a writable block device, THAW undoes that.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from hvhost.errors import RemoteProtocolError
from hvhost.services.protocol import IcVersion, integration_offer

#: The version that has FREEZE and THAW.
VSS_VERSIONS: Final = (IcVersion(5, 0),)
VSS_OFFER: Final = integration_offer(
    "vss", "35fa2e29-ea23-4236-96ae-3a6ebacba440", "2450ee40-33bf-4fbd-892e-9fb06e9214cf"
)
#: The guest takes its snapshot whole, and needs no recovery on the backup; the only flag there is.
VSS_HBU_NO_AUTO_RECOVERY: Final = 5

_MESSAGE = struct.Struct("<B7xI")  # hv_vss_hdr; then vss_cf.flags


class VssOperation(IntEnum):
    """``enum hv_vss_op``, as far as hosts of version 5 use it."""

    HOT_BACKUP = 2
    FREEZE = 5
    THAW = 6


def request_body(operation: VssOperation) -> bytes:
    """``struct hv_vss_msg`` as the host sends it."""
    return _MESSAGE.pack(operation, 0)


def parse_flags(data: bytes) -> int:
    """``vss_cf.flags`` of the answer to a HOT_BACKUP.

    :class:`RemoteProtocolError` if it is cut short.
    """
    if len(data) < _MESSAGE.size:
        raise RemoteProtocolError(f"a backup check was answered with {len(data)} bytes.")
    flags: int = _MESSAGE.unpack_from(data)[1]
    return flags
