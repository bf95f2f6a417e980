"""Time synchronization messages.

Source: ``linux/hyperv.h`` (``ictimesync_data``, ``ictimesync_ref_data``), ``drivers/hv/hv_util.c``
for what guests do with them. Times are in 100 ns since 1 January 1601 UTC; the reference time is
the partition's reference counter ([TLFS] 12.4) at the moment when the host's time was read. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Annotated, Final

from hvhost.services.protocol import IcVersion, integration_offer
from hvhost.wire import U8, U64, Record

TIMESYNC_VERSIONS: Final = (IcVersion(1, 0), IcVersion(3, 0), IcVersion(4, 0))
#: From this version on a message carries the reference time.
REFERENCE_VERSION: Final = IcVersion(4, 0)

TIMESYNC_OFFER: Final = integration_offer(
    "timesync", "9527e630-d0ae-497b-adce-e80ab0175caf", "2dd1ce17-079e-403c-b352-a1921ee207ee"
)

#: 1 January 1970 in 100 ns since 1 January 1601 (``WLTIMEDELTA``).
UNIX_EPOCH: Final = 116444736000000000


class TimesyncFlags(IntFlag):
    """``ICTIMESYNCFLAG_*``: set the clock now, or only take note."""

    PROBE = 0
    SYNC = 1
    SAMPLE = 2


@dataclass(frozen=True, slots=True)
class TimeSample:
    """Two clocks read at the same moment.

    ``host`` is in 100 ns since 1601, ``reference`` the partition's counter in 100 ns; ``error`` is
    by how much at most the moments differ, in seconds.
    """

    host: int
    reference: int
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class TimesyncData(Record):  # struct ictimesync_data
    """Versions 1.0 and 3.0; the guest takes the moment of arrival for that of sending."""

    parent_time: U64
    child_time: U64
    round_trip_time: U64
    flags: U8


@dataclass(frozen=True, slots=True)
class TimesyncReferenceData(Record):  # struct ictimesync_ref_data
    """Version 4.0; a ``stratum`` of zero says nothing of the quality of the host's clock."""

    parent_time: U64
    vm_reference_time: U64
    flags: U8
    leap_flags: U8 = 0
    stratum: U8 = 0
    reserved: Annotated[bytes, "3s"] = bytes(3)


def host_time(unix_nanoseconds: int) -> int:
    """A time since 1970 in nanoseconds as the protocol counts it."""
    return unix_nanoseconds // 100 + UNIX_EPOCH


def timesync_body(version: IcVersion, sample: TimeSample, flags: TimesyncFlags) -> bytes:
    """The message that brings *sample* to a guest which agreed on *version*."""
    if version >= REFERENCE_VERSION:
        return TimesyncReferenceData(sample.host, sample.reference, int(flags)).pack()
    return TimesyncData(sample.host, 0, 0, int(flags)).pack()
