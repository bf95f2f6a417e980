"""What an administrator may say of a machine's memory, and what of it makes sense; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.units import GIB, MIB, format_size

MINIMUM_SIZE = 32 * MIB
BUFFER_DEFAULT, BUFFER_RANGE = 20, range(5, 2001)
WEIGHT_DEFAULT, WEIGHT_RANGE = 5000, range(1, 10_001)
#: The MMIO windows below and above 4 GiB that a machine has unless it is told otherwise.
LOW_MMIO_DEFAULT, HIGH_MMIO_DEFAULT = 128 * MIB, 512 * MIB
#: Sizes that a running machine can have are whole MiB, as with Hyper-V.
STEP = MIB
_ROOM_FACTOR, _ROOM_MAX = 4, 4 * GIB
# Memory is added in whole blocks, and one is left half used whenever the guest's driver restarts.
_SLACK = GIB


@dataclass(frozen=True, slots=True)
class DynamicMemory:
    """A machine's memory may be anything from *minimum* to *maximum* (bytes) while it runs.

    *buffer* is what it should have beyond its demand, in percent of that; *weight*, from 1 to
    10,000, its share where the host's memory does not suffice for all.
    """

    minimum: int
    maximum: int
    buffer: int = BUFFER_DEFAULT
    weight: int = WEIGHT_DEFAULT


def check_dynamic(startup: int, dynamic: DynamicMemory) -> None:
    """:class:`HvHostError` with the numbers for limits that no machine can keep."""
    for name, size in (("minimum", dynamic.minimum), ("maximum", dynamic.maximum)):
        if size % STEP:
            raise HvHostError(f"the memory {name} of {size} bytes is not a whole number of MiB.")
    if not MINIMUM_SIZE <= dynamic.minimum <= startup:
        raise HvHostError(
            f"the memory minimum cannot be {format_size(dynamic.minimum)}; choose "
            f"{format_size(MINIMUM_SIZE)} up to the {format_size(startup)} that the machine "
            "starts with."
        )
    if dynamic.maximum < startup:
        raise HvHostError(
            f"the memory maximum of {format_size(dynamic.maximum)} is less than the "
            f"{format_size(startup)} that the machine starts with."
        )
    if dynamic.buffer not in BUFFER_RANGE:
        raise HvHostError(
            f"the memory buffer cannot be {dynamic.buffer} %; choose {BUFFER_RANGE[0]} to "
            f"{BUFFER_RANGE[-1]}."
        )
    if dynamic.weight not in WEIGHT_RANGE:
        raise HvHostError(
            f"the memory weight cannot be {dynamic.weight}; choose {WEIGHT_RANGE[0]} to "
            f"{WEIGHT_RANGE[-1]}."
        )


def ceiling(startup: int, dynamic: DynamicMemory | None) -> int:
    """The most memory that a machine started so can ever be given, in bytes.

    Address space is set aside for it, which costs nothing until it is used.
    """
    most = startup if dynamic is None else dynamic.maximum
    return most + min((_ROOM_FACTOR - 1) * most, _ROOM_MAX)


def hot_add_bytes(startup: int, dynamic: DynamicMemory | None) -> int:
    """Address space for memory that is added while the machine runs, in bytes."""
    return -(-(ceiling(startup, dynamic) - startup) // _SLACK) * _SLACK + _SLACK
