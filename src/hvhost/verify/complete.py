"""Complete systems as guests of a verification: the rows that need a whole distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.guests.full import FullGuest, packages_of, prepare_full
from hvhost.manager.definition import define_guest
from hvhost.units import GIB
from hvhost.verify.contract import Row
from hvhost.verify.guest import ANY_SHAPE, Machine, Shape
from hvhost.verify.live import LiveMachine
from hvhost.verify.live_guest import COMMAND_LINE
from hvhost.verify.options import VerifyOptions
from hvhost.verify.rows import PROOFS
from hvhost.verify.session import Timing

#: A whole distribution with systemd takes two minutes on emulated processors.
TIMING = Timing(boot=500.0, stall=120.0, heartbeat=60.0)
_LEAST_MEMORY = GIB
_IMAGE = "linux-image-"
# Of hyperv-daemons in every release, and what hvhost puts beside them.
_DAEMONS = frozenset({"hv_kvp_daemon", "hv_vss_daemon", "hv_set_ifconfig", "chronyd"})


@dataclass(frozen=True, slots=True)
class CompleteGuest:
    """:class:`hvhost.verify.guest.PreparedGuest` of a complete system."""

    name: str
    system: FullGuest
    options: VerifyOptions
    progress: Callable[[str], None] = lambda text: None

    @property
    def os_name(self) -> str:
        return self.system.title

    @property
    def release(self) -> str:
        names = [name for name in packages_of(self.system) if name.startswith(f"{_IMAGE}")]
        # The longest name: the others are packages that name the newest one.
        return max(names, key=len).removeprefix(_IMAGE)

    @property
    def modules(self) -> None:
        """They are in the guest's disk, not at hand."""

    @property
    def daemons(self) -> frozenset[str]:
        return _DAEMONS

    @property
    def daemons_of(self) -> str:
        return self.name

    @property
    def is_64_bit(self) -> bool:
        return True

    def pae_sibling(self) -> None:
        """No row that needs it is proved on a complete guest."""

    def start(self, *, verbose: bool, shape: Shape = ANY_SHAPE) -> Machine:
        words = (COMMAND_LINE, "ignore_loglevel" if verbose else "", self.options.append)
        config = define_guest(
            self.name,
            command_line=" ".join(filter(None, words)),
            cpus=self.options.cpus,
            memory=max(self.options.memory, _LEAST_MEMORY),
            transport=self.options.transport,
            progress=self.progress,
        )
        return LiveMachine(shape.apply(config), self.progress)


def provable(rows: Sequence[Row], guest: str, *, named: bool) -> tuple[Row, ...]:
    """Those of *rows* whose proof is made for a complete guest.

    :class:`HvHostError` for a row asked for by name whose proof is not.
    """
    proved = {proof.row_id for proof in PROOFS if proof.complete}
    other = [row.id for row in rows if row.id not in proved]
    if named and other:
        raise HvHostError(
            f"{', '.join(other)} cannot be proved on the complete guest {guest}, only "
            f"{', '.join(sorted(proved))}; leave {guest} out, or name a guest without -full."
        )
    return tuple(row for row in rows if row.id in proved)


def prepare(options: VerifyOptions, progress: Callable[[str], None]) -> CompleteGuest:
    """The complete guest that *options* names, built if it is not there."""
    assert options.guest is not None
    return CompleteGuest(
        options.guest, prepare_full(options.guest, progress=progress), options, progress
    )
