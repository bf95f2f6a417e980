"""The contract's own shape, and what a guest needs for a row."""

from __future__ import annotations

import dataclasses

import pytest
from scripted_guest import ScriptedModules, full_modules

from hvhost.errors import HvHostError
from hvhost.verify.contract import (
    GROUPS,
    HV_SHUTDOWN_GUID,
    ROWS,
    Driver,
    Row,
    find_rows,
    requested_rows,
    vmbus_alias,
)
from hvhost.verify.requirements import has_driver, what_guest_lacks

DRIVER = Driver(("hv_a", "hv_b"), "vmbus:01", "CONFIG_A")
NAMELESS = Driver(("hv_sock",), None, "CONFIG_S")


def test_contract_is_whole() -> None:
    counts = {group: sum(row.group == group for row in ROWS) for group in GROUPS}
    assert counts == {
        "Core": 8,
        "Networking": 8,
        "Storage": 5,
        "Memory": 5,
        "Video, others": 7,
        "Generation 2": 2,
    }
    assert len({row.id for row in ROWS}) == 35
    assert all(row.title and row.drivers for row in ROWS)


def test_alias_is_as_modules_alias_has_it() -> None:
    assert vmbus_alias(HV_SHUTDOWN_GUID) == "vmbus:31600b0e13523449818b38d90ced39db"


@pytest.mark.parametrize(
    ("modules", "has"),
    [
        (ScriptedModules(aliases={"vmbus:01": "hv_b"}), True),
        (ScriptedModules(builtin=frozenset({"hv_a"})), True),
        (ScriptedModules(), False),
        (ScriptedModules(aliases={"vmbus:01": "other"}), False),
        (ScriptedModules(aliases={"vmbus:02": "hv_a"}), False),
    ],
)
def test_driver_by_alias_or_builtin(modules: ScriptedModules, has: bool) -> None:
    assert has_driver(DRIVER, modules) is has


def test_driver_without_an_alias_goes_by_its_name() -> None:
    assert has_driver(NAMELESS, ScriptedModules(names=frozenset({"hv_sock"})))
    assert not has_driver(NAMELESS, ScriptedModules())


def test_what_is_lacking_is_named() -> None:
    row = Row("x", "Core", "X", (NAMELESS, DRIVER), ("one_daemon", "other_daemon"))
    whole = ScriptedModules(names=frozenset({"hv_sock"}), aliases={"vmbus:01": "hv_a"})
    assert what_guest_lacks(row, whole, {"other_daemon"}) is None
    assert "one_daemon or other_daemon" in (what_guest_lacks(row, whole, set()) or "")
    lacks = what_guest_lacks(row, ScriptedModules(names=frozenset({"hv_sock"})), {"one_daemon"})
    assert lacks is not None and "hv_a or hv_b (CONFIG_A)" in lacks


OLD, NEW = "hv_fcopy_daemon", "hv_fcopy_uio_daemon"
FCOPY_ALIAS = "vmbus:e34bd134e4dec8419ae76b174977c192"
TREES: dict[str, dict[str, str]] = {
    "6.1": {FCOPY_ALIAS: "hv_utils"},
    "6.12": {FCOPY_ALIAS: "uio_hv_generic"},
    "6.12.95": {},  # as Debian built it for its release 12
}


@pytest.mark.parametrize("release", TREES)
@pytest.mark.parametrize("daemons", [{OLD}, {NEW}, {OLD, NEW}])
def test_a_file_copy_daemon_of_another_release_may_not_fit(release: str, daemons: set[str]) -> None:
    (row,) = find_rows(["file-copy"], option="--rows")
    modules = ScriptedModules(
        release,
        {"acpi:VMBUS:": "hv_vmbus", **TREES[release]},
        names=frozenset({"hv_vmbus", "hv_utils", "uio_hv_generic"}),
    )
    wanted, driver = (OLD, "hv_utils") if release == "6.1" else (NEW, "uio_hv_generic")
    lacks = what_guest_lacks(row, modules, daemons | {"hv_kvp_daemon"})
    if wanted in daemons:
        assert lacks is None
        return
    (given,) = daemons
    assert lacks is not None and lacks.startswith(
        f"kernel {release} serves file-copy through {driver} ("
    )
    assert lacks.endswith(
        f"which goes with {wanted}; the guest was given {given}, which needs another driver"
    )


def test_nothing_is_said_of_daemons_where_the_kernel_does_not_say() -> None:
    (row,) = find_rows(["file-copy"], option="--rows")
    assert what_guest_lacks(row, None, {OLD}) is None
    builtin = ScriptedModules(builtin=frozenset({"hv_vmbus", "hv_utils"}))
    for daemon in (OLD, NEW):
        assert what_guest_lacks(row, builtin, {daemon}) is None
    with_uio = dataclasses.replace(builtin, names=frozenset({"uio_hv_generic"}))
    assert what_guest_lacks(row, with_uio, {OLD}) is None
    listed = dataclasses.replace(builtin, aliases={FCOPY_ALIAS: "hv_utils"})
    assert f"goes with {OLD}" in (what_guest_lacks(row, listed, {NEW}) or "")


def test_an_option_the_kernel_is_built_without_is_named() -> None:
    (row,) = find_rows(["hot-add"], option="--rows")
    for options, lacks in (
        (frozenset[str](), f"is built without {row.options[0]}"),
        (frozenset(row.options), ""),
        (None, ""),
    ):
        said = what_guest_lacks(row, dataclasses.replace(full_modules(), options=options), set())
        assert lacks in (said or "") and bool(said) is bool(lacks)


def test_rows_come_in_the_contracts_order_once() -> None:
    assert [row.id for row in find_rows(["nmi", "smp", "nmi"], option="--rows")] == ["smp", "nmi"]
    assert requested_rows([]) == ROWS


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("heartbeet", "did you mean heartbeat"),
        ("lvsmbus", "mean lsvmbus"),
        ("backup", "did you mean live-backup"),
        ("xyzzy", "rows are: shut"),
        ("nope", "rows are: shut"),
    ],
)
def test_unknown_row(wrong: str, meant: str) -> None:
    with pytest.raises(HvHostError, match=meant) as caught:
        find_rows(["smp", wrong], option="--allow-lacks")
    assert f"--allow-lacks names '{wrong}'" in str(caught.value)
