"""``time-sync``: the host sets the guest's clock when asked, after a pause and for a new driver.

The guest's clock is put wrong by the guest itself, and read by the host in the guest's memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from hvhost.errors import HvHostError
from hvhost.machine.model import HeartbeatStatus, MachineState
from hvhost.verify.clocks import Watch, guest_clock, offset
from hvhost.verify.contract import HV_TS_GUID
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.session import Session
from hvhost.verify.sysfs import GuestDevice, read_counters, read_devices, read_uptime

WRONG = 3600.0
RIGHT = 0.5
LIMIT = 10.0
"""Seconds in which a requested sync must be done."""
SAMPLES = 2
SAMPLE_SECONDS = 25.0
"""Seconds in which so many samples must have come."""
CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
SERVICE = "timesync"
STOOD = 0.8
"""Of a pause, how much the guest's own clock must have stood still."""
DRIVER = "/sys/bus/vmbus/drivers/hv_utils"


def timesync_device(probe: Probe) -> GuestDevice:
    """The guest's time synchronization device; :class:`RowFailed` when it has no driver."""
    for device in read_devices(probe):
        if device.interface_type == HV_TS_GUID and device.driver and device.channels:
            return device
    raise RowFailed("no driver of the guest bound to the time synchronization device")


def await_ready(session: Session) -> None:
    """Wait until the guest's driver takes the time."""
    deadline = time.monotonic() + session.timing.event
    while not session.machine.info().timesync_ready:
        if time.monotonic() >= deadline:
            raise RowFailed("the guest's time synchronization driver did not open its channel")
        time.sleep(session.timing.poll)


def _set_wrong(probe: Probe, watch: Watch, seconds: float) -> None:
    now = int(probe.run(["date", "+%s"], 10.0).output)
    result = probe.run(["date", "-s", f"@{now + round(seconds)}"], 10.0)
    if result.status != 0 or abs(offset(watch(1, 0.0)[0]) - seconds) > 60:
        raise RowFailed(f"the guest's clock could not be put wrong: {result.output.strip()}")


def _await_right(session: Session, watch: Watch) -> tuple[float, float]:
    """Seconds until the clock was right, and by how much it is off; infinite if it never was."""
    started = time.monotonic()
    while True:
        passed = time.monotonic() - started
        off = offset(watch(1, 0.0)[0])
        if abs(off) < RIGHT:
            return passed, off
        if passed >= LIMIT:
            return float("inf"), off
        time.sleep(session.timing.poll)


def _requested(session: Session, probe: Probe, watch: Watch, wrong: float) -> str:
    _set_wrong(probe, watch, wrong)
    session.step(f"asking for a sync with the guest's clock {wrong:+.0f} s wrong")
    try:
        session.machine.services.time_sync()
    except HvHostError as error:
        raise RowFailed(f"the requested sync was not taken: {error}") from error
    seconds, off = _await_right(session, watch)
    if seconds > LIMIT:
        raise RowFailed(
            f"the clock was {wrong:+.0f} s wrong and {LIMIT:g} s after a requested sync still "
            f"{off:+.1f} s"
        )
    return (
        f"{wrong:+.0f} s wrong: right {seconds:.2f} s after one requested sync "
        f"({off * 1e3:+.2f} ms)"
    )


def _samples_leave_it(session: Session, probe: Probe, watch: Watch, channel: int) -> str:
    _set_wrong(probe, watch, WRONG)
    session.step("watching whether samples leave the guest's clock alone")
    before = read_counters(probe)[channel].interrupts
    deadline = time.monotonic() + SAMPLE_SECONDS
    came = 0
    while came < SAMPLES:
        if time.monotonic() >= deadline:
            raise RowFailed(
                f"the guest's driver was interrupted by {came} time samples in "
                f"{SAMPLE_SECONDS:g} s, not {SAMPLES}"
            )
        time.sleep(session.timing.poll)
        came = read_counters(probe)[channel].interrupts - before
    off = offset(watch(1, 0.0)[0])
    if abs(off - WRONG) > 60:
        raise RowFailed(
            f"a sample set the guest's clock: it was {WRONG:+.0f} s off, now {off:+.1f} s"
        )
    return f"{came} samples came and left a clock alone that was {off:+.0f} s wrong"


def _frozen(session: Session, watch: Watch) -> None:
    """:class:`RowFailed` unless the machine says it is paused and the guest's clock is."""
    info = session.machine.info()
    if info.state is not MachineState.PAUSED or info.heartbeat is not HeartbeatStatus.PAUSED:
        raise RowFailed(f"a paused machine is {info.state}, its heartbeat {info.heartbeat}")
    try:
        watch(1, 0.0)
    except HvHostError as error:
        if "does not change" not in str(error):
            raise
    else:
        raise RowFailed("the machine is paused, but the guest's clock goes on")


def _paused(session: Session, probe: Probe, watch: Watch) -> str:
    session.step("pausing the machine")
    source = probe.read(CLOCK_SOURCE).strip()
    began, uptime = time.monotonic(), read_uptime(probe)
    session.machine.pause()
    stopped = time.monotonic()
    try:
        _frozen(session, watch)
    finally:
        session.machine.resume()
    paused = time.monotonic() - stopped
    seconds, off = _await_right(session, watch)
    if seconds > LIMIT:
        raise RowFailed(f"after a pause of {paused:.1f} s the guest's clock is {off:+.1f} s wrong")
    stood = max(0.0, time.monotonic() - began - (read_uptime(probe) - uptime))
    # Another clock source, such as the TSC itself, is not Hyper-V's to stop.
    if source.startswith("hyperv_") and stood < paused * STOOD:
        raise RowFailed(
            f"the machine was paused for {paused:.1f} s, but for the guest only {stood:.1f} s are "
            f"missing by its {source}"
        )
    return (
        f"paused for {paused:.1f} s, in which nothing ran (heartbeat: paused): {stood:.1f} s are "
        f"missing in the guest's uptime, its clock was right {seconds:.2f} s after the resume "
        f"({off * 1e3:+.2f} ms)"
    )


def _set_on_open(session: Session, probe: Probe, watch: Watch, device: GuestDevice) -> str:
    session.step("letting the guest's driver open its channel anew")
    for verb in ("unbind", "bind"):
        try:
            probe.write(f"{DRIVER}/{verb}", device.interface_instance)
        except HvHostError as error:
            raise RowFailed(f"the guest's driver could not {verb}", [str(error)]) from error
    await_ready(session)
    seconds, off = _await_right(session, watch)
    if seconds > LIMIT:
        raise RowFailed(
            f"the guest's driver came anew and its clock was not set: it is {off:+.1f} s wrong"
        )
    return f"set when the driver opened its channel anew ({off * 1e3:+.2f} ms)"


def _switched(session: Session, probe: Probe) -> str:
    session.step("switching the service off and on")
    services, seconds = session.machine.services, session.timing.event
    services.set_service(SERVICE, False)
    try:
        deadline = time.monotonic() + seconds
        while any(each.interface_type == HV_TS_GUID for each in read_devices(probe)):
            if time.monotonic() >= deadline:
                raise RowFailed("the service was switched off, but the guest still has its device")
            time.sleep(session.timing.poll)
        if session.machine.info().timesync_ready:
            raise RowFailed("the service was switched off, but is said to be ready")
    finally:
        services.set_service(SERVICE, True)
    deadline = time.monotonic() + seconds
    while not any(
        each.interface_type == HV_TS_GUID and each.driver for each in read_devices(probe)
    ):
        if time.monotonic() >= deadline:
            raise RowFailed("the service was switched on again, but no driver of the guest took it")
        time.sleep(session.timing.poll)
    await_ready(session)
    return "switched off on the host: gone from the guest's bus; on again: its driver took it anew"


def prove(session: Session) -> Iterator[str]:
    """One requested sync puts the clock right, so do a resume and a new driver; samples do not."""
    probe = session.running()
    session.step("waiting for the guest's time driver")
    device = timesync_device(probe)
    await_ready(session)
    with guest_clock(session, "realtime") as watch:
        ahead = _requested(session, probe, watch, WRONG)
        yield ahead
        yield _requested(session, probe, watch, -WRONG)
        yield _samples_leave_it(session, probe, watch, min(device.channels))
        yield _set_on_open(session, probe, watch, device)
        yield _paused(session, probe, watch)
        yield _switched(session, probe)
    yield f"{ahead}; samples leave it alone; a new driver and a resumed guest get the time"
