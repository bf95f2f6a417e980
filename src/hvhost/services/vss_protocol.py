"""Volume snapshot (VSS) messages; no I/O.

Sources: ``uapi/linux/hyperv.h`` (``enum hv_vss_op``, ``hv_vss_msg``), ``drivers/hv/hv_snapshot.c``
and ``tools/hv/hv_vss_daemon.c`` of Linux 6.1, for what guests make of them.

Every request of the host is answered with a status before the next is sent. HOT_BACKUP asks whether
the guest can be backed up while it runs; Linux's driver answers it for its daemon, which has to be
there. It would fill in ``vss_cf.flags``, too, but takes the daemon's error, which lies in the same
place, for the operation and never does: the status is what tells. FREEZE has the daemon freeze
every file system on a writable block device, THAW undoes that.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from hvhost.services.protocol import IcVersion, integration_offer

#: The version that has FREEZE and THAW.
VSS_VERSIONS: Final = (IcVersion(5, 0),)
VSS_OFFER: Final = integration_offer(
    "vss", "35fa2e29-ea23-4236-96ae-3a6ebacba440", "2450ee40-33bf-4fbd-892e-9fb06e9214cf"
)

_MESSAGE = struct.Struct("<B7xI")  # hv_vss_hdr; then vss_cf.flags


class VssOperation(IntEnum):
    """``enum hv_vss_op``, as far as hosts of version 5 use it."""

    HOT_BACKUP = 2
    FREEZE = 5
    THAW = 6


def request_body(operation: VssOperation) -> bytes:
    """``struct hv_vss_msg`` as the host sends it."""
    return _MESSAGE.pack(operation, 0)
