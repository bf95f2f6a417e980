"""Every row against a scripted guest: it works on a right one, and fails on each wrong one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
from scripted_guest import (
    FAST,
    RELEASE,
    SCRIPTED_PROOFS,
    ScriptedGuest,
    ScriptedModules,
    Silent,
    full_modules,
)

from hvhost.errors import HvHostError
from hvhost.verify.contract import ROWS, Status, find_rows
from hvhost.verify.results import RowResult
from hvhost.verify.rows import PROOFS, Proof, heartbeat
from hvhost.verify.rows.lsvmbus import parse_lsvmbus
from hvhost.verify.rows.nmi import interrupted_at
from hvhost.verify.runner import Outcome, run_rows
from hvhost.verify.session import Session


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SPIN_SECONDS", 0.01)


def run(guest: ScriptedGuest, *ids: str, proofs: tuple[Proof, ...] = PROOFS) -> Outcome:
    rows = find_rows(ids, option="--rows")
    return run_rows(guest, rows, guest.cpus, Silent(), timing=FAST, proofs=proofs)


def run_one(guest: ScriptedGuest, row_id: str) -> RowResult:
    (result,) = run(guest, row_id).results
    return result


ROW_IDS = tuple(proof.row_id for proof in SCRIPTED_PROOFS)


@pytest.mark.parametrize("row_id", ROW_IDS)
def test_row_works_alone(row_id: str) -> None:
    guest = ScriptedGuest()
    result = run_one(guest, row_id)
    assert (result.status, result.row.id) == (Status.WORKS, row_id), result.evidence
    assert result.evidence and all(machine.killed for machine in guest.machines)


def test_all_rows_in_four_boots() -> None:
    guest = ScriptedGuest()
    outcome = run(guest, *ROW_IDS)
    assert [result.status for result in outcome.results] == [Status.WORKS] * len(ROW_IDS)
    assert [machine.boot_count for machine in guest.machines] == [4]
    assert outcome.kernel == RELEASE and outcome.bus_found and not outcome.notes


def test_four_cpus() -> None:
    result = run_one(ScriptedGuest(cpus=4), "smp")
    assert result.status is Status.WORKS
    assert [f"channel on CPU {cpu}" in " ".join(result.evidence) for cpu in range(5)] == [
        True,
        True,
        True,
        True,
        False,
    ]


def test_a_driver_that_takes_some_heartbeats_without_an_interrupt() -> None:
    result = run_one(ScriptedGuest("driver-at-work"), "heartbeat")
    assert result.status is Status.WORKS
    assert "counted 15 interrupts and 20 signals back" in " ".join(result.evidence)


def test_one_cpu_proves_no_smp() -> None:
    result = run_one(ScriptedGuest(cpus=1), "smp")
    assert result.status is Status.FAILS and "--cpus 2" in result.evidence[0]


@pytest.mark.parametrize(
    ("row_id", "fault", "said"),
    [
        ("heartbeat", "hang-pauses", "machine is paused, so its VPs do not spin"),
        ("heartbeat", "hang-halts", "VP 0 is halted"),
        ("heartbeat", "hang-interruptible", "VP 0 takes interrupts"),
        ("heartbeat", "hang-in-user-space", "VP 0 is in ring 3"),
        ("heartbeat", "hang-wanders", "VP 1 does not stay where it was hung"),
        ("shutdown", "poweroff-without-init", "asked to power off, init did not"),
        ("heartbeat", "reset-ignored", "asked for a reset and did not do it"),
        ("lsvmbus", "python lists-twice", "lists a device twice: shutdown"),
        ("lsvmbus", "python lists-nameless", "without a name: 00000000"),
        ("smp", "wrong-cpu", "CPU 1 was not the one interrupted"),
        ("smp", "all-cpus", "other CPUs"),
        ("smp", "wrong-channel", "heartbeat channel was not the one"),
        ("smp", "noisy-channel", "other CPUs or channels"),
        ("smp", "move-ignored", "stays on CPU 0"),
        ("smp", "move-refused", "could not move"),
        ("smp", "cpu-offline", "2 VPs"),
        ("smp", "unbound", "no driver of the guest bound"),
        ("heartbeat", "unbound", "no driver of the guest bound"),
        ("heartbeat", "no-heartbeat", "no-driver although the guest is alive"),
        ("heartbeat", "wrong-channel", "own counters show 0 received"),
        ("heartbeat", "no-answers", "0 answered"),
        ("heartbeat", "token-lost", "does not contain 'hvhost-verify-"),
        ("heartbeat", "no-crash-text", "without its text"),
        ("heartbeat", "no-crash-msrs", "nothing to the crash MSRs"),
        ("heartbeat", "state-not-crashed", "both must be crashed"),
        ("heartbeat", "hang-not-hung", "still answers"),
        ("heartbeat", "contact-stays", "still says ok"),
        ("heartbeat", "no-spin", "do not spin"),
        ("nmi", "nmi-lost", "no panic text after the NMI"),
        ("nmi", "no-crash-text", "no panic text after the NMI"),
        ("nmi", "other-panic", "not because of it"),
        ("nmi", "interrupts-on", "interrupts off: RFLAGS 0x206"),
        ("shutdown", "no-shutdown-channel", "did not open its channel"),
        ("shutdown", "init-does-nothing", "asked to reboot, init did not"),
        ("shutdown", "init-line-missing", "asked to reboot, init did not"),
        ("shutdown", "no-reset", "never asked the machine for a reset"),
        ("shutdown", "same-boot-id", "before and after the reboot"),
        ("shutdown", "wrong-sleep-state", "S3, not S5"),
        ("shutdown", "stays-on", "did not stop"),
        ("lsvmbus", "guest-misses-device", "host offers what the guest does not list"),
        ("lsvmbus", "host-misses-device", "lists what the host does not"),
    ],
)
def test_row_fails_on(row_id: str, fault: str, said: str) -> None:
    result = run_one(ScriptedGuest(*fault.split()), row_id)
    assert result.status is Status.FAILS
    assert said in result.evidence[0]
    assert "check broke" not in result.evidence[0]


def test_nmi_without_a_register_dump_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interrupted_at("Kernel panic - not syncing: NMI: Not continuing") is None
    text = "RIP: 0010:mwait_idle+0x1\nCode: eb fe\nRSP: 0018:ffff EFLAGS: 00000046"
    assert interrupted_at(text) == ("mwait_idle+0x1", 0x46)


def test_lsvmbus_says_who_listed() -> None:
    ours, script = (run_one(ScriptedGuest(*faults), "lsvmbus") for faults in ((), ("python",)))
    assert "our probe" in ours.evidence[0]
    assert "lsvmbus -vv" in script.evidence[0]
    assert "4 devices" in ours.evidence[0] and "4 devices" in script.evidence[0]


def test_an_empty_bus_is_nothing_to_list() -> None:
    guest = ScriptedGuest()

    def lose_bus(session: Session) -> Iterator[str]:
        session.running()
        guest.machines[0].faults.add("no-bus")
        yield from PROOFS[0].prove(session)

    (result,) = run(guest, "lsvmbus", proofs=(Proof("lsvmbus", lose_bus, 5.0),)).results
    assert result.status is Status.FAILS and "lists no device" in result.evidence[0]


def test_lsvmbus_output_is_read() -> None:
    text = (
        "VMBUS ID  1: Class_ID = {0E0B6031-5213-4934-818b-38d90ced39db} - [Operating system]\n"
        "\tDevice_ID = {b6650ff7-33bc-4840-8048-e0676786f393}\n"
        "\tSysfs path: /sys/bus/vmbus/devices/b66\n\tRel_ID=1, target_cpu=0\n\n"
    )
    assert parse_lsvmbus(text) == (
        ("0e0b6031-5213-4934-818b-38d90ced39db", "b6650ff7-33bc-4840-8048-e0676786f393"),
    )


@pytest.mark.parametrize(
    ("fault", "loss"),
    [("triple-fault", "died of a triple fault"), ("rig-dies", "the rig's QEMU died: abort,")],
)
def test_a_row_whose_guest_the_emulator_lost_is_tried_again(fault: str, loss: str) -> None:
    outcome = run(ScriptedGuest("rig", fault), "smp")
    assert [result.status for result in outcome.results] == [Status.WORKS]
    assert outcome.notes[0].startswith("smp was tried twice: at first ")
    assert loss in outcome.notes[0]


@pytest.mark.parametrize("faults", [("triple-fault",), ("rig", "triple-fault", "again-and-again")])
def test_what_fails_on_real_processors_or_twice_fails(faults: tuple[str, ...]) -> None:
    outcome = run(ScriptedGuest(*faults), "smp")
    assert [result.status for result in outcome.results] == [Status.FAILS]
    assert "was started again" in outcome.results[0].evidence[0]


def test_a_failed_row_does_not_take_the_next_with_it() -> None:
    outcome = run(ScriptedGuest("wrong-cpu", "contact-stays"), *ROW_IDS)
    statuses = {result.row.id: result.status for result in outcome.results}
    failing = {"smp": Status.FAILS, "heartbeat": Status.FAILS}
    assert statuses == dict.fromkeys(ROW_IDS, Status.WORKS) | failing


def test_a_dead_worker_is_the_rows_finding_and_the_next_row_starts_anew() -> None:
    guest = ScriptedGuest("dies-at-reset")
    outcome = run(guest, "heartbeat", "shutdown")
    by_id = {result.row.id: result for result in outcome.results}
    assert by_id["heartbeat"].status is Status.FAILS
    assert "worker has ended" in by_id["heartbeat"].evidence[0]
    assert any("panic: crashed" in line for line in by_id["heartbeat"].evidence)
    assert by_id["shutdown"].status is Status.WORKS
    assert len(guest.machines) == 2


late: list[str] = []


def _stuck(session: Session) -> Iterator[str]:
    session.running()
    session.step("waiting for ever")
    yield "got so far"
    time.sleep(1)
    late.append("woke up")
    session.machine.reset()
    late.append("reset the next row's guest")


def _broken(session: Session) -> Iterator[str]:
    session.running()
    yield ""
    raise ZeroDivisionError("oops")


def test_a_rows_time_runs_out() -> None:
    guest = ScriptedGuest()
    late.clear()

    def next_row(session: Session) -> Iterator[str]:
        session.running()
        while not late:
            time.sleep(0.01)
        time.sleep(0.1)
        yield "done"

    proofs = (Proof("smp", _stuck, 0.2), Proof("nmi", next_row, 10.0))
    outcome = run(guest, "smp", "nmi", proofs=proofs)
    smp, nmi = outcome.results
    assert smp.status is Status.FAILS
    assert "while waiting for ever" in smp.evidence[0] and smp.evidence[1] == "got so far"
    assert nmi.status is Status.WORKS
    assert len(guest.machines) == 2 and guest.machines[0].killed
    assert late == ["woke up"] and guest.machines[1].boot_count == 1


def test_a_bug_in_a_check_is_a_sentence() -> None:
    outcome = run(ScriptedGuest(), "smp", proofs=(Proof("smp", _broken, 5.0),))
    assert outcome.results[0].status is Status.FAILS
    assert "check broke: ZeroDivisionError: oops" in outcome.results[0].evidence[0]


def test_a_probe_lost_between_rows_is_noted() -> None:
    guest = ScriptedGuest()

    def lose(session: Session) -> Iterator[str]:
        session.running()
        guest.machines[0].hung = True
        yield "done"

    outcome = run(guest, "smp", "lsvmbus", proofs=(Proof("smp", lose, 5.0), PROOFS[0]))
    assert [result.status for result in outcome.results] == [Status.WORKS, Status.WORKS]
    assert outcome.notes == ("the guest stopped answering between two rows and was reset",)


def test_missing_rows_say_what_the_guest_has() -> None:
    guest = ScriptedGuest()
    without = ScriptedModules()
    mouse, video = run(guest, "mouse", "video").results
    assert {mouse.status, video.status} == {Status.MISSING}
    assert "has its drivers and daemons" in mouse.evidence[1]
    assert "has no driver" in run(ScriptedGuest(modules=without), "video").results[0].evidence[0]
    assert not guest.machines, "nothing to prove, so nothing to boot"


def test_a_distribution_without_the_script_lacks_static_addresses() -> None:
    result = run_one(ScriptedGuest(), "static-ip")
    assert result.status is Status.GUEST_LACKS
    assert "no hv_set_ifconfig" in result.evidence[0]


def test_a_driver_the_kernel_lacks_is_named() -> None:
    modules = full_modules()
    without = dataclasses.replace(
        modules,
        aliases={alias: name for alias, name in modules.aliases.items() if name != "hv_utils"},
    )
    outcome = run(ScriptedGuest("unbound", modules=without), "smp", "lsvmbus")
    smp, lsvmbus = outcome.results
    assert smp.status is Status.GUEST_LACKS
    assert "hv_utils" in smp.evidence[0] and "CONFIG_HYPERV_UTILS" in smp.evidence[0]
    assert lsvmbus.status is Status.WORKS


def test_no_machine_at_all_is_for_the_caller() -> None:
    with pytest.raises(HvHostError, match="no KVM here"):
        run(ScriptedGuest("no-start"), "smp")


def test_every_proof_is_a_row() -> None:
    assert {proof.row_id for proof in PROOFS} <= {row.id for row in ROWS}
