"""A machine's storage: its controllers, the drives on them, and what people do to those.

Drives outlive a reset, and so do their locks on image files; controllers are made anew for every
boot. A controller comes with its first drive, also while the machine runs. One without drives goes
with the next reset: Linux waits for ever for commands on a channel that is rescinded. A fibre
channel adapter that the machine was defined with stays.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import NAMESPACE_OID, uuid5

from hvhost.errors import HvHostError
from hvhost.machine.peripheral import Surroundings
from hvhost.machine.storage_model import (
    DRIVES_PER_CONTROLLER,
    DriveConfig,
    DriveInfo,
    DriveKind,
    FibreChannelConfig,
)

if TYPE_CHECKING:
    from hvhost.machine.config import MachineConfig
    from hvhost.partition.memory import GuestMemory
    from hvhost.storage.block import DiskUnit
    from hvhost.storage.device import StorageController
    from hvhost.storage.disk import Disk
    from hvhost.storage.optical import OpticalUnit
    from hvhost.storage.worker import UnitWorker
    from hvhost.vmbus.channel import Channel, ChannelDevice

_CONTROLLER = re.compile(r"(scsi|fc)(0|[1-9][0-9]{0,2})")
_ADDRESS = re.compile(r"((?:scsi|fc)\d+):(\d+)")
#: How long a guest may take to see that a drive is gone, and how often that is looked at.
_LEAVING_SECONDS, _LOOK_SECONDS = 5.0, 0.02


@dataclass(slots=True)
class Drive:
    """A drive that is attached; ``config`` has its LUN."""

    config: DriveConfig
    unit: DiskUnit | OpticalUnit
    worker: UnitWorker

    @property
    def address(self) -> str:
        return f"{self.config.controller}:{self.config.lun}"


@dataclass(slots=True)
class Controller:
    """A controller and, while the machine runs, its device on the bus.

    ``names`` makes it a fibre channel adapter; ``stays`` without drives too.
    """

    name: str
    names: FibreChannelConfig | None = None
    stays: bool = False
    drives: dict[int, Drive] = field(default_factory=dict)
    device: StorageController | None = None
    sub_channels: list[Channel] = field(default_factory=list)


def _open_image(config: DriveConfig) -> Disk:
    """The disk in an image file or block device of the host; a DVD's medium is its bytes."""
    from hvhost.storage.images import ImageFormat, open_disk

    assert config.path is not None
    dvd = config.kind is DriveKind.DVD
    image_format = ImageFormat.RAW if dvd else None
    if config.image_format is not None:
        try:
            image_format = ImageFormat(config.image_format)
        except ValueError:
            raise HvHostError(
                f"{config.image_format!r} is no format of images; there are "
                f"{', '.join(ImageFormat)}."
            ) from None
    if config.temporary and not config.read_only and not dvd:
        from hvhost.storage.temporary import open_temporary

        return open_temporary(Path(config.path), image_format)
    return open_disk(
        Path(config.path), read_only=config.read_only or dvd, image_format=image_format
    )


class Bus(Protocol):
    """As much of :class:`hvhost.vmbus.server.VmbusServer` as storage uses."""

    def add_device(self, device: ChannelDevice) -> Channel: ...

    def remove_device(self, channel: Channel) -> None: ...


class Computer(Protocol):
    """As much of :class:`hvhost.machine.computer.Computer` as storage uses."""

    @property
    def config(self) -> MachineConfig: ...

    @property
    def memory(self) -> GuestMemory: ...

    @property
    def lock(self) -> threading.RLock: ...

    @property
    def bus(self) -> Bus: ...

    @property
    def memory_written(self) -> Callable[[Sequence[memoryview]], None]: ...


class Storage:
    """Implements :class:`hvhost.machine.peripheral.Peripheral`.

    Methods for people may be called on any thread and raise :class:`HvHostError` or
    :class:`OSError`.
    """

    def __init__(self, around: Surroundings) -> None:
        self._machine = around.config.name
        self._event = around.event
        self._changes = threading.RLock()
        self._computer: Computer | None = None
        self._controllers: dict[str, Controller] = {}
        self._kept: set[str] = set()
        try:
            for number, names in enumerate(around.config.fibre_channel):
                names.check()
                self._controllers[f"fc{number}"] = Controller(f"fc{number}", names, True)
            for config in around.config.drives:
                self._attach(config)
        except BaseException:
            self.close()
            raise

    # Peripheral.

    def attach(self, computer: Computer) -> None:
        with self._changes:
            self._computer = computer
            for controller in list(self._controllers.values()):
                if not controller.drives and not controller.stays:
                    del self._controllers[controller.name]
                    continue
                for drive in controller.drives.values():
                    drive.unit.state.reset()
                self._plug(controller, computer)

    def detach(self) -> None:
        with self._changes:
            self._computer = None
            for controller in self._controllers.values():
                controller.device = None
                controller.sub_channels.clear()

    def tick(self, now: float) -> None:
        """Nothing of storage needs the time."""

    def close(self) -> None:
        with self._changes:
            for controller in self._controllers.values():
                while controller.drives:
                    controller.drives.popitem()[1].worker.stop()

    # For people.

    def drives(self) -> list[DriveInfo]:
        """All drives, by their addresses."""
        with self._changes:
            return [
                self._describe(drive)
                for _, controller in sorted(self._controllers.items())
                for _, drive in sorted(controller.drives.items())
            ]

    def add(self, config: DriveConfig) -> DriveInfo:
        """Attach a drive; the guest finds it at once."""
        with self._changes:
            drive = self._attach(config)
            controller = self._controllers[drive.config.controller]
            computer = self._computer
            if computer is not None:
                with computer.lock:
                    if controller.device is None:
                        self._plug(controller, computer)
                    else:
                        assert drive.config.lun is not None
                        controller.device.add(drive.config.lun, drive.worker)
                        controller.device.announce()
            self._event("drive", f"{drive.address} added: {drive.config.path or 'no medium'}")
            return self._describe(drive)

    def remove(self, address: str) -> DriveInfo:
        """Detach a drive; what the guest has sent before is still done."""
        with self._changes:
            drive = self._find(address)
            self._check_not_kept(address)
            info = self._describe(drive)
            controller, lun = self._controllers[drive.config.controller], drive.config.lun
            assert lun is not None
            del controller.drives[lun]
            if self._computer is not None and controller.device is not None:
                with self._computer.lock:
                    controller.device.remove(lun)
                    controller.device.announce()
            drive.worker.stop()
            self._event("drive", f"{address} removed")
            return info

    def insert(self, address: str, path: str) -> DriveInfo:
        """Put an image into a DVD drive, in place of the one in it."""
        with self._changes:
            drive, unit = self._dvd(address)
            config = replace(drive.config, path=path)
            medium = _open_image(config)
            drive.worker.call(lambda: unit.insert(medium))
            drive.config = config
            self._announce(drive)
            self._event("drive", f"{address} inserted: {path}")
            return self._describe(drive)

    def eject(self, address: str, *, force: bool = False) -> DriveInfo:
        """Take the image out of a DVD drive; only by *force* while the guest holds it."""
        with self._changes:
            drive, unit = self._dvd(address)
            if unit.state.prevent_removal and not force and unit.medium is not None:
                unit.state.request_eject()
                raise HvHostError(
                    f"the guest uses the medium in {address} and was asked to let it go; "
                    "unmount it there, or eject it by force."
                )
            drive.worker.call(unit.eject)
            drive.config = replace(drive.config, path=None)
            self._announce(drive)
            self._event("drive", f"{address} ejected")
            return self._describe(drive)

    def resize(
        self, address: str, size: int, *, shrink: bool = False, force: bool = False
    ) -> DriveInfo:
        """Set a disk's size in bytes while the guest uses it; what is cut off is lost.

        Smaller only with *shrink*, and then down to the end of the last partition, or by *force*.
        """
        with self._changes:
            drive, unit = self._disk(address)
            self._check_not_kept(address)
            if size < unit.disk.size and not shrink:
                raise HvHostError(
                    f"{address} has {unit.disk.size} bytes, and what lies beyond {size} would be "
                    "lost; say that it may shrink if that is what you want."
                )
            drive.worker.call(partial(_resize, address, unit.disk, size, force=force))
            unit.capacity_changed()
            self._announce(drive)
            self._event("drive", f"{address} resized to {size} bytes")
            return self._describe(drive)

    def limit(self, address: str, iops: int, bandwidth: int) -> DriveInfo:
        """Limit a drive to so many requests and bytes a second; 0 is no limit."""
        with self._changes:
            drive = self._find(address)
            drive.config = replace(drive.config, iops=iops, bandwidth=bandwidth)
            _set_limits(drive)
            return self._describe(drive)

    # For backups.

    def disks(self) -> list[Drive]:
        """The drives that are disks, by their addresses."""
        with self._changes:
            return [
                drive
                for _, controller in sorted(self._controllers.items())
                for _, drive in sorted(controller.drives.items())
                if drive.config.kind is DriveKind.DISK
            ]

    @contextlib.contextmanager
    def keeping(self) -> Iterator[list[Drive]]:
        """The disks, of which none is removed or resized meanwhile."""
        with self._changes:
            disks = self.disks()
            self._kept = {each.address for each in disks}
        try:
            yield disks
        finally:
            with self._changes:
                self._kept = set()

    def _check_not_kept(self, address: str) -> None:
        if address in self._kept:
            raise HvHostError(f"{address} is being backed up; wait for that or cancel it.")

    # The rest.

    def _announce(self, drive: Drive) -> None:
        device, computer = self._controllers[drive.config.controller].device, self._computer
        if device is not None and computer is not None:
            with computer.lock:
                device.announce()

    def _attach(self, config: DriveConfig) -> Drive:
        """Open a drive and give it a place."""
        from hvhost.storage.block import DiskUnit
        from hvhost.storage.optical import OpticalUnit
        from hvhost.storage.worker import UnitWorker

        controller = self._controller(config)
        config = replace(config, lun=self._place(controller, config.lun))
        address = f"{config.controller}:{config.lun}"
        unit: DiskUnit | OpticalUnit
        if config.kind is DriveKind.DVD:
            medium = _open_image(config) if config.path else None
            unit = OpticalUnit(uuid5(NAMESPACE_OID, f"{self._machine}/{address}"), medium)
        else:
            if config.path is None:
                raise HvHostError(f"the disk {address} has no image file; name one.")
            unit = DiskUnit(_open_image(config))
        worker = UnitWorker(
            f"drive {address}", unit, self._event, pause_when_full=config.pause_when_full
        )
        drive = Drive(config, unit, worker)
        _set_limits(drive)
        assert config.lun is not None
        controller.drives[config.lun] = drive
        self._controllers[controller.name] = controller
        return drive

    def _controller(self, config: DriveConfig) -> Controller:
        """The controller named in *config*, or a new one, which is not among the others yet."""
        name = config.controller
        match = _CONTROLLER.fullmatch(name)
        if match is None:
            raise HvHostError(f"{name!r} is no controller; name it like scsi0 or fc0.")
        if name in self._controllers:
            return self._controllers[name]
        from hvhost.storage.names import default_names

        names = default_names(self._machine, int(match[2])) if match[1] == "fc" else None
        return Controller(name, names)

    def _place(self, controller: Controller, lun: int | None) -> int:
        """A free LUN: *lun*, or the first one.

        One that became free a moment ago is free once the guest knows: it would take the new
        drive for the old one.
        """
        name, taken = controller.name, set(controller.drives)
        if lun is None:
            places = [each for each in range(DRIVES_PER_CONTROLLER) if each not in taken]
            if not places:
                raise HvHostError(
                    f"{name} has {DRIVES_PER_CONTROLLER} drives; use another controller."
                )
            leaving = self._leaving(controller)
            lun = next((each for each in places if each not in leaving), places[0])
        if not 0 <= lun < DRIVES_PER_CONTROLLER:
            raise HvHostError(
                f"LUN {lun} does not exist on {name}; give one below {DRIVES_PER_CONTROLLER}."
            )
        if lun in taken:
            raise HvHostError(f"{name}:{lun} has a drive already; choose another LUN.")
        deadline = time.monotonic() + _LEAVING_SECONDS
        while lun in self._leaving(controller) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return lun

    def _leaving(self, controller: Controller) -> frozenset[int]:
        """LUNs of which the guest does not know yet that they are free."""
        if controller.device is None or self._computer is None:
            return frozenset()
        with self._computer.lock:
            return frozenset(controller.device.state.leaving)

    def _plug(self, controller: Controller, computer: Computer) -> None:
        """Put a controller with its drives on the bus."""
        from hvhost.storage.device import StorageController, SubChannel
        from hvhost.storage.names import instance, wire_names
        from hvhost.storage.protocol import HV_SCSI_GUID, HV_SYNTHFC_GUID
        from hvhost.storage.session import Surface
        from hvhost.vmbus.channel import ChannelState, Offer

        def add_sub_channels(count: int) -> None:
            for index in range(1, count + 1):
                offer = replace(device.offer, sub_channel_index=index)
                sub_channel = SubChannel(offer, device, surface)
                controller.sub_channels.append(computer.bus.add_device(sub_channel))

        def remove_sub_channels() -> None:
            channels, controller.sub_channels = controller.sub_channels, []
            for channel in channels:
                if channel.state not in (ChannelState.RESCINDED, ChannelState.RELEASED):
                    computer.bus.remove_device(channel)

        surface = Surface(
            computer.memory,
            computer.lock,
            computer.config.cpus,
            add_sub_channels,
            remove_sub_channels,
            computer.memory_written,
        )
        kind = HV_SCSI_GUID if controller.names is None else HV_SYNTHFC_GUID
        offer = Offer(kind, instance(controller.name), controller.name)
        device = StorageController(offer, surface, wire_names(controller.names))
        for lun, drive in controller.drives.items():
            device.add(lun, drive.worker)
        controller.device = device
        computer.bus.add_device(device)

    def _find(self, address: str) -> Drive:
        match = _ADDRESS.fullmatch(address)
        controller = self._controllers.get(match[1]) if match else None
        drive = controller.drives.get(int(match[2])) if controller and match else None
        if drive is None:
            known = ", ".join(each.address for each in self.drives()) or "none"
            raise HvHostError(f"there is no drive {address!r}; there are: {known}.")
        return drive

    def _dvd(self, address: str) -> tuple[Drive, OpticalUnit]:
        from hvhost.storage.optical import OpticalUnit

        drive = self._find(address)
        if not isinstance(drive.unit, OpticalUnit):
            raise HvHostError(f"{address} is a disk, not a DVD drive; add or remove it instead.")
        return drive, drive.unit

    def _disk(self, address: str) -> tuple[Drive, DiskUnit]:
        from hvhost.storage.block import DiskUnit

        drive = self._find(address)
        if not isinstance(drive.unit, DiskUnit):
            raise HvHostError(f"{address} is a DVD drive; only disks have a size to set.")
        return drive, drive.unit

    def _describe(self, drive: Drive) -> DriveInfo:
        from hvhost.storage.block import DiskUnit

        unit, config = drive.unit, drive.config
        names = self._controllers[config.controller].names
        disk = unit.disk if isinstance(unit, DiskUnit) else unit.medium
        return DriveInfo(
            address=drive.address,
            kind=config.kind,
            path=config.path if disk is not None else None,
            wwn=unit.identity.naa.hex(),
            size=disk.size if disk is not None else 0,
            allocated=disk.allocated if disk is not None else 0,
            read_only=disk is not None and disk.read_only,
            iops=config.iops,
            bandwidth=config.bandwidth,
            locked=unit.state.prevent_removal,
            waiting=drive.worker.full,
            adapter=names,
        )


def _resize(address: str, disk: Disk, size: int, *, force: bool) -> None:
    from hvhost.storage.partitions import end_of_partitions

    needed = end_of_partitions(disk) if size < disk.size and not force else 0
    if size < needed:
        raise HvHostError(
            f"{address} has partitions up to {needed} bytes; shrink those in the guest first, or "
            "cut them off by force."
        )
    disk.resize(size)


def _set_limits(drive: Drive) -> None:
    from hvhost.storage.limits import Limiter

    drive.worker.limiter = Limiter.of(drive.config.iops, drive.config.bandwidth)
