"""A guest that does not become a guest of the bus ends with a finding one can act on."""

from __future__ import annotations

import dataclasses

import pytest
from scripted_guest import FAST, RELEASE, ScriptedGuest, ScriptedModules, Silent, full_modules

from hvhost.verify.contract import Status, find_rows
from hvhost.verify.diagnose import console_tail, kernel_panic, unbound_devices
from hvhost.verify.runner import Outcome, run_rows
from hvhost.verify.sysfs import GuestDevice


def run(guest: ScriptedGuest) -> Outcome:
    return run_rows(guest, find_rows(["lsvmbus", "nmi"], option=""), 2, Silent(), timing=FAST)


def _without_vmbus() -> ScriptedModules:
    modules = full_modules()
    aliases = {alias: name for alias, name in modules.aliases.items() if name != "hv_vmbus"}
    return dataclasses.replace(modules, aliases=aliases)


@pytest.mark.parametrize(
    ("faults", "headline", "stages"),
    [
        (("no-bus", "blacklisted"), "switches its driver off: initcall_blacklist=hv_acpi_init", 5),
        (("no-bus", "forbidden"), "switches its driver off: module_blacklist=x,hv_vmbus", 5),
        (("no-bus", "undetected", "nopv"), "the detection of hypervisors off: nopv", 5),
        (("no-bus",), "hv_vmbus is a module of this kernel and did not bind", 5),
        (("no-devices",), "did not bind", 5),
        (("no-version",), "did not bind", 5),
        (("no-bus", "undetected"), "did not see that it runs on Hyper-V", 5),
        (("boot-panic",), "CONFIG_BLK_DEV_INITRD", 2),
        (("no-userspace",), "stopped before user space", 2),
        (("no-probe",), "its probe does not answer", 2),
        (("silent",), "the console stayed silent", 0),
        (("dies-at-boot",), "the machine's worker ended", 1),
    ],
)
def test_finding(faults: tuple[str, ...], headline: str, stages: int) -> None:
    guest = ScriptedGuest(*faults)
    outcome = run(guest)
    assert outcome.bus_found is False
    assert headline in outcome.finding[0]
    assert {result.status for result in outcome.results} == {Status.FAILS}
    assert all(result.evidence == outcome.finding for result in outcome.results)
    assert all(machine.killed for machine in guest.machines)
    # Without user space to ask, the whole log is wanted on the console.
    assert guest.verbose == ([False] if stages == 5 else [False, True])
    text = "\n".join(outcome.finding)
    assert ("kernel started: yes, " + RELEASE in text) == (stages > 0)
    assert ("Hyper-V detected: yes" in text) == (stages > 0 and "undetected" not in faults)
    assert ("user space: the probe answered" in text) == (stages == 5)
    last = "console: hvhost-guest: init" if stages == 5 else "console: "
    assert any(line.startswith(last) for line in outcome.finding)


def test_a_kernel_without_the_driver_lacks_it_and_hears_of_the_split_option() -> None:
    outcome = run(ScriptedGuest("no-bus", modules=_without_vmbus()))
    assert outcome.bus_found is False
    assert {result.status for result in outcome.results} == {Status.GUEST_LACKS}
    assert "CONFIG_HYPERV_VMBUS: Linux 6.18 split it out" in outcome.finding[0]
    assert "hv_vmbus" in outcome.results[0].evidence[0]


def test_a_builtin_bus_driver_that_did_not_bind() -> None:
    modules = dataclasses.replace(_without_vmbus(), builtin=frozenset({"hv_vmbus"}))
    outcome = run(ScriptedGuest("no-bus", modules=modules))
    assert "hv_vmbus is built in and did not bind" in outcome.finding[0]
    assert {result.status for result in outcome.results} == {Status.FAILS}


def test_modules_of_another_kernel_are_noted() -> None:
    modules = dataclasses.replace(full_modules(), release="6.1.0-other")
    assert "no module of them can load" in run(ScriptedGuest(modules=modules)).notes[0]


def test_unbound_devices_are_named_only_where_there_is_a_driver() -> None:
    def device(modalias: str, driver: str | None) -> GuestDevice:
        return GuestDevice("t", "i", driver, modalias, {})

    alias, module = next(iter(full_modules().aliases.items()))
    devices = [device(alias, None), device(alias, module), device("vmbus:00", None)]
    (line,) = unbound_devices(devices, full_modules())
    assert module in line and "did not bind" in line


def test_console_tail_is_clean_and_short() -> None:
    text = "a\r\n\x1b[1;31mred\x1b[0m\x07\r\n\r\n" + "\n".join(map(str, range(20)))
    assert console_tail("a\r\n\x1b[1;31mred\x1b[0m\x07\r\n\r\n") == ("a", "red")
    assert console_tail(text, 3) == ("17", "18", "19")
    shell = "Please press Enter to activate this console. "
    assert console_tail(f"a\r\n{shell}hvhost-guest: ready\n{shell}\r\n") == (
        "a",
        "hvhost-guest: ready",
    ), "no words of our own shell"


def test_panic_line() -> None:
    assert kernel_panic("x\n[1.0] Kernel panic - not syncing: No init\r\ny") == (
        "Kernel panic - not syncing: No init"
    )
    assert kernel_panic("all is well") is None


def test_a_second_boot_that_works_is_noted() -> None:
    outcome = run(ScriptedGuest("no-probe", "second-boot-works"))
    assert outcome.bus_found
    assert {result.status for result in outcome.results} == {Status.WORKS}
    assert "the first boot failed, the second did not" in outcome.notes[0]


def test_nothing_is_said_to_lack_of_a_kernel_without_known_modules() -> None:
    outcome = run(ScriptedGuest("no-bus", "modules-unknown"))
    assert {result.status for result in outcome.results} == {Status.FAILS}
    assert "--modules" in outcome.finding[0]
