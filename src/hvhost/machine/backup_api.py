"""Routes of a machine's backups."""

from __future__ import annotations

from hvhost.machine.backup_model import BackupInfo, BackupOptions
from hvhost.machine.endpoint import Endpoint, WaitQuery
from hvhost.storage.backup import Backup

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/machine/backup",
        "backup_start",
        "Begin to back the machine's disks up while the guest runs",
        lambda machine, options: machine.peripheral(Backup).start(options),
        BackupOptions,
        BackupInfo,
        family="storage",
    ),
    Endpoint(
        "GET",
        "/v1/machine/backup",
        "backup_progress",
        "How far the last backup is, or wait for its end",
        lambda machine, query: machine.peripheral(Backup).progress(query.timeout),
        WaitQuery,
        BackupInfo,
        family="storage",
    ),
    Endpoint(
        "POST",
        "/v1/machine/backup/cancel",
        "backup_cancel",
        "Give up the backup under way",
        lambda machine, _: machine.peripheral(Backup).cancel(),
        result=BackupInfo,
        family="storage",
    ),
)
