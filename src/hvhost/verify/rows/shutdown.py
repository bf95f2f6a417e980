"""``shutdown``: the host asks for a reboot and a power-off, and the guest's init does it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hvhost.guests.initramfs import SHUTDOWN_LINE as INIT_LINE
from hvhost.machine.model import ShutdownAction
from hvhost.verify.guest import RowFailed
from hvhost.verify.session import Session

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def _ask(session: Session, action: ShutdownAction) -> int:
    deadline = time.monotonic() + session.timing.event
    while not session.machine.info().shutdown_ready:
        if time.monotonic() >= deadline:
            raise RowFailed("the guest's shutdown driver did not open its channel")
        time.sleep(session.timing.poll)
    session.step(f"asking the guest to {action.value.replace('-', ' ')}")
    mark = len(session.machine.console())
    session.machine.shut_down(action)
    return mark


def _init_ran(session: Session, mark: int, action: ShutdownAction) -> None:
    if not session.await_console(INIT_LINE, mark):
        raise RowFailed(f"asked to {action.value.replace('-', ' ')}, init did not run its way down")


def _reboot(session: Session) -> Iterator[str]:
    before = session.running().read(BOOT_ID).strip()
    events = session.event_mark()
    mark = _ask(session, ShutdownAction.REBOOT)
    _init_ran(session, mark, ShutdownAction.REBOOT)
    if session.await_event("reset", events) is None:
        raise RowFailed("init ran its way down, but the guest never asked the machine for a reset")
    after = session.await_boot(mark).read(BOOT_ID).strip()
    if after == before:
        raise RowFailed(f"the guest's boot id is {after} before and after the reboot")
    yield f"reboot: init ran its shutdown path; boot id {before[:8]}… became {after[:8]}…"


def _power_off(session: Session) -> Iterator[str]:
    session.running()
    events = session.event_mark()
    mark = _ask(session, ShutdownAction.POWER_OFF)
    _init_ran(session, mark, ShutdownAction.POWER_OFF)
    sleep = session.await_event("sleep", events)
    if sleep is None:
        raise RowFailed("init ran its way down, but the guest never wrote a sleep state")
    if sleep.detail != "S5":
        raise RowFailed(f"the guest wrote sleep state {sleep.detail}, not S5")
    if not session.machine.wait_stopped(session.timing.event):
        raise RowFailed("the guest wrote S5, but the machine did not stop")
    session.drop()
    yield "power off: init ran its shutdown path, S5 written, machine stopped"


def prove(session: Session) -> Iterator[str]:
    """Reboot and power off, each through init; this guest has no disk whose state to check."""
    yield from _reboot(session)
    yield from _power_off(session)
    yield "no disk in this guest, so no filesystem to find clean"
    yield "reboot and power off asked by the host: init ran its shutdown path, S5 written"
