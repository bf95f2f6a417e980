"""``mmio-gap``: the windows that a machine was given, as the guest's firmware tables show them.

The guest has 768 MiB of which only 512 lie below a gap of 3.5 GiB. Its kernel's own copy of the
memory map (``/sys/firmware/memmap``) must show all of it, the rest above 4 GiB; its DSDT must hold
both windows in the bus's ``_CRS``; and its kernel must use all the memory.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from hvhost.firmware.layout import FOUR_GIB, LOW_MMIO_END
from hvhost.units import GIB, KIB, MIB, format_size
from hvhost.verify.guest import Probe, RowFailed, Shape
from hvhost.verify.session import Session

GAP = Shape(memory=768 * MIB, low_mmio=3584 * MIB, high_mmio=2 * GIB)
KERNEL_MAX = 160 * MIB
"""What the guest's kernel may keep for itself, so that MemTotal does not show it.

With memory above 4 GiB, Linux keeps 64 MiB of bounce buffers."""

_MEMMAP = "/sys/firmware/memmap"
_DSDT = "/sys/firmware/acpi/tables/DSDT"
_DWORD_MEMORY, _QWORD_MEMORY = 0x87, 0x8A


def firmware_map(probe: Probe) -> list[tuple[int, int]]:
    """First and last byte of each range of RAM in the map that the guest was started with."""
    files = probe.read_all(f"{_MEMMAP}/*/*")
    names = {path.split("/")[-2] for path in files}
    ranges = []
    for name in names:
        start, end, kind = (files[f"{_MEMMAP}/{name}/{each}"] for each in ("start", "end", "type"))
        if kind.strip() == "System RAM":
            ranges.append((int(start, 16), int(end, 16)))
    return sorted(ranges)


def windows(dsdt: bytes) -> list[tuple[int, int]]:
    """First and last byte of the memory windows among the table's resources.

    Source: ACPI specification 6.5, 6.4.3.5: a large descriptor of type memory range.
    """
    found = []
    for tag, layout in ((_DWORD_MEMORY, "<5I"), (_QWORD_MEMORY, "<5Q")):
        size = struct.calcsize(layout)
        head = bytes([tag]) + (3 + size).to_bytes(2, "little") + b"\0"
        for match in re.finditer(re.escape(head), dsdt):
            place = match.end() + 2
            if len(dsdt) >= place + size:
                _, first, last, _, _ = struct.unpack_from(layout, dsdt, place)
                found.append((first, last))
    return found


def _span(first: int, last: int) -> str:
    return f"{first:#x}-{last:#x}"


def prove(session: Session) -> Iterator[str]:
    """The gaps asked for, in the guest's memory map and ACPI tables; no memory is lost."""
    probe = session.running(GAP)
    assert GAP.memory is not None and GAP.low_mmio is not None and GAP.high_mmio is not None
    session.step("reading the guest's memory map and ACPI tables")
    ram = firmware_map(probe)
    if not ram:
        raise RowFailed("the guest's kernel does not show the memory map it was started with")
    shown = ", ".join(_span(*each) for each in ram)
    yield f"RAM in the guest's firmware map: {shown}"
    gap_start = FOUR_GIB - GAP.low_mmio
    inside = [each for each in ram if each[1] >= gap_start and each[0] < FOUR_GIB]
    above = sum(last + 1 - first for first, last in ram if first >= FOUR_GIB)
    if inside or above != GAP.memory - gap_start:
        raise RowFailed(
            f"memory does not keep out of the gap from {gap_start:#x} to 4 GiB", [shown]
        )
    found = windows(probe.read_bytes(_DSDT))
    yield "windows in the guest's DSDT: " + ", ".join(_span(*each) for each in found)
    low = (gap_start, LOW_MMIO_END - 1)
    sizes = [last + 1 - first for first, last in found if first >= FOUR_GIB]
    if low not in found or sizes != [GAP.high_mmio]:
        raise RowFailed(f"the DSDT does not have the windows that were asked for, {_span(*low)}")
    high = next(each for each in found if each[0] >= FOUR_GIB)
    if any(first <= high[1] and last >= high[0] for first, last in ram):
        raise RowFailed("the high window lies over memory")
    match = re.search(r"^MemTotal:\s+(\d+)", probe.read("/proc/meminfo"), re.M)
    total = int(match[1]) * KIB if match else 0
    if not GAP.memory - KERNEL_MAX <= total <= GAP.memory:
        raise RowFailed(f"of {format_size(GAP.memory)} the guest has {total / MIB:.1f} MiB")
    yield (
        f"a gap of 3.5 GiB at {_span(*low)} and a window of 2 GiB at {_span(*high)}; "
        f"{format_size(above)} of RAM moved above 4 GiB, MemTotal {total / MIB:.1f} MiB"
    )
