"""Routes of a machine's backups."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.endpoint import Endpoint
from hvhost.storage.backup import Backup


class BackupWaitQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Waits up to ``timeout`` seconds."""

    timeout: Annotated[float, msgspec.Meta(ge=0, le=300, description="seconds to wait")] = 0.0


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/machine/backup",
        "backup_start",
        "Begin to back the machine's disks up while the guest runs",
        lambda machine, options: machine.peripheral(Backup).start(options),
        BackupOptions,
        BackupInfo,
    ),
    Endpoint(
        "GET",
        "/v1/machine/backup",
        "backup_progress",
        "How far the last backup is, or wait for its end",
        lambda machine, query: machine.peripheral(Backup).progress(query.timeout),
        BackupWaitQuery,
        BackupInfo,
    ),
    Endpoint(
        "POST",
        "/v1/machine/backup/cancel",
        "backup_cancel",
        "Give up the backup under way",
        lambda machine, _: machine.peripheral(Backup).cancel(),
        result=BackupInfo,
    ),
)
