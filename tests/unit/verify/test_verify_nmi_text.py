"""What the row ``nmi`` reads out of the panic texts of Linux kernels, whole and cut."""

from __future__ import annotations

import pytest
from panic_texts import nmi_text
from scripted_guest import FAST, ScriptedGuest, Silent

from hvhost.verify.contract import Status, find_rows
from hvhost.verify.results import RowResult
from hvhost.verify.rows import PROOFS
from hvhost.verify.rows.nmi import ATTEMPTS, interrupted_at, is_cut, nmi_panic
from hvhost.verify.runner import run_rows

# By kernel: the frames between panic() and the interrupted code, as compilers leave them.
CHAINS = {
    "5.4": "panic nmi_panic.cold unknown_nmi_error.cold default_do_nmi do_nmi end_repeat_nmi",
    "5.10": "panic nmi_panic.cold unknown_nmi_error.cold default_do_nmi exc_nmi end_repeat_nmi",
    "6.1": "panic nmi_panic unknown_nmi_error default_do_nmi exc_nmi end_repeat_nmi",
    "6.12": "panic nmi_panic.cold default_do_nmi exc_nmi end_repeat_nmi",
    "6.17": "vpanic panic nmi_panic.cold unknown_nmi_error exc_nmi end_repeat_nmi",
    "7.2": "vpanic panic nmi_panic.cold exc_nmi end_repeat_nmi",
}
WATCHDOG = (
    "panic nmi_panic.cold watchdog_hardlockup_check.cold __perf_event_overflow "
    "handle_pmi_common intel_pmu_handle_irq perf_event_nmi_handler nmi_handle default_do_nmi "
    "exc_nmi end_repeat_nmi"
)


def behind(text: str, line: str) -> str:
    """*text* without what comes before *line* and that line."""
    return text[text.index("\n", text.index(line)) + 1 :]


def long_text(chain: str, reason: str = "NMI: Not continuing", prefix: str = "") -> str:
    text = nmi_text(chain, reason, depth=120)
    return "\n".join(prefix + line for line in text.splitlines())


@pytest.mark.parametrize("prefix", ["", "[    9.848607] ", "[  904.196394] [     C33] ", "<4>"])
@pytest.mark.parametrize("kernel", CHAINS)
def test_the_trace_tells_where_the_panic_line_is_cut_off(kernel: str, prefix: str) -> None:
    text = long_text(CHAINS[kernel], prefix=prefix)
    told = nmi_panic(text)
    assert told == "Kernel panic - not syncing: NMI: Not continuing" and not is_cut(text)
    cut = behind(text, "panic+0x")
    told = nmi_panic(cut)
    assert told is not None and "calls nmi_panic" in told and is_cut(cut)
    assert interrupted_at(cut) == ("mwait_idle+0x11/0x20", 0x46)
    # From here on it might have been anybody's NMI.
    cut = behind(cut, "nmi_panic")
    assert nmi_panic(cut) is None and is_cut(cut)


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (WATCHDOG, "Hard LOCKUP"),
        ("panic sysrq_handle_crash __handle_sysrq write_sysrq_trigger", "sysrq triggered crash"),
        ("panic oops_end page_fault_oops exc_page_fault asm_exc_page_fault", "Fatal exception"),
    ],
)
def test_no_other_panic_is_taken_for_one(chain: str, reason: str) -> None:
    text = long_text(chain, reason)
    while len(text) > 3000:
        assert nmi_panic(text) is None, text[:300]
        text = behind(text, "\n")


def test_guesses_of_the_unwinder_do_not_count() -> None:
    guessed = " panic+0x1/0x2\n ? nmi_panic+0x1/0x2\n exc_nmi+0x1/0x2\n"
    assert nmi_panic(guessed) is None
    between = " nmi_panic+0x1/0x2\n ? sched_clock+0x1/0x2\n exc_nmi+0x1/0x2\n"
    assert nmi_panic(between) is not None


def test_a_panic_line_outweighs_a_trace() -> None:
    """An older trace may stand in the log before another panic."""
    text = " nmi_panic+0x1/0x2\n exc_nmi+0x1/0x2\nKernel panic - not syncing: Hard LOCKUP\n"
    assert nmi_panic(text) is None


def test_a_short_text_is_not_cut() -> None:
    assert not is_cut("Oops\n") and nmi_panic("Oops\n") is None
    assert nmi_panic("") is None


def run(*faults: str) -> tuple[RowResult, int]:
    guest = ScriptedGuest(*faults)
    rows = find_rows(["nmi"], option="--rows")
    (result,) = run_rows(guest, rows, 2, Silent(), timing=FAST, proofs=PROOFS).results
    return result, sum(machine.boot_count for machine in guest.machines)


def test_row_takes_a_trace_for_proof() -> None:
    result, boots = run("long-trace")
    assert (result.status, boots) == (Status.WORKS, 1), result.evidence
    assert "unknown_nmi_error calls nmi_panic" in " ".join(result.evidence)


def test_row_hangs_the_guest_again_where_nothing_tells() -> None:
    result, boots = run("longer-trace-once")
    assert (result.status, boots) == (Status.WORKS, 2), result.evidence


def test_row_gives_up_and_says_what_it_lacked() -> None:
    result, boots = run("longer-trace")
    assert (result.status, boots) == (Status.FAILS, ATTEMPTS)
    assert "sent only the end of a long trace" in result.evidence[0]
