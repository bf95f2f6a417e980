"""What may be changed of a running machine's memory, and the sentences when it may not; no I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hvhost.errors import HvHostError
from hvhost.memory import policy
from hvhost.memory.policy import Claim
from hvhost.memory.settings import DynamicMemory, check_dynamic
from hvhost.units import MIB, format_size


def in_mib(size: int) -> str:
    """For people, to a MiB."""
    return f"{size / MIB:.0f} MiB"


def check_size(claim: Claim, size: int, ceiling: int, room: Callable[[], int]) -> None:
    """Whether the machine of *claim* can have *size*, all in bytes.

    *ceiling* is the most it was prepared for, *room* what the host has to give.
    :class:`HvHostError` with the numbers if not.
    """
    if size > ceiling:
        raise HvHostError(
            f"{in_mib(size)} is more than the {format_size(ceiling)} that this machine can be "
            "given while it runs; stop it and start it with more."
        )
    if size - claim.assigned > (free := room()):
        raise HvHostError(
            f"this computer has {in_mib(free)} to give, not the {in_mib(size - claim.assigned)} "
            f"that {in_mib(size)} would take."
        )
    if size < claim.assigned:
        if claim.demand is None:
            raise HvHostError(
                "the guest has not told yet what it needs; Linux does so from about 45 seconds "
                "after its start on, try again then."
            )
        if size < (least := policy.least(claim.demand)):
            raise HvHostError(
                f"{in_mib(size)} is too little: the guest's demand is {in_mib(claim.demand)} and "
                f"it keeps {in_mib(least - claim.demand)} free, so {in_mib(least)} is the least "
                "now."
            )


def changed_limits(
    startup: int,
    old: DynamicMemory,
    ceiling: int,
    *,
    minimum: int | None,
    maximum: int | None,
    buffer: int | None,
    weight: int | None,
) -> DynamicMemory:
    """*old* with what is given; while a machine runs, only some of it may change, one way.

    :class:`HvHostError` with the reason for all else.
    """
    for name, value in (("buffer", buffer), ("weight", weight)):
        if value is not None and value != getattr(old, name):
            raise HvHostError(
                f"the memory {name} changes only while the machine is stopped; it is "
                f"{getattr(old, name)}. Stop it and start it with --memory-{name} {value}."
            )
    new = replace(
        old,
        minimum=old.minimum if minimum is None else minimum,
        maximum=old.maximum if maximum is None else maximum,
    )
    if new.minimum > old.minimum:
        raise HvHostError(
            f"the memory minimum of a running machine can only go down from "
            f"{format_size(old.minimum)}, not up to {format_size(new.minimum)}; for that, stop it "
            "and start it with --memory-minimum."
        )
    if new.maximum < old.maximum:
        raise HvHostError(
            f"the memory maximum of a running machine can only go up from "
            f"{format_size(old.maximum)}, not down to {format_size(new.maximum)}; for that, stop "
            "it and start it with --memory-maximum."
        )
    if new.maximum > ceiling:
        raise HvHostError(
            f"the memory maximum cannot become {format_size(new.maximum)} while the machine runs, "
            f"{format_size(ceiling)} at most; stop it first."
        )
    check_dynamic(startup, new)
    return new
