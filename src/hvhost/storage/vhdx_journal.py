"""How the metadata of a VHDX file changes without ever being half changed, [MS-VHDX] 2.2.2, 2.3.

An open file that nobody has written to is not touched. Before its first change, an entry without
pages goes into the log and a header names the log and new GUIDs. From then on metadata changes
only by :meth:`Journal.commit`:

1. flush: data is stable before metadata names it, and so are pages put in place earlier;
2. write one log entry with all changed pages;
3. flush: from here on the change has happened, a crash replays it;
4. put the pages in place. The next commit's first flush makes them stable.

Because of 1, no entry needs an older one: each is a sequence of its own, and two places in the log,
used in turn, are enough. A torn entry leaves the one before it valid, and replaying that one again
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from uuid import UUID, uuid4

from hvhost.errors import DiskError
from hvhost.storage.file import ImageFile, write_all
from hvhost.storage.vhdx_format import (
    HEADER_OFFSETS,
    HEADER_SIZE,
    LOG_VERSION,
    MIB,
    NO_GUID,
    Header,
    with_checksum,
)
from hvhost.storage.vhdx_log import MAXIMUM_LOG_LENGTH, Replay, entry_length, make_entry

MAXIMUM_PAGES = 120
"""Pages in one commit: what half of the smallest log holds."""


class Journal:
    """The headers and the log of an open file."""

    def __init__(
        self,
        file: ImageFile,
        header: Header,
        slot: int,
        new_guid: Callable[[], UUID] = uuid4,
    ) -> None:
        self.header = header
        self.active = False
        self._file = file
        self._slot = slot
        self._new_guid = new_guid
        self._sequence_number = 0
        self._turn = 0

    def replay(self, replay: Replay) -> None:
        """Do what the log of the last use wants, and close that log. Can be cut, and done again."""
        if self.header.log_guid == NO_GUID:
            return
        if self._file.size() < replay.last_file_offset:
            self._file.truncate(replay.last_file_offset)
        for offset, length in replay.cleared:
            self._file.clear(offset, length)
        for offset, page in replay.pages.items():
            write_all(self._file, offset, page)
        self._file.flush()
        self._write_header(replace(self.header, log_guid=NO_GUID))

    def begin(self, data_write_guid: UUID | None = None) -> None:
        """Before the first change: announce it."""
        if self.active:
            return
        if not self.header.log_length:
            raise DiskError(f"{self._file.name} has no log, so it cannot be changed safely.")
        header = replace(
            self.header,
            file_write_guid=self._new_guid(),
            data_write_guid=data_write_guid or self._new_guid(),
            log_guid=self._new_guid(),
            log_version=LOG_VERSION,
            log_length=min(self.header.log_length, MAXIMUM_LOG_LENGTH),
        )
        self._turn = 0
        self._write_entry({}, header.log_guid)
        self._file.flush()
        self._write_header(header)
        self.active = True

    def commit(self, pages: Mapping[int, bytes]) -> None:
        """Change *pages*, 4 KiB each by their offset in the file, all or none of them."""
        assert self.active and len(pages) <= MAXIMUM_PAGES
        self._file.flush()
        self._write_entry(pages, self.header.log_guid)
        self._file.flush()
        for offset, page in pages.items():
            write_all(self._file, offset, page)

    def end(self) -> None:
        """After the last change: all is in place, the log is not needed."""
        if self.active:
            self._file.flush()
            self._write_header(replace(self.header, log_guid=NO_GUID))
            self.active = False

    def _write_entry(self, pages: Mapping[int, bytes], log_guid: UUID) -> None:
        position = self._turn * (MIB // 2)
        assert entry_length(len(pages)) <= MIB // 2
        size = self._file.size()
        self._sequence_number += 1
        entry = make_entry(
            pages,
            position=position,
            sequence_number=self._sequence_number,
            log_guid=log_guid,
            flushed_file_offset=size,
            last_file_offset=size,
        )
        write_all(self._file, self.header.log_offset + position, entry)
        self._turn = 1 - self._turn

    def _write_header(self, header: Header) -> None:
        """To where the older header is; it counts once it is whole there."""
        header = replace(header, sequence_number=self.header.sequence_number + 1)
        slot = 1 - self._slot
        write_all(self._file, HEADER_OFFSETS[slot], with_checksum(header.pack(), HEADER_SIZE))
        self._file.flush()
        self.header, self._slot = header, slot
