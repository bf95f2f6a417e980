"""What the rows of services and of storage ask of the machine; its clients have all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hvhost.machine.model import ClockSample, IpSettings, KvpPool, KvpRecord
from hvhost.machine.storage_model import DriveConfig, DriveInfo


class Services(Protocol):
    """Time and key-value pairs. All methods raise :class:`hvhost.errors.HvHostError`."""

    def time_sync(self) -> float:
        """Have the guest set its clock now; seconds until its driver took it."""
        ...

    def set_service(self, name: str, enabled: bool) -> None:
        """Switch an integration service on or off; the guest's driver binds or unbinds."""
        ...

    def watch_clock(self, address: int, count: int, interval: float) -> list[ClockSample]:
        """Samples of a clock that a program of the guest keeps at this physical address."""
        ...

    def kvp_list(self, pool: KvpPool | None = None) -> list[KvpRecord]: ...

    def kvp_get(self, key: str, pool: KvpPool | None = None) -> KvpRecord: ...

    def kvp_set(self, key: str, value: str, pool: KvpPool = KvpPool.EXTERNAL) -> None: ...

    def kvp_delete(self, key: str, pool: KvpPool = KvpPool.EXTERNAL) -> None: ...

    def set_ip(self, settings: IpSettings) -> None:
        """Have the guest's daemon configure an adapter, named by its instance GUID in braces."""
        ...


class Drives(Protocol):
    """A machine's drives, by addresses like ``scsi0:1``; see its client."""

    def list(self) -> list[DriveInfo]: ...

    def add(self, drive: DriveConfig) -> DriveInfo: ...

    def remove(self, address: str) -> DriveInfo: ...

    def insert(self, address: str, path: Path) -> DriveInfo: ...

    def eject(self, address: str, *, force: bool = False) -> DriveInfo: ...

    def resize(
        self, address: str, size: int, *, shrink: bool = False, force: bool = False
    ) -> DriveInfo: ...
