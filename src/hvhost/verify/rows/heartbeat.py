"""``heartbeat``: the host knows whether the guest lives, panicked, or hangs.

The panic text must be what the guest wrote to the crash MSRs, so it has to contain a word that
was given to the guest's kernel log just before; the console is never looked at.
"""

from __future__ import annotations

import re
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence

from hvhost.machine.model import HeartbeatStatus, MachineState, ProcessorInfo, ProcessorState
from hvhost.verify.guest import RowFailed
from hvhost.verify.rows.nmi import INTERRUPT_FLAG
from hvhost.verify.rows.smp import heartbeat_device
from hvhost.verify.session import Session
from hvhost.verify.sysfs import read_counters

EXCHANGES = 20
LEAST_INTERRUPTS = 10
"""A driver still at work on the last heartbeat takes the next one without an interrupt."""
SPIN_SECONDS = 2.0
"""How long the host's CPU time is watched while the guest hangs."""


def _alive(session: Session) -> Iterator[str]:
    probe = session.running()
    session.step("waiting for the heartbeat to be ok")
    if session.await_heartbeat(HeartbeatStatus.OK, session.timing.heartbeat) is None:
        raise RowFailed(
            f"the host's heartbeat status is {session.machine.info().heartbeat.value} "
            f"although the guest is alive"
        )
    channel = min(heartbeat_device(probe).channels)
    before = read_counters(probe)[channel]
    seconds = [session.machine.heartbeat_round_trips(1)[0] for _ in range(EXCHANGES)]
    after = read_counters(probe)[channel]
    interrupts = after.interrupts - before.interrupts
    answers = after.events - before.events
    if interrupts < LEAST_INTERRUPTS or answers < EXCHANGES:
        raise RowFailed(
            f"of {EXCHANGES} heartbeats the guest's own counters show {interrupts} received and "
            f"{answers} answered"
        )
    yield (
        f"alive: ok; {EXCHANGES} heartbeats, the guest counted {interrupts} interrupts and "
        f"{answers} signals back on channel {channel}; median "
        f"{statistics.median(seconds) * 1e6:.0f} us"
    )


def _panicked(session: Session) -> Iterator[str]:
    probe = session.running()
    token = f"hvhost-verify-{secrets.token_hex(8)}"
    session.step("letting the guest panic")
    mark = session.event_mark()
    probe.write("/dev/kmsg", f"<2>{token}\n")
    probe.fire("/proc/sysrq-trigger", "c")
    event = session.await_event("crash", mark, suits=lambda event: bool(event.detail))
    session.spoil()
    info = session.machine.info()
    if event is None:
        if info.crash is None:
            raise RowFailed("the guest panicked and wrote nothing to the crash MSRs")
        raise RowFailed(
            "the guest reported its panic without its text: it did not see the crash-message "
            "ability of the host",
            [f"parameters: {' '.join(f'{value:#x}' for value in info.crash.parameters)}"],
        )
    for wanted in (token, "sysrq triggered crash"):
        if wanted not in event.detail:
            raise RowFailed(
                f"the panic text that the guest sent does not contain {wanted!r}",
                [f"text: {line}" for line in event.detail.splitlines()[-8:]],
            )
    if info.state is not MachineState.CRASHED or info.heartbeat is not HeartbeatStatus.CRASHED:
        raise RowFailed(
            f"after the panic the machine is {info.state.value} and its heartbeat "
            f"{info.heartbeat.value}; both must be crashed"
        )
    line = re.search(r"Kernel panic - not syncing: .*", event.detail)
    yield (
        f"panic: crashed; the guest sent {len(event.detail)} characters through the crash MSRs, "
        f"with the word given to its log before ({token}) and: "
        f"{line[0].strip() if line else 'sysrq triggered crash'}"
    )


def _spinning(hung: Sequence[ProcessorInfo], now: Sequence[ProcessorInfo]) -> str:
    """Where the VPs spin; :class:`RowFailed` for one that is not where and how it was hung."""
    for before, after in zip(hung, now, strict=True):
        if after.state is not ProcessorState.RUNNING:
            raise RowFailed(f"VP {after.index} is {after.state.value}, not hung")
        if after.ring:
            raise RowFailed(f"VP {after.index} is in ring {after.ring}, not in the kernel")
        if after.rflags & INTERRUPT_FLAG:
            raise RowFailed(f"VP {after.index} takes interrupts: RFLAGS {after.rflags:#x}")
        if after.rip != before.rip:
            raise RowFailed(
                f"VP {after.index} does not stay where it was hung: {before.rip:#x}, now "
                f"{after.rip:#x}"
            )
    places = ", ".join(f"VP {vp.index} at {vp.rip:#x} (RFLAGS {vp.rflags:#x})" for vp in now)
    return f"in ring 0 with interrupts off, the same at both looks: {places}"


def _hung(session: Session) -> Iterator[str]:
    probe = session.running()
    if session.await_heartbeat(HeartbeatStatus.OK, session.timing.heartbeat) is None:
        raise RowFailed("after the panic and a reset, the heartbeat did not become ok again")
    where = session.hung()
    started = time.monotonic()
    if probe.answers(session.timing.silence):
        raise RowFailed("the guest was hung by the host but its probe still answers")
    spent_before = session.machine.vp_seconds()
    time.sleep(SPIN_SECONDS if spent_before is not None else 0.0)
    spent_after = session.machine.vp_seconds()
    session.step("waiting for the host to notice")
    info = session.await_heartbeat(HeartbeatStatus.NO_CONTACT, session.timing.no_contact)
    if info is None:
        raise RowFailed(
            f"the guest hangs and after {time.monotonic() - started:.0f} s the host still says "
            f"{session.machine.info().heartbeat.value}"
        )
    if info.state is not MachineState.RUNNING:
        raise RowFailed(f"the hung guest's machine is {info.state.value}, so its VPs do not spin")
    line = f"hung: no-contact {time.monotonic() - started:.1f} s after the hang; no probe answer"
    line += f"; {_spinning(where, session.machine.processors())}"
    if spent_before is not None and spent_after is not None:
        spent = spent_after - spent_before
        # A halted or paused VP costs nothing; two busy host CPUs may be shared with others.
        if spent < SPIN_SECONDS / 8:
            raise RowFailed(
                f"the hung guest used {spent:.2f} s of CPU in {SPIN_SECONDS:.0f} s: its VPs do "
                "not spin"
            )
        line += f"; what runs its VPs used {spent:.1f} s of CPU in {SPIN_SECONDS:.0f} s"
    yield line


def prove(session: Session) -> Iterator[str]:
    """Alive is ``ok``, a panic is ``crashed`` with its text, a hang is ``no-contact``."""
    yield from _alive(session)
    yield from _panicked(session)
    yield from _hung(session)
    yield "ok when alive; crashed with the panic text the guest sent; no-contact when hung"
