"""A DVD drive as a SCSI logical unit: the part of MMC-6 that reading an ISO image takes.

The medium is any :class:`hvhost.storage.disk.Disk`, read in blocks of 2,048 bytes. The guest learns
of a change by unit attention 28/00 and by a media event, of an empty drive by sense 2/3A/00.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

from hvhost.storage import inquiry, mode, scsi
from hvhost.storage.buffers import section, total
from hvhost.storage.disk import Disk
from hvhost.storage.inquiry import DeviceType, Identity
from hvhost.storage.scsi import CheckCondition, OpCode
from hvhost.storage.unit import (
    EVENT_MEDIA_REMOVED,
    EVENT_NEW_MEDIA,
    UnitState,
    request_sense,
)

PRODUCT = b"Virtual DVD-ROM"
BLOCK: Final = 2048
CAPABILITIES_PAGE: Final = 0x2A
_EJECT, _START = 0x02, 0x01
_MSF = 0x02
_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14  # ADR 1, data track
_POLLED = 0x01
_MEDIA_CLASS = 4
_PROFILE_DVD_ROM = 0x0010
Data = Sequence[memoryview]


class OpticalUnit:
    """A drive with *medium* in it or none; :class:`hvhost.storage.unit.LogicalUnit`."""

    def __init__(self, identifier: UUID, medium: Disk | None = None) -> None:
        self.medium = medium
        self.state = UnitState()
        self.identity = Identity(DeviceType.CD_DVD, PRODUCT, identifier, BLOCK, BLOCK)
        self._commands: dict[int, Callable[[bytes, Data], int]] = {
            OpCode.READ_10: self._read,
            OpCode.READ_12: self._read,
            OpCode.TEST_UNIT_READY: self._ready,
            OpCode.REQUEST_SENSE: lambda cdb, data: request_sense(cdb, data, self.state),
            OpCode.INQUIRY: self._inquiry,
            OpCode.MODE_SENSE: self._mode_sense,
            OpCode.MODE_SENSE_10: self._mode_sense,
            OpCode.START_STOP: self._start_stop,
            OpCode.ALLOW_MEDIUM_REMOVAL: self._prevent,
            OpCode.READ_CAPACITY: self._read_capacity,
            OpCode.READ_TOC: self._read_toc,
            OpCode.GET_CONFIGURATION: self._configuration,
            OpCode.GET_EVENT_STATUS_NOTIFICATION: self._event_status,
            OpCode.READ_DISC_INFO: self._disc_information,
            OpCode.READ_TRACK_INFO: self._track_information,
            OpCode.MECHANISM_STATUS: self._mechanism_status,
            OpCode.SET_CD_SPEED: lambda cdb, data: 0,
            OpCode.SYNCHRONIZE_CACHE: lambda cdb, data: 0,
        }

    # For the host.

    def insert(self, medium: Disk) -> None:
        """Put a medium in, in place of one that may be there, which is closed."""
        self.eject()
        self.medium = medium
        self.state.tray_open = False
        self.state.events = [EVENT_NEW_MEDIA]
        self.state.attend(scsi.MEDIUM_MAY_HAVE_CHANGED)

    def eject(self) -> None:
        """Take the medium out, whatever the guest says to it."""
        medium, self.medium = self.medium, None
        if medium is not None:
            self.state.events = [EVENT_MEDIA_REMOVED]
            self.state.attend(scsi.MEDIUM_MAY_HAVE_CHANGED)
            medium.close()

    # LogicalUnit.

    def execute(self, cdb: bytes, data: Data) -> int:
        command = self._commands.get(cdb[0])
        if command is None:
            raise CheckCondition(scsi.INVALID_COMMAND)
        attentions = self.state.attentions
        # Asking for events must not hide the attention from the command that follows.
        if (
            attentions
            and cdb[0] not in scsi.ANSWERED_ALWAYS
            and cdb[0] not in (OpCode.GET_CONFIGURATION, OpCode.GET_EVENT_STATUS_NOTIFICATION)
        ):
            raise CheckCondition(attentions.pop(0))
        return command(cdb, data)

    def close(self) -> None:
        medium, self.medium = self.medium, None
        if medium is not None:
            medium.close()

    # Commands.

    def _need(self) -> Disk:
        if self.medium is None:
            raise CheckCondition(scsi.MEDIUM_NOT_PRESENT)
        return self.medium

    @property
    def _blocks(self) -> int:
        return self._need().size // BLOCK

    def _ready(self, cdb: bytes, data: Data) -> int:
        self._need()
        return 0

    def _read(self, cdb: bytes, data: Data) -> int:
        medium = self._need()
        lba, blocks, _ = scsi.parse_extent(cdb)
        if lba + blocks > self._blocks:
            raise CheckCondition(scsi.LBA_OUT_OF_RANGE)
        length = blocks * BLOCK
        if total(data) < length:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        if length:
            medium.readv(lba * BLOCK, section(data, 0, length))
        return length

    def _inquiry(self, cdb: bytes, data: Data) -> int:
        content = inquiry.inquiry(self.identity, cdb)
        return scsi.give(data, content, inquiry.allocation_length(cdb))

    def _mode_sense(self, cdb: bytes, data: Data) -> int:
        """The capabilities page of MMC-3, which is where Linux looks."""
        if cdb[2] & 0x3F not in (CAPABILITIES_PAGE, mode.ALL_PAGES) or cdb[2] >> 6 == 3:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        reads = 0x3B if cdb[2] >> 6 == 0 else 0  # CD-R, CD-RW, DVD-ROM, DVD-R, DVD-RAM
        lock = 0x01 | 0x08 | 0x20 | (0x02 if self.state.prevent_removal else 0)  # tray, eject, lock
        page = struct.pack(
            ">BB6BHHHH6x", CAPABILITIES_PAGE, 20, reads, 0, 0, 0, lock, 0, 0, 2, 0, 0
        )
        if cdb[0] == OpCode.MODE_SENSE:
            header = struct.pack(">BBBB", len(page) + 3, 0, 0x80, 0)
        else:
            header = struct.pack(">HBBHH", len(page) + 6, 0, 0x80, 0, 0)
        return scsi.give(data, header + page, mode.allocation_length(cdb))

    def _start_stop(self, cdb: bytes, data: Data) -> int:
        if cdb[4] & _EJECT and not cdb[4] & _START:
            if self.state.prevent_removal:
                raise CheckCondition(scsi.MEDIUM_REMOVAL_PREVENTED)
            self.close()
            self.state.tray_open = True
            self.state.events = [EVENT_MEDIA_REMOVED]
        elif cdb[4] & _EJECT:
            self.state.tray_open = False
        return 0

    def _prevent(self, cdb: bytes, data: Data) -> int:
        self.state.prevent_removal = bool(cdb[4] & 1)
        return 0

    def _read_capacity(self, cdb: bytes, data: Data) -> int:
        last = min(max(self._blocks - 1, 0), 0xFFFFFFFF)
        return scsi.give(data, struct.pack(">II", last, BLOCK), 8)

    def _address(self, lba: int, cdb: bytes) -> bytes:
        """A block address as the guest wants it: a number, or minutes, seconds and frames."""
        if not cdb[1] & _MSF:
            return struct.pack(">I", lba)
        seconds, frames = divmod(lba + 150, 75)
        minutes, seconds = divmod(seconds, 60)
        return bytes((0, min(minutes, 255), seconds, frames))

    def _read_toc(self, cdb: bytes, data: Data) -> int:
        """One session of one track (MMC-6 6.25)."""
        blocks = self._blocks
        form, first = cdb[2] & 0x0F or cdb[9] >> 6, cdb[6]
        if form == 0:
            if 1 < first != _LEAD_OUT:
                raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
            tracks = ((1, 0), (_LEAD_OUT, blocks)) if first <= 1 else ((_LEAD_OUT, blocks),)
        elif form == 1:
            tracks = ((1, 0),)
        else:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        entries = b"".join(
            bytes((0, _DATA_TRACK, number, 0)) + self._address(lba, cdb) for number, lba in tracks
        )
        content = struct.pack(">HBB", len(entries) + 2, 1, 1) + entries
        return scsi.give(data, content, int.from_bytes(cdb[7:9], "big"))

    def _configuration(self, cdb: bytes, data: Data) -> int:
        """Profile list, core, morphing, removable medium, DVD read (MMC-6 6.6)."""
        present = self.medium is not None
        profiles = struct.pack(">HBx", _PROFILE_DVD_ROM, present)
        lock = 0x29 | 0x02 if self.state.prevent_removal else 0x29
        features = (
            (0x0000, 0x03, profiles),
            (0x0001, 0x0B, struct.pack(">IBxxx", 1, 1)),  # SCSI, device busy events
            (0x0002, 0x07, bytes((2, 0, 0, 0))),
            (0x0003, 0x03, bytes((lock, 0, 0, 0))),
            (0x0010, present, struct.pack(">IHBx", BLOCK, 1, 0)),
            (0x001F, present, bytes(4)),
        )
        kind, first = cdb[1] & 3, int.from_bytes(cdb[2:4], "big")
        if kind == 3:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        body = b"".join(
            struct.pack(">HBB", code, flags, len(content)) + content
            for code, flags, content in features
            if (code == first if kind == 2 else code >= first and (kind == 0 or flags & 1))
        )
        profile = _PROFILE_DVD_ROM if present else 0
        content = struct.pack(">IHH", len(body) + 4, 0, profile) + body
        return scsi.give(data, content, int.from_bytes(cdb[7:9], "big"))

    def _event_status(self, cdb: bytes, data: Data) -> int:
        """One media event, or none (MMC-6 6.7); asynchronous waiting is not offered."""
        if not cdb[1] & _POLLED:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        supported = 1 << _MEDIA_CLASS
        if not cdb[4] & supported:
            content = struct.pack(">HBB", 2, 0x80, supported)
        else:
            event = self.state.events.pop(0) if self.state.events else 0
            status = 0x02 * (self.medium is not None) | 0x01 * self.state.tray_open
            content = struct.pack(">HBBBBxx", 6, _MEDIA_CLASS, supported, event, status)
        return scsi.give(data, content, int.from_bytes(cdb[7:9], "big"))

    def _disc_information(self, cdb: bytes, data: Data) -> int:
        """A complete disc of one session (MMC-6 6.21)."""
        self._need()
        if cdb[1] & 7:
            raise CheckCondition(scsi.INVALID_FIELD_IN_CDB)
        content = struct.pack(">HBBBBBBBBBBI", 32, 0x0E, 1, 1, 1, 1, 0x20, 0, 0, 0, 0, 0)
        content += b"\xff" * 8 + bytes(34 - len(content) - 8)
        return scsi.give(data, content, int.from_bytes(cdb[7:9], "big"))

    def _track_information(self, cdb: bytes, data: Data) -> int:
        """The one track (MMC-6 6.26)."""
        blocks = self._blocks
        content = struct.pack(">HBBBBBBIIIII", 34, 1, 1, 0, 4, 1, 0, 0, 0, 0, 0, blocks).ljust(
            36, b"\0"
        )
        return scsi.give(data, content, int.from_bytes(cdb[7:9], "big"))

    def _mechanism_status(self, cdb: bytes, data: Data) -> int:
        """A drive without a changer (MMC-6 6.12)."""
        tray = 0x10 if self.state.tray_open else 0
        content = struct.pack(">BBHBBH", 0, tray, 0, 0, 0, 0)
        return scsi.give(data, content, int.from_bytes(cdb[8:10], "big"))
