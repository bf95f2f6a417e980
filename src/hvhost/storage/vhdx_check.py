"""Looks at a VHDX file for what its opening does not refuse: copies that differ, leaks, leftovers.

Opening has already refused what cannot be used: blocks outside the file or on each other, regions
that overlap, a log that cannot be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvhost.storage.file import read_exactly
from hvhost.storage.vhdx import VhdxDisk
from hvhost.storage.vhdx_format import (
    NO_GUID,
    OFFSET_MASK,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    STATE_MASK,
    PayloadState,
    checksum_is_right,
)


@dataclass(slots=True)
class CheckReport:
    """What was found: *errors* are damage, *notes* are not. Sizes are bytes."""

    file: str
    format: str
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is damaged."""
        return not self.errors


def check_vhdx(disk: VhdxDisk) -> CheckReport:
    """Check an open disk; its parents are not looked at."""
    report = CheckReport(disk.file.name, "vhdx")
    report.notes += disk.notes
    report.unused = disk.space.free
    if disk.journal.header.log_guid != NO_GUID and not disk.journal.active:
        report.notes.append("its last use was cut off; its log says how it goes on")
    if disk.space.free:
        report.notes.append("it has free space inside, which compacting gives back")
    _check_region_tables(disk, report)
    _check_blocks(disk, report)
    return report


def _check_region_tables(disk: VhdxDisk, report: CheckReport) -> None:
    tables = [read_exactly(disk.file, each, REGION_TABLE_SIZE) for each in REGION_TABLE_OFFSETS]
    valid = [checksum_is_right(table) for table in tables]
    if all(valid) and tables[0] != tables[1] and disk.journal.header.log_guid == NO_GUID:
        report.errors.append("its two region tables differ")


def _check_blocks(disk: VhdxDisk, report: CheckReport) -> None:
    layout = disk.layout
    missing = sum(
        disk.table.get(disk.index(block)) & STATE_MASK != PayloadState.FULLY_PRESENT
        for block in range(layout.block_count if layout.leave_block_allocated else 0)
    )
    if missing:
        report.notes.append(f"it is fixed, but {missing} of its blocks have no place yet")
    if not layout.has_parent:
        bitmaps = sum(
            bool(disk.table.get(index) & OFFSET_MASK)
            for index in range(layout.chunk_ratio, layout.entry_count, layout.chunk_ratio + 1)
        )
        if bitmaps:
            report.errors.append(f"it has no parent, but {bitmaps} sector bitmaps")
