"""Logical units: what a controller and its workers ask of a disk or a DVD drive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hvhost.storage.inquiry import Identity
from hvhost.storage.scsi import NO_SENSE, Sense, give

#: Unit attentions that wait at most; more of them tell the guest no more.
MAXIMUM_ATTENTIONS = 8
#: Media events of GET EVENT STATUS NOTIFICATION (MMC-6 6.7.2.5).
EVENT_EJECT_REQUEST, EVENT_NEW_MEDIA, EVENT_MEDIA_REMOVED = 1, 2, 3


@dataclass(slots=True)
class UnitState:
    """All of a unit that outlives a command, the medium aside.

    ``attentions`` wait to be told, oldest first. ``prevent_removal``: the guest holds the medium.
    ``events`` are media events for GET EVENT STATUS NOTIFICATION.
    """

    attentions: list[Sense] = field(default_factory=list)
    write_cache: bool = True
    prevent_removal: bool = False
    tray_open: bool = False
    events: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """As after power on: what a guest did to the unit does not outlive it."""
        self.attentions.clear()
        self.events.clear()
        self.write_cache, self.prevent_removal = True, False

    def request_eject(self) -> None:
        """Have the guest told that somebody pressed the drive's button; from any thread."""
        self.events[:] = [EVENT_EJECT_REQUEST]

    def attend(self, sense: Sense) -> None:
        """Have the guest told with its next command; from any thread."""
        if sense not in self.attentions and len(self.attentions) < MAXIMUM_ATTENTIONS:
            self.attentions.append(sense)


class LogicalUnit(Protocol):
    """A unit executes commands one at a time, on whatever thread; see ``worker.py``."""

    state: UnitState

    @property
    def identity(self) -> Identity: ...

    def execute(self, cdb: bytes, data: Sequence[memoryview]) -> int:
        """Execute a command with the guest's buffers; bytes moved.

        :class:`hvhost.storage.scsi.CheckCondition` with what to tell the guest,
        :class:`OSError` of the host's file: nothing that was asked may be taken as done then.
        """

    def close(self) -> None:
        """Give the medium back."""


def request_sense(cdb: bytes, data: Sequence[memoryview], state: UnitState) -> int:
    """REQUEST SENSE (SPC-4 6.39): sense data as parameter data, which clears it."""
    sense = state.attentions.pop(0) if state.attentions else NO_SENSE
    content = sense.pack_descriptor() if cdb[1] & 1 else sense.pack()
    return give(data, content, cdb[4])
