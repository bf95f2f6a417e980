"""``time-sync``, ``accurate-time`` and ``kvp`` against the scripted guest; and clocks judged."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from scripted_guest import FAST, ScriptedGuest, Silent

from hvhost.machine.model import ClockSample
from hvhost.verify.clocks import judge
from hvhost.verify.contract import Status, find_rows
from hvhost.verify.guest import RowFailed
from hvhost.verify.plot import svg_plot
from hvhost.verify.results import RowResult
from hvhost.verify.rows import accurate_time, kvp, time_sync
from hvhost.verify.runner import run_rows
from hvhost.verify.session import Session

ROWS = ("time-sync", "accurate-time", "kvp")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_sync, "LIMIT", 0.05)
    monkeypatch.setattr(time_sync, "SAMPLE_SECONDS", 0.4)
    monkeypatch.setattr(accurate_time, "SETTLE_SECONDS", 0.05)


def run_one(guest: ScriptedGuest, row_id: str) -> tuple[RowResult, dict[str, str]]:
    attachments: dict[str, str] = {}

    def inspect(session: Session) -> None:
        attachments.update(session.attachments)

    rows = find_rows([row_id], option="--rows")
    outcome = run_rows(guest, rows, guest.cpus, Silent(), timing=FAST, inspect=inspect)
    return outcome.results[0], attachments


@pytest.mark.parametrize("row_id", ROWS)
def test_a_right_guest_works(row_id: str) -> None:
    result, _ = run_one(ScriptedGuest(), row_id)
    assert result.status is Status.WORKS, result.evidence


@pytest.mark.parametrize(
    ("row_id", "fault", "said"),
    [
        ("time-sync", "no-timesync", "did not open its channel"),
        ("time-sync", "no-clock", "cannot show its clock realtime"),
        ("time-sync", "date-refused", "could not be put wrong"),
        ("time-sync", "sync-refused", "requested sync was not taken"),
        ("time-sync", "sync-ignored", "after a requested sync still +3600.0 s"),
        ("time-sync", "no-samples", "interrupted by 0 time samples"),
        ("time-sync", "samples-force", "a sample set the guest's clock"),
        ("time-sync", "unbind-refused", "could not unbind"),
        ("time-sync", "no-sync-on-open", "came anew and its clock was not set"),
        ("time-sync", "says-running", "a paused machine is running, its heartbeat ok"),
        ("time-sync", "paused-runs", "paused, but the guest's clock goes on"),
        ("time-sync", "no-sync-on-resume", "s the guest's clock is -6.0 s wrong"),
        ("time-sync", "clock-runs-on", "for the guest only 0.0 s are missing"),
        ("time-sync", "service-stays", "but the guest still has its device"),
        ("time-sync", "off-ready", "switched off, but is said to be ready"),
        ("time-sync", "service-unbound", "but no driver of the guest took it"),
        ("time-sync", "timesync-unbound", "no driver of the guest bound"),
        ("accurate-time", "no-page", "the guest has no hyperv_clocksource_tsc_page"),
        ("accurate-time", "invariant clocksource-stays", "keeps time by tsc, asked for"),
        ("accurate-time", "no-ptp", "is named hyperv, of ['other']"),
        ("accurate-time", "no-chrony", "chronyd does not start: Fatal error"),
        ("accurate-time", "chrony-far", "did not come near"),
        ("accurate-time", "phc-unread", "chrony read nothing from /dev/ptp0"),
        ("accurate-time", "load-drifts", "is not below 1 ms"),
        ("accurate-time", "busy", "only 0 of 500 readings"),
        ("kvp", "no-kvp", "its daemon did not register"),
        ("kvp", "kvp-unbound", "no driver of the guest bound"),
        ("kvp", "few-records", "came to 1 records of 11"),
        ("kvp", "other-name", "told the name other, not scripted"),
        ("kvp", "no-host-name", "was not told PhysicalHostName"),
        ("kvp", "set-lost", "in pool external, the guest has None"),
        ("kvp", "cut-values", "the longest item came back"),
        ("kvp", "delete-lost", "the guest still has"),
        ("kvp", "pool-unwritable", "cannot write its pool guest"),
        ("kvp", "guest-unread", "the guest wrote"),
        ("kvp", "wrong-os", "says OSName is 'Windows', its system 'Scripted'"),
        ("kvp", "no-addresses", "does not tell its addresses"),
        ("kvp", "adapter-taken", "took addresses for an adapter"),
        ("kvp", "adapter-failed", "its daemon failed or gave no answer"),
        ("kvp", "unbind-refused", "could not be bound anew"),
        ("kvp", "not-given-again", "was not given the host's items again"),
    ],
)
def test_each_wrong_guest_fails(row_id: str, fault: str, said: str) -> None:
    result, _ = run_one(ScriptedGuest(*fault.split()), row_id)
    assert result.status is Status.FAILS
    assert said in result.evidence[0], result.evidence


def test_an_invariant_tsc_is_set_aside_for_the_page() -> None:
    result, _ = run_one(ScriptedGuest("invariant"), "accurate-time")
    assert result.status is Status.WORKS and "taken for the test" in " ".join(result.evidence)


def test_the_rig_is_judged_by_the_median() -> None:
    result, _ = run_one(ScriptedGuest("rig"), "accurate-time")
    assert "judged by median" in result.evidence[0]
    result, _ = run_one(ScriptedGuest(), "accurate-time")
    assert "judged by p99" in result.evidence[0]


def test_offsets_are_plotted_for_those_who_keep_logs() -> None:
    _, attachments = run_one(ScriptedGuest(), "accurate-time")
    picture = ElementTree.fromstring(attachments["accurate-time.svg"])
    (line,) = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == accurate_time.SAMPLES


def test_a_plot_of_nothing_but_zero() -> None:
    ElementTree.fromstring(svg_plot("t", "us", [0.0], [0.0]))


def test_readings_that_are_not_exact_are_left_out_and_counted() -> None:
    samples = [ClockSample(0, 1000 * n, 100) for n in range(100)]
    samples += [ClockSample(0, 10**9, 10**9)] * 10
    found = judge(samples, 1e-6, 100)
    assert (found.count, found.blurred) == (100, 10)
    assert (found.p99, found.worst, found.blur[1]) == (99e-6, 99e-6, 1.0)
    assert found.median == pytest.approx(49.5e-6)
    with pytest.raises(RowFailed, match="only 100 of 110"):
        judge(samples, 1e-6, 101)


def test_a_busy_computer_is_looked_at_again_until_time_is_up() -> None:
    blurred = [ClockSample(0, 0, 10**9)] * 20
    assert not accurate_time._settled(blurred, last=False)
    with pytest.raises(RowFailed, match="only 0 of 20"):
        accurate_time._settled(blurred, last=True)
    near = [ClockSample(0, 1000, 100)] * 5 + blurred[:15]
    assert accurate_time._settled(near, last=False)
    assert not accurate_time._settled([ClockSample(0, 10**6, 100)] * 20, last=False)


def test_a_pools_file_is_records_and_anything_between() -> None:
    record = b"k\xc3\xa4y\0\xff\xfe".ljust(512, b"\xee") + b"v\0".ljust(2048, b"\xff")
    assert kvp.parse_pool(record * 2 + record[:100]) == {"käy": "v"}
    assert kvp.parse_pool(record[:-1]) == {}


def test_sockets_are_not_proven_over_the_serial_line() -> None:
    result, _ = run_one(ScriptedGuest("serial"), "hvsocket")
    assert result.status is Status.FAILS
    assert "reached over its serial line" in result.evidence[0]
