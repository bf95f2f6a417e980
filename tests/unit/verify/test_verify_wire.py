"""The cable between a guest and the host's witness: what is wrong with it fails the row."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hvhost.errors import HvHostError
from hvhost.verify import wire
from hvhost.verify.guest import CommandResult, HostLacks, RowFailed
from hvhost.verify.wire import Cable, Witness

MAC = "00:15:5d:00:00:01"
GOOD, BAD = "a" * 64, "b" * 64


def impatient() -> Any:
    timing = SimpleNamespace(event=0.0, poll=0.0, patiently=lambda seconds: seconds)
    return SimpleNamespace(timing=timing, step=lambda text: None)


def a_probe(*said: str) -> Any:
    """Each script of the guest says the next of *said*."""
    answers = iter(said)
    return SimpleNamespace(
        read_all=lambda pattern: {"/sys/class/net/eth1/address": MAC},
        run=lambda command, timeout: CommandResult(0, next(answers)),
    )


def a_cable(witness: object, *said: str) -> Cable:
    info: Any = SimpleNamespace(mac=MAC, namespace_pid=1)
    cable = Cable(impatient(), a_probe(*said), info)
    cable.witness = witness  # type: ignore[assignment]
    assert cable.interface == "eth1"
    return cable


def seen(size: int, digest: str) -> Any:
    result = {"size": size, "sha256": digest}
    return SimpleNamespace(
        begin=lambda action, **how: SimpleNamespace(result=lambda: result),
        do=lambda action, **how: result,
    )


def test_what_goes_out_has_to_come_whole() -> None:
    assert a_cable(seen(5000, GOOD), GOOD).transfer_out(5000)["size"] == 5000
    for size, digest in ((4999, GOOD), (5000, BAD)):
        with pytest.raises(RowFailed, match=f"of 5000 bytes the guest sent, the host got {size}"):
            a_cable(seen(size, digest), GOOD).transfer_out(5000)


def test_what_comes_in_has_to_be_the_same() -> None:
    assert a_cable(seen(5000, GOOD), "", GOOD).transfer_in(5000)["sha256"] == GOOD
    with pytest.raises(RowFailed, match="the guest got something else"):
        a_cable(seen(5000, GOOD), "", BAD).transfer_in(5000)


def asked_often(answer: object) -> Callable[..., Any]:
    """The same answer each time, but not without an end."""
    left = itertools.count(100, -1)

    def ask(*words: object, **more: object) -> object:
        assert next(left), "it is asked for ever"
        return answer

    return ask


def test_a_guest_that_does_not_answer_or_has_no_adapter() -> None:
    silent = SimpleNamespace(do=asked_often({"answers": 0}))
    with pytest.raises(RowFailed, match="does not answer on its new adapter") as failed:
        a_cable(silent, "eth1: NO-CARRIER\n").await_ping()
    assert failed.value.evidence == ("eth1: NO-CARRIER",)
    none: Any = SimpleNamespace(
        read_all=asked_often({"/sys/class/net/lo/address": "00:00:00:00:00:00"}),
        run=lambda command, timeout: CommandResult(0, "hv_netvsc: failed\n"),
    )
    with pytest.raises(RowFailed, match=f"with the address {MAC} appeared") as failed:
        wire.find_interface(impatient(), none, MAC)
    assert failed.value.evidence == ("hv_netvsc: failed",)


def test_a_witness_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "inside", lambda pid, words: words)
    assert Witness(1).command("echo", "seen") == "seen\n"
    with pytest.raises(RowFailed, match=r"on the host, .* failed: no such device"):
        Witness(1).command("sh", "-c", "echo no such device >&2; exit 1")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('busy', flush=True); import time; time.sleep(600)", "busy"),
        ("raise SystemExit('no such address')", "no such address"),
    ],
)
def test_a_witness_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    monkeypatch.setattr(wire, "inside", lambda pid, words: [sys.executable, "-c", program])
    with pytest.raises(RowFailed, match=f"the host's sink did not start: {why}"):
        Witness(1).begin("sink")


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        ("no network namespace can be made: Operation not permitted.", True),
        ("/dev/net/tun cannot be opened.", True),
        ("there is a verify0 already.", False),
    ],
)
def test_a_host_that_cannot_have_a_cable_lacks_something(error: str, lacks: bool) -> None:
    def add(nic: str, name: str) -> None:
        raise HvHostError(error)

    session = impatient()
    session.running = a_probe
    session.machine = SimpleNamespace(network=SimpleNamespace(add=add))
    with pytest.raises(HvHostError, match=error) as raised, wire.cable(session):
        pass
    assert isinstance(raised.value, HostLacks) is lacks


SETTING = "/proc/sys/net/ipv4/tcp_min_tso_segs"
READ_ONLY = 'mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "$@"'
SET = f"""
from hvhost.network.namespace import open_namespace
from hvhost.verify.wire import Witness
namespace = open_namespace([])
try:
    witness = Witness(namespace.pid)
    witness.set_kernel("{SETTING}", "44")
    print(witness.command("cat", "{SETTING}").strip())
finally:
    namespace.close()
"""


@pytest.mark.parametrize("container", [False, True])
def test_a_setting_of_the_kernel_is_made_in_a_container_too(container: bool) -> None:
    unshare = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"] if container else []
    if (
        container
        and subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("only root can make /proc/sys read-only, as containers have it")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", SET], capture_output=True, text=True, check=False
    )
    if "may make no" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout.split() == ["44"], done.stderr


def test_a_setting_that_cannot_be_made_is_what_the_host_lacks() -> None:
    with pytest.raises(HostLacks, match=r"systempaths=unconfined$"):
        Witness(os.getpid()).set_kernel("/proc/sys/net/ipv4/no_such_setting", "1")
