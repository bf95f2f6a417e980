"""A machine's memory as it changes: the device, the memory behind it, and who decides.

There is always one goal: the size the machine's memory should have. The administrator sets it, or
the policy does; each step towards it is one request to the guest, and the guest's answer leads to
the next. A guest that gives or takes less than it was asked for ends the journey where it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hvhost.errors import GuestMemoryError, HvHostError
from hvhost.memory import policy
from hvhost.memory.area import HotAddArea
from hvhost.memory.device import MemoryDevice, Phase, Work
from hvhost.memory.host import Commons
from hvhost.memory.policy import Claim, Pace, Sample
from hvhost.memory.protocol import PageRange
from hvhost.memory.report import MemoryInfo
from hvhost.memory.rules import changed_limits, check_size, in_mib
from hvhost.memory.settings import STEP, ceiling, check_dynamic
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import MIB, format_size

if TYPE_CHECKING:
    from hvhost.machine.computer import Computer
    from hvhost.machine.model import MachineConfig

#: How long a guest is not asked again to give, or to take, after it did not.
RETRY_SECONDS = 30.0
#: How often what the host holds for the guest is counted anew.
COUNT_SECONDS = 20.0
_PATIENCE = 0.5
_SLICE_MIN = 2 * MIB


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="memory-count", daemon=True).start()


class _Ram:
    """:class:`hvhost.memory.device.Backing` of a computer."""

    def __init__(self, computer: Computer) -> None:
        self._computer = computer

    def is_ram(self, pages: PageRange) -> bool:
        try:
            self._computer.memory.backing_offset(pages.start * PAGE_SIZE, pages.count * PAGE_SIZE)
        except GuestMemoryError:
            return False
        return True

    def release(self, pages: PageRange) -> None:
        self._computer.discard_memory(pages.start * PAGE_SIZE, pages.count * PAGE_SIZE)


class MemoryPeripheral:
    """The machine's memory; *commons* is its view of the host's, *aside* runs what takes long."""

    def __init__(
        self,
        config: MachineConfig,
        commons: Commons,
        event: Callable[[str, str], None],
        aside: Callable[[Callable[[], None]], None] = _in_thread,
    ) -> None:
        self._startup = config.memory
        self.dynamic = config.dynamic_memory
        if self.dynamic is not None:
            check_dynamic(self._startup, self.dynamic)
        self._ceiling = ceiling(self._startup, self.dynamic)
        self._commons = commons
        self._event = event
        self._name = config.name
        self._computer: Computer | None = None
        self._device: MemoryDevice | None = None
        self._changed = threading.Condition()
        self._pace = Pace()
        self._goal: int | None = None
        self._problem: str | None = None
        self._rest_until = 0.0
        self._takes_no_more = False
        self._work_since = self._report_at = 0.0
        self._told = 0
        self._seen = 0
        self._aside = aside
        self._resident, self._count_at = 0, 0.0
        self._sample: Sample | None = None

    # --- the machine's; with the lock held, but for attach and detach ----------------------------

    def attach(self, computer: Computer) -> None:
        area = computer.hot_add
        with computer.lock:
            self._changed = threading.Condition(computer.lock)
            self._computer = computer
            self._goal, self._problem, self._pace = None, None, Pace()
            self._rest_until, self._told, self._seen = 0.0, self._startup, 0
            self._sample = None
            self._device = MemoryDevice(
                HotAddArea(area.start // PAGE_SIZE, area.stop // PAGE_SIZE),
                self._most // PAGE_SIZE,
                _Ram(computer),
                self._device_changed,
            )
            computer.bus.add_device(self._device)

    def detach(self) -> None:
        with self._changed:
            self._computer = self._device = None
            self._changed.notify_all()

    def tick(self, now: float) -> None:
        if self.dynamic is None or self._device is None or self._computer is None:
            return
        claim = self._claim(self._device)
        if now >= self._count_at:
            self._count_at = now + COUNT_SECONDS
            self._aside(partial(self._count, self._computer))
        resting = now < self._rest_until
        if resting and self._takes_no_more:  # nor does it keep from others what it cannot use
            claim = replace(claim, maximum=max(claim.minimum, claim.assigned))
        target = self._commons.target(claim, self._resident)
        if not self._device.idle:  # as it is while there is a goal
            return
        change = policy.step(claim, target, self._pace, now)
        if change < 0 and resting and not self._takes_no_more:
            return  # it gave less than it was asked for; if it needs memory now, it gets some
        if change:
            self._goal, self._problem = claim.assigned + change, None
            self._pursue(self._device)

    def close(self) -> None:
        self._commons.close()

    def _count(self, computer: Computer) -> None:
        """How much the host holds for the guest; takes a while, so not under the machine's lock."""
        self._resident = computer.resident_memory()

    # --- what it comes to ------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        return self._ceiling if self.dynamic is None else self.dynamic.maximum

    def _assigned(self, device: MemoryDevice) -> int:
        state = device.state
        return self._startup + (state.added - state.balloon.count) * PAGE_SIZE

    def _demand(self, device: MemoryDevice) -> int | None:
        if device.state.status is None or self._sample is None:
            return None
        return policy.demand(self._sample)

    def _claim(self, device: MemoryDevice) -> Claim:
        assigned, dynamic = self._assigned(device), self.dynamic
        if dynamic is None:
            return Claim(assigned, self._demand(device), assigned, assigned, 0, 1)
        return Claim(
            assigned,
            self._demand(device),
            dynamic.minimum,
            dynamic.maximum,
            dynamic.buffer,
            dynamic.weight,
        )

    def _device_changed(self) -> None:
        with self._changed:
            if self._device is not None:
                self._heed(self._device)
                self._changed.notify_all()

    def _heed(self, device: MemoryDevice) -> None:
        status = device.state.status
        if device.reports != self._seen:
            self._seen = device.reports
            # One in the middle of a change tells neither of before nor of after.
            if status is not None and device.idle:
                self._report_at = time.monotonic()
                self._sample = Sample(
                    self._assigned(device),
                    status.num_avail * PAGE_SIZE,
                    status.num_committed * PAGE_SIZE,
                    device.state.balloon.count * PAGE_SIZE,
                )
        if not device.ready and self._goal is not None:
            self._give_up("the guest's memory driver went away")
        assigned = self._assigned(device)
        if assigned != self._told and device.state.work is Work.NONE:
            self._told = assigned
            self._event("memory", f"the guest has {in_mib(assigned)}")
        if device.idle:
            self._pursue(device)

    def _pursue(self, device: MemoryDevice) -> None:
        """The next request towards the goal; the device is idle."""
        if self._goal is None:
            return
        missing = (self._goal - self._assigned(device)) // PAGE_SIZE
        work, wanted = device.state.last_work, device.state.wanted
        if missing == 0:
            self._goal = None
        elif wanted and work is Work.BALLOON:
            self._give_up(f"the guest gave {in_mib(wanted * PAGE_SIZE)} less than it was asked for")
        elif wanted and work is Work.HOT_ADD:
            self._give_up("the guest did not add all the memory it was offered")
        else:
            try:
                self._request(device, missing)
            except HvHostError as error:
                self._give_up(str(error).rstrip("."))
        self._changed.notify_all()

    def _request(self, device: MemoryDevice, missing: int) -> None:
        self._work_since = time.monotonic()
        if missing < 0:
            device.balloon(self._slice(device, -missing))
        elif device.state.balloon.count:
            device.unballoon(min(missing, device.state.balloon.count))
        else:
            offer = device.next_range(missing)
            if offer is None:
                self._give_up(device.why_no_range())
                return
            pages, region = offer
            assert self._computer is not None
            # The whole block at once: the guest uses what it is told of, and no more.
            self._computer.plug_memory((region or pages).end * PAGE_SIZE)
            device.hot_add(pages, region)

    def _slice(self, device: MemoryDevice, pages: int) -> int:
        """What of *pages* to ask for at once: the guest's floor falls with what it has given."""
        demand, assigned = self._demand(device), self._assigned(device)
        if demand is None:
            return pages
        spare = (assigned - demand - policy.guest_floor(assigned)) * 9 // 10
        return min(pages, max(spare, _SLICE_MIN) // PAGE_SIZE)

    def _give_up(self, why: str) -> None:
        device = self._device
        self._takes_no_more = (
            device is not None and self._goal is not None and self._goal > self._assigned(device)
        )
        self._goal, self._problem = None, why
        self._rest_until = time.monotonic() + RETRY_SECONDS
        if device is not None:
            device.state.wanted = 0
        self._event("memory", why)
        self._changed.notify_all()

    # --- the administrator's; any thread ---------------------------------------------------------

    def _running(self) -> tuple[Computer, MemoryDevice]:
        if self._computer is None or self._device is None:
            raise HvHostError(f"machine {self._name!r} is not running; start it again.")
        return self._computer, self._device

    def info(self) -> MemoryInfo:
        """The machine's memory now; :class:`HvHostError` when it does not run."""
        computer, _ = self._running()
        resident = computer.resident_memory()
        with self._changed:
            computer, device = self._running()
            state, now, claim = device.state, time.monotonic(), self._claim(device)
            version, status = state.version, state.status
            return MemoryInfo(
                assigned=claim.assigned,
                startup=self._startup,
                added=state.added * PAGE_SIZE,
                ballooned=state.balloon.count * PAGE_SIZE,
                ceiling=self._ceiling,
                dynamic=self.dynamic,
                resident=resident,
                discarded=computer.discarded_bytes,
                reported=computer.reported_bytes,
                driver=state.phase.value,
                version=f"{version >> 16}.{version & 0xFFFF}" if device.ready else None,
                work=state.work.value,
                work_seconds=0.0 if state.work is Work.NONE else now - self._work_since,
                available=None if status is None else status.num_avail * PAGE_SIZE,
                committed=None if status is None else status.num_committed * PAGE_SIZE,
                demand=claim.demand,
                needed=None if claim.demand is None else policy.least(claim.demand),
                report_seconds=None if status is None else now - self._report_at,
                target=self._goal,
                problem=self._problem,
            )

    def set(self, size: int, timeout: float) -> MemoryInfo:
        """Give a machine with fixed memory *size* bytes; waits up to *timeout* seconds.

        :class:`HvHostError` with the numbers if that cannot be, or did not come wholly.
        """
        changed = self._changed  # of this boot
        with changed:
            computer, device = self._running()
            computer.require_running()
            self._check_size(device, size)
            self._goal, self._problem, device.state.wanted = size, None, 0
            self._pursue(device)
            deadline = time.monotonic() + timeout
            while self._goal is not None and self._computer is computer:
                has = f"{in_mib(self._assigned(device))} of the {in_mib(size)}"
                if computer.paused:
                    raise HvHostError(
                        f"machine {self._name!r} was paused when it had {has}; the change goes on "
                        "when it is resumed."
                    )
                if time.monotonic() > deadline:
                    raise HvHostError(
                        f"the guest has {has} after {timeout:.0f} seconds and is still busy; "
                        "look again later."
                    )
                changed.wait(_PATIENCE)
            if self._computer is not computer:
                raise HvHostError(
                    f"machine {self._name!r} was reset or stopped before it had {in_mib(size)}; "
                    "see `hvhost info`."
                )
            if self._problem is not None:
                raise HvHostError(
                    f"{self._problem}; it has {in_mib(self._assigned(device))} now, "
                    f"not {in_mib(size)}."
                )
        return self.info()

    def _check_size(self, device: MemoryDevice, size: int) -> None:
        if self.dynamic is not None:
            raise HvHostError(
                f"the memory of {self._name!r} is dynamic and sets itself; change its limits "
                "(--minimum, --maximum)."
            )
        if size % STEP:
            raise HvHostError(
                f"{size} bytes cannot be set; memory changes in steps of {format_size(STEP)}."
            )
        if device.state.phase is not Phase.READY:
            raise HvHostError(
                "the guest has no driver for dynamic memory (hv_balloon) running; its memory "
                f"stays {in_mib(self._assigned(device))}."
            )
        if device.state.work is not Work.NONE:
            raise HvHostError(
                f"the guest is still busy with another change ({device.state.work}); wait for it."
            )
        check_size(self._claim(device), size, self._ceiling, self._commons.room)

    def change(
        self,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
        buffer: int | None = None,
        weight: int | None = None,
    ) -> MemoryInfo:
        """Lower the minimum or raise the maximum, in bytes, while the machine runs.

        :class:`HvHostError` for all else, with the reason.
        """
        with self._changed:
            _, device = self._running()
            old = self.dynamic
            if old is None:
                raise HvHostError(
                    f"the memory of {self._name!r} is fixed, and cannot become dynamic while it "
                    "runs; stop it and start it with --memory-minimum and --memory-maximum."
                )
            self.dynamic = changed_limits(
                self._startup,
                old,
                self._ceiling,
                minimum=minimum,
                maximum=maximum,
                buffer=buffer,
                weight=weight,
            )
            device.raise_maximum(self._most // PAGE_SIZE)
        return self.info()
