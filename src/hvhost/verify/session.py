"""One guest through a whole verification: booted when a row needs it, booted again when it must.

A row asks for the guest in a state (:meth:`Session.running`, :meth:`Session.hung`) and gets it as
cheaply as can be: what the row before left behind is used where it fits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from threading import get_ident

from hvhost.errors import HvHostError
from hvhost.machine.model import (
    HeartbeatStatus,
    MachineEvent,
    MachineInfo,
    MachineState,
    ProcessorInfo,
    Transport,
)
from hvhost.verify.diagnose import Sighting, explain, kernel_panic
from hvhost.verify.guest import ANY_SHAPE, Machine, PreparedGuest, Probe, RowFailed, Shape
from hvhost.verify.sysfs import GuestDevice, read_devices, read_uptime

log = logging.getLogger(__name__)

BOOT_SECONDS = 75.0
# Debian's 32-bit kernels look for ISA cards and old controllers, port by port, each an exit.
PATIENCE_32 = 3
STALL_SECONDS = 25.0
HEARTBEAT_SECONDS = 20.0
NO_CONTACT_SECONDS = 40.0
MOST_PATIENCE = 6.0
#: Uptime at which a 32-bit Linux's count of ticks is past zero, and a bit (``linux/jiffies.h``).
TICKS_SECONDS = 300.0 + 5.0
_DEAD = (MachineState.STOPPED, MachineState.FAILED)


class GuestState(StrEnum):
    """What the session knows of its guest."""

    NONE = "none"
    RUNNING = "running"
    HUNG = "hung"
    SPOILED = "spoiled"


class BootFailed(RowFailed):
    """The guest did not come up as a guest of the bus; the evidence is the whole finding.

    ``in_user_space`` says that the probe answered, so that only the bus is amiss.
    """

    def __init__(self, finding: tuple[str, ...], *, in_user_space: bool) -> None:
        super().__init__(finding[0], finding[1:])
        self.in_user_space = in_user_space


def patience() -> float:
    """How many times longer than usual to wait, on a computer with more to run than processors.

    A guest that gets a tenth of a processor boots ten times slower and is none the worse for it.
    Only waiting is stretched by it: what a row proves to be quick has limits of its own.
    """
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(load, 1.0), MOST_PATIENCE)


@dataclass(frozen=True, slots=True)
class Timing:
    """Time-outs in seconds on a computer that has time for its guest; tests shorten them.

    ``stretch`` tells how many times longer to wait just now.
    """

    boot: float = BOOT_SECONDS
    stall: float = STALL_SECONDS
    heartbeat: float = HEARTBEAT_SECONDS
    no_contact: float = NO_CONTACT_SECONDS
    event: float = 30.0
    bus: float = 5.0
    poll: float = 0.2
    silence: float = 3.0
    settle: float = 0.1
    stretch: Callable[[], float] = patience

    def patiently(self, seconds: float) -> float:
        """How long to wait just now for what takes at most *seconds* on a computer with time."""
        return seconds * self.stretch()

    def stretched(self) -> Timing:
        """With the time-outs that suit the computer's load of this moment."""
        factor = self.stretch()
        names = ("boot", "stall", "heartbeat", "no_contact", "event", "bus", "silence")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


class Session:
    """The guest under test and everything that was done to it.

    *announce* is told in a few words what happens now. ``attachments`` are files, by name, for
    those who keep logs.
    """

    def __init__(
        self,
        guest: PreparedGuest,
        cpus: int,
        announce: Callable[[str], None],
        timing: Timing | None = None,
    ) -> None:
        self.guest = guest
        self.cpus = cpus
        self._timing = timing or Timing()
        self.events: list[MachineEvent] = []
        self.consoles: list[str] = []
        self.machines: list[Machine] = []
        self.notes: list[str] = []
        self.attachments: dict[str, str] = {}
        self.boots = 0
        self.verbose = False
        self.transports: set[str] = set()
        self.doing = "starting"
        #: Seconds of this row that are not its own, see :meth:`await_ticks`.
        self.excused = 0.0
        self._announce = announce
        self._machine: Machine | None = None
        self._probe: Probe | None = None
        self._state = GuestState.NONE
        self._shape = ANY_SHAPE
        self._booting = guest
        self._heard = 0
        self._hung_at: Sequence[ProcessorInfo] = ()
        self._owner = get_ident()

    def adopt(self) -> None:
        """From now on only the calling thread may use the machine.

        So a row whose time was up cannot touch the next row's guest when its call returns at last.
        """
        self._owner = get_ident()

    @property
    def timing(self) -> Timing:
        """The time-outs, for the computer's load of this moment."""
        return self._timing.stretched()

    @property
    def machine(self) -> Machine:
        if self._owner != get_ident():
            raise RowFailed("this row's time is up; its guest was taken away.")
        if self._machine is None:
            raise RowFailed("the machine is not running; this is a bug of hvhost's verify.")
        return self._machine

    def step(self, text: str) -> None:
        """Say what happens now."""
        log.info("%s", text)
        self.doing = text
        self._announce(text)

    @property
    def boot_limit(self) -> float:
        """Seconds that the guest which is started now may take to user space."""
        return self.timing.boot * (1 if self._booting.is_64_bit else PATIENCE_32)

    def await_ticks(self, probe: Probe) -> None:
        """On a 32-bit guest, wait until its count of ticks is past zero.

        Linux starts it five minutes below zero, and drivers that remember "not yet" as tick 0 take
        that for the future until then: hv_balloon reports nothing, hv_netvsc puts every change of
        the link off. That is the guest's own, and not time that the row may be blamed for.
        """
        while not self._booting.is_64_bit:
            left = TICKS_SECONDS - read_uptime(probe)
            if left <= 0:
                return
            self.step(f"waiting {left:.0f} s: a 32-bit kernel's ticks start five minutes below 0")
            pause = min(left, self._timing.event)
            self.excused += pause
            time.sleep(pause)

    # States a row can ask for.

    def running(self, shape: Shape = ANY_SHAPE, guest: PreparedGuest | None = None) -> Probe:
        """A guest in user space on a bus, with the probe answering, in a machine of that *shape*.

        It is the guest under test unless a row brings another *guest*.
        :class:`BootFailed` with the finding when the guest does not come up.
        """
        if self._owner != get_ident():
            raise RowFailed("this row's time is up; its guest was taken away.")
        guest = guest or self.guest
        if shape != self._shape or guest is not self._booting:
            self.drop()
            self._shape, self._booting = shape, guest
        if self._state is GuestState.RUNNING and self._probe is not None:
            if self._probe.answers(self.timing.silence):
                return self._probe
            self.notes.append("the guest stopped answering between two rows and was reset")
            self.spoil()
        if self._machine is None:
            self.step("starting the guest")
            self._machine = guest.start(verbose=self.verbose, shape=shape)
            self.machines.append(self._machine)
            self._heard = 0
            mark = 0
        else:
            self.step("resetting the guest")
            events = self.event_mark()
            self._machine.reset()
            # A reset is only asked for; until it is done, the old guest may still answer.
            if self.await_event("reset", events) is None:
                raise RowFailed("the machine was asked for a reset and did not do it")
            # Its last words come with the event, the new guest's first ones a good while later.
            time.sleep(self.timing.settle)
            mark = len(self._machine.console())
        return self.await_boot(mark)

    def hung(self) -> Sequence[ProcessorInfo]:
        """Leave every VP spinning with interrupts off; the guest is set to panic on an NMI.

        Where the VPs were when they were hung.
        """
        if self._state is GuestState.HUNG:
            return self._hung_at
        probe = self.running()
        probe.write("/proc/sys/kernel/unknown_nmi_panic", "1")
        self.step("hanging the guest: every VP on a self-jump, interrupts off")
        self._hung_at = self.machine.hang()
        self._state = GuestState.HUNG
        return self._hung_at

    def spoil(self) -> None:
        """The guest is not to be used any further in the state it is in."""
        self._close_probe()
        if self._state is not GuestState.NONE:
            self._state = GuestState.SPOILED

    def recover(self) -> None:
        """After a row that failed: the next one gets a guest started anew, or a reset one."""
        self.spoil()
        if self._machine is None:
            return
        try:
            dead = self._machine.info().state in _DEAD
        except HvHostError as error:
            log.info("the machine is gone: %s", error)
            dead = True
        if dead:
            self.drop()

    def abandon(self) -> None:
        """End the machine under a row whose time is up: calls that wait for it fail then."""
        machine, self._machine = self._machine, None
        self._state = GuestState.NONE
        self._probe = None
        if machine is not None:
            machine.kill()

    def drop(self) -> None:
        """End the machine, keeping what it said."""
        self._close_probe()
        machine, self._machine = self._machine, None
        self._state = GuestState.NONE
        if machine is None:
            return
        self.consoles.append(machine.console())
        try:
            self._hear(machine, 0.0)
        except HvHostError as error:
            log.info("the machine is gone: %s", error)
        machine.kill()

    # What rows wait for.

    def await_boot(self, mark: int) -> Probe:
        """Wait until a guest that starts now is up; console text before *mark* is of older boots.

        :class:`BootFailed` with the finding otherwise.
        """
        self._close_probe()
        self._state = GuestState.SPOILED
        started = time.monotonic()
        self.step("booting")
        machine = self.machine
        probe: Probe | None = None
        info: MachineInfo | None = None
        worker_error: str | None = None
        panicked = 0
        said, said_at = 0, started
        limit = self.boot_limit
        while probe is None and time.monotonic() - started < limit and panicked < 3:
            if len(machine.console()) > said:
                said, said_at = len(machine.console()), time.monotonic()
            elif self.verbose and time.monotonic() - said_at > self.timing.stall:
                break
            try:
                probe = machine.connect_probe(1.0)
                info = machine.info()
                self.transports.add(info.transport)
            except HvHostError as error:
                worker_error = str(error)
                break
            if info.state in _DEAD:
                worker_error = info.error or f"the machine stopped: {info.last_stop or 'no reason'}"
                break
            # A few looks more after a panic, so that its text is complete.
            if kernel_panic(machine.console()[mark:]) or info.state is MachineState.CRASHED:
                panicked += 1
        seconds = time.monotonic() - started
        self._probe = probe
        devices: tuple[GuestDevice, ...] | None = None
        kernel_log = ""
        if probe is not None:
            devices = self._await_bus(probe)
            info = machine.info()
            if devices and info.vmbus_version:
                self.boots += 1
                self._state = GuestState.RUNNING
                return probe
            kernel_log = probe.run(["dmesg"], 20.0).output
        finding = explain(
            Sighting(
                console=machine.console()[mark:],
                release=self._booting.release,
                modules=self._booting.modules,
                probe_answered=probe is not None,
                seconds=seconds,
                info=info,
                log=kernel_log,
                devices=devices,
                worker_error=worker_error,
            )
        )
        raise BootFailed(finding, in_user_space=probe is not None)

    def _await_bus(self, probe: Probe) -> tuple[GuestDevice, ...]:
        # Drivers probe asynchronously: user space may be there before its devices are.
        deadline = time.monotonic() + self.timing.bus
        while not (devices := read_devices(probe)) and time.monotonic() < deadline:
            time.sleep(self.timing.poll)
        return devices

    def event_mark(self) -> int:
        """The sequence of the newest event so far, for :meth:`await_event`."""
        self._hear(self.machine, 0.0)
        return self._heard

    def heard(self) -> int:
        """How many events there were so far, of all machines."""
        if self._machine is not None:
            with contextlib.suppress(HvHostError):  # a machine that is gone has no more to say
                self._hear(self._machine, 0.0)
        return len(self.events)

    def emulation_loss(self, mark: int) -> str | None:
        """How the rig lost the guest, or itself, since :meth:`heard` gave *mark*; if it did."""
        self.heard()
        for event in self.events[mark:] if Transport.RIG in self.transports else ():
            if (event.kind, event.detail) == ("reset", "triple fault"):
                return "the guest died of a triple fault"
            if event.kind == "stopped" and event.detail.startswith("the rig"):
                return event.detail.rstrip(".")
        return None

    def await_event(
        self,
        kind: str,
        after: int,
        timeout: float | None = None,
        suits: Callable[[MachineEvent], bool] = lambda event: True,
    ) -> MachineEvent | None:
        """The first suitable event of *kind* with a sequence above *after*, or ``None`` in time."""
        deadline = time.monotonic() + (self.timing.event if timeout is None else timeout)
        machine = self.machine
        first = len(self.events)
        while first and self.events[first - 1].sequence > after:
            first -= 1
        while True:
            for event in self.events[first:]:
                if event.kind == kind and suits(event):
                    return event
            first = len(self.events)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._hear(machine, min(left, 1.0))

    def await_heartbeat(self, status: HeartbeatStatus, timeout: float) -> MachineInfo | None:
        """The machine's account once its heartbeat has *status*; ``None`` if that does not come."""
        deadline = time.monotonic() + timeout
        while True:
            info = self.machine.info()
            if info.heartbeat is status:
                return info
            if time.monotonic() >= deadline:
                return None
            time.sleep(self.timing.poll)

    def await_console(self, text: str, mark: int, timeout: float | None = None) -> bool:
        """Whether *text* appears on the console after *mark* in time."""
        deadline = time.monotonic() + (self.timing.event if timeout is None else timeout)
        while text not in self.machine.console()[mark:]:
            if time.monotonic() >= deadline:
                return False
            time.sleep(self.timing.poll)
        return True

    def _hear(self, machine: Machine, timeout: float) -> None:
        for event in machine.events(self._heard, timeout):
            self.events.append(event)
            self._heard = max(self._heard, event.sequence)

    def _close_probe(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.close()
