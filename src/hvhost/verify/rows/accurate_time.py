"""``accurate-time``: the guest's own chrony, on the PTP clock of time samples, is within 1 ms.

The clocks are compared in the guest's memory (``hvhost.machine.clock_watch``), so that no round
trip is measured; readings during which a VP or the host lost the CPU are known by their error and
left out, and counted.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence

from hvhost.machine.model import ClockSample
from hvhost.verify.clocks import guest_clock, judge, offset
from hvhost.verify.guest import Probe, RowFailed
from hvhost.verify.plot import svg_plot
from hvhost.verify.rows.time_sync import await_ready
from hvhost.verify.session import Session

LIMIT = 1e-3
"""Seconds: what the contract promises."""
EXACT = 100e-6
"""Seconds of error at which a reading still counts."""
SETTLE_SECONDS = 60.0
"""How long chrony may take to be near."""
SETTLED = 300e-6
SAMPLES, INTERVAL = 500, 0.04
LEAST = 100
"""Of the samples under load, how many must be exact."""
PAGE, TSC = "hyperv_clocksource_tsc_page", "tsc"
_CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0"
_CONFIG = "/run/hvhost-chrony.conf"
_LOG = "/run/hvhost-chrony"


def _clocksource(probe: Probe) -> str:
    """Put the guest on the reference TSC page; what it was on before, in words."""
    current = probe.read(f"{_CLOCKSOURCE}/current_clocksource").strip()
    available = probe.read(f"{_CLOCKSOURCE}/available_clocksource").split()
    if PAGE not in available:
        raise RowFailed(
            f"the guest has no {PAGE}: it keeps time by {current}, of {', '.join(available)}"
        )
    if current == PAGE:
        return f"clocksource {PAGE}"
    # With an invariant TSC, Linux prefers the TSC itself, as on a Hyper-V that promises one.
    probe.write(f"{_CLOCKSOURCE}/current_clocksource", PAGE)
    now = probe.read(f"{_CLOCKSOURCE}/current_clocksource").strip()
    if current != TSC or now != PAGE:
        raise RowFailed(f"the guest keeps time by {current}, asked for {PAGE} by {now}")
    return f"clocksource {TSC}, which the host calls invariant; {PAGE} taken for the test"


def _ptp_device(probe: Probe) -> str:
    names = probe.read_all("/sys/class/ptp/ptp*/clock_name")
    for path, name in sorted(names.items()):
        if name.strip() == "hyperv":
            return f"/dev/{path.split('/')[-2]}"
    raise RowFailed(f"no PTP clock of the guest is named hyperv, of {sorted(names.values())}")


def _start_chrony(probe: Probe, device: str) -> None:
    config = (
        f"refclock PHC {device} poll 0 dpoll -2 offset 0 stratum 2\n"
        "makestep 0.001 3\n"
        f"logdir {_LOG}\nlog refclocks tracking\ncmdport 0\npidfile {_LOG}/pid\n"
    )
    script = (
        f"mkdir -p {_LOG}; printf %s {shlex.quote(config)} > {_CONFIG}; "
        f"chronyd -u root -f {_CONFIG}"
    )
    result = probe.run(["sh", "-c", script], 30.0)
    if result.status != 0:
        raise RowFailed(f"the guest's chronyd does not start: {result.output.strip()}")


def _stop_chrony(probe: Probe) -> None:
    probe.run(["sh", "-c", f"kill $(cat {_LOG}/pid); rm -rf {_LOG} {_CONFIG}"], 10.0)


def _settled(samples: Sequence[ClockSample], *, last: bool) -> bool:
    """Whether the clock is near the host's; :class:`RowFailed` if not, at the *last* look."""
    try:
        found = judge(samples, EXACT, len(samples) // 4)
    except RowFailed:
        if last:
            raise
        return False
    near = abs(found.centre) <= SETTLED
    if last and not near:
        raise RowFailed(f"chrony did not come near the host's time: {found}")
    return near


def _load(probe: Probe, cpus: int) -> str:
    """Keep every CPU of the guest busy; the ids of the processes."""
    script = (
        f"for i in $(seq {cpus}); do dd if=/dev/urandom of=/dev/null bs=64k "
        ">/dev/null 2>&1 </dev/null & echo $!; done"
    )
    return " ".join(probe.run(["sh", "-c", script], 10.0).output.split())


def _keep_plot(session: Session, samples: Sequence[ClockSample]) -> None:
    first = samples[0].host
    session.attachments["accurate-time.svg"] = svg_plot(
        "CLOCK_REALTIME of the guest against the host's, CPUs loaded",
        "us",
        [(sample.host - first) / 1e9 for sample in samples],
        [offset(sample) * 1e6 for sample in samples],
    )


def prove(session: Session) -> Iterator[str]:
    """The TSC page is the clock source, the PTP clock is right, and so is chrony under load."""
    probe = session.running()
    session.step("looking at the guest's clocks")
    await_ready(session)
    yield _clocksource(probe)
    device = _ptp_device(probe)
    with guest_clock(session, device) as watch:
        ptp = judge(watch(100, 0.02), EXACT, 20)
    yield f"{device} (hyperv) against the host's clock: {ptp}"
    _start_chrony(probe, device)
    try:
        with guest_clock(session, "realtime") as watch:
            session.step("waiting for the guest's chrony to settle")
            deadline = time.monotonic() + SETTLE_SECONDS
            while not _settled(watch(20, 0.02), last=time.monotonic() >= deadline):
                time.sleep(session.timing.poll)
            session.step("comparing clocks under load")
            load = _load(probe, session.cpus)
            try:
                samples = watch(SAMPLES, INTERVAL)
            finally:
                probe.run(["sh", "-c", f"kill {load}"], 10.0)
        log = probe.read(f"{_LOG}/refclocks.log")
    finally:
        _stop_chrony(probe)
    if "PHC" not in log:
        raise RowFailed(f"chrony read nothing from {device}")
    found = judge(samples, EXACT, LEAST)
    _keep_plot(session, [each for each in samples if each.error <= EXACT * 1e9])
    yield f"readings exact to {found.blur[0] * 1e6:.1f} us (median) by their brackets"
    rig = session.machine.info().transport == "rig"
    judged, name = (found.median, "median") if rig else (found.p99, "p99")
    if judged >= LIMIT:
        raise RowFailed(f"CLOCK_REALTIME under chrony and load: {found}; {name} is not below 1 ms")
    yield (
        f"CLOCK_REALTIME under chrony on {device}, CPUs loaded: {found}; judged by {name}; "
        f"{found.blurred} of {len(samples)} readings left out, CPU lost for up to "
        f"{found.blur[1] * 1e3:.1f} ms"
    )
