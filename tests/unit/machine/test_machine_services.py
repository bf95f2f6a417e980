"""A whole machine's pause and integration services, over a KVM in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machine_life import Life, life, runs_on

from hvhost.errors import HvHostError
from hvhost.machine import machine as machine_module
from hvhost.machine.model import MachineState, ShutdownAction
from hvhost.sockets.bridge import SocketBridge


def test_a_heartbeat_measurement_ends_with_the_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_LOOK_SECONDS", 0.01)
    with life() as one:
        monkeypatch.setattr(one.machine._heartbeat, "measure", lambda count, done: None)
        threading.Timer(0.1, one.machine.reset).start()
        with pytest.raises(HvHostError, match="stopped answering heartbeats"):
            one.machine.heartbeat_round_trips(1)


def test_a_heartbeat_measurement_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(machine_module, "_MEASURE_SECONDS", 0.0)
    late: list[threading.Timer] = []

    def measure(count: int, done: Callable[[list[float]], None]) -> None:
        late.append(threading.Timer(3.0, done, [[0.1]]))
        late[0].start()

    with life() as one:
        monkeypatch.setattr(one.machine._heartbeat, "measure", measure)
        with pytest.raises(HvHostError, match="stopped answering heartbeats"):
            one.machine.heartbeat_round_trips(1)
        late[0].cancel()
        late[0].join()


def ports_written(one: Life) -> int:
    return one.machine.info().exits.get("out 0x80", 0)


def test_a_paused_machine_stands_still_and_goes_on_where_it_was() -> None:
    with life((runs_on, runs_on), cpus=2) as one:
        machine, (transport,) = one.machine, one.transports
        machine.pause()
        info = machine.info()
        assert (info.state, info.heartbeat) == (MachineState.PAUSED, "paused")
        written = ports_written(one)
        time.sleep(0.02)
        assert ports_written(one) == written
        transport.clock += 10**9  # KVM's goes on
        for call in (
            machine.pause,
            machine.hang,
            machine.time_sync,
            lambda: machine.shut_down(ShutdownAction.REBOOT),
            lambda: machine.heartbeat_round_trips(1),
            lambda: machine.kvp_list(None),
            lambda: machine.copy_start("/f", "/f", create_path=False, overwrite=False),
        ):
            with pytest.raises(HvHostError, match="'test' is paused; `hvhost resume test`"):
                call()
        machine.nmi()
        assert len(machine.processors()) == 2
        machine.resume()
        assert transport.clock == 123456789
        assert machine.info().state is MachineState.RUNNING
        one.wait_for(lambda: ports_written(one) > written)
        with pytest.raises(HvHostError, match="is not paused; it runs"):
            machine.resume()
        kinds = [kind for kind, _ in one.kinds()]
        assert kinds == ["started", "heartbeat", "paused", "resumed", "heartbeat"]


def test_no_time_passes_for_the_services_of_a_paused_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with life((runs_on,)) as one:
        machine, computer = one.machine, one.machine._computer
        assert computer is not None
        ticks: list[float] = []
        monkeypatch.setattr(machine._kvp, "tick", ticks.append)
        machine.pause()
        machine._tick(computer)
        assert not ticks
        machine.resume()
        machine._tick(computer)
        assert ticks


def test_a_resumed_guest_is_told_the_time_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with life((runs_on,)) as one:
        machine, transport = one.machine, one.transports[0]
        told: list[tuple[bool, int]] = []
        running = transport._processors[0]
        monkeypatch.setattr(type(machine._timesync), "ready", True)
        monkeypatch.setattr(
            machine._timesync, "sync", lambda: told.append((running.running, transport.clock))
        )
        machine.pause()
        assert not told
        transport.clock += 10**9
        machine.resume()
        assert told == [(False, 123456789)]


def test_a_paused_machine_is_reset_and_stopped() -> None:
    with life((runs_on,), (runs_on,)) as one:
        one.machine.pause()
        one.machine.reset()
        one.wait_for(lambda: one.machine.info().boots == 2)
        assert one.machine.info().state is MachineState.RUNNING
        one.machine.pause()
        one.machine.force_stop()
        one.ended()
        assert one.machine.info().state is MachineState.STOPPED


def switched_on(one: Life) -> list[str]:
    return [each.name for each in one.machine.services() if each.enabled]


def on_the_bus(one: Life) -> list[str]:
    gone = ("rescinded", "released")
    return [each.name for each in one.machine.info().channels if each.state not in gone]


def test_each_service_is_switched_off_and_on_and_stays_so_over_a_reset() -> None:
    names = ["heartbeat", "shutdown", "timesync", "kvp", "file-copy", "vss"]
    with life((runs_on,), (runs_on,)) as one:
        machine = one.machine
        assert switched_on(one) == names and set(names) <= set(on_the_bus(one))
        for number, name in enumerate(names):
            for _ in range(2):  # off is off
                machine.set_service(name, False)
            assert switched_on(one) == names[number + 1 :]
            assert not set(on_the_bus(one)) & set(names[: number + 1])
        for _ in range(2):  # and not offered twice
            machine.set_service("kvp", True)
        assert on_the_bus(one).count("kvp") == 1
        machine.reset()
        one.wait_for(lambda: machine.info().boots == 2)
        assert switched_on(one) == ["kvp"] and set(on_the_bus(one)) & set(names) == {"kvp"}
        machine.set_service("vss", True)
        assert switched_on(one) == ["kvp", "vss"]
        with pytest.raises(HvHostError, match="no service 'clock'; there are heartbeat, shutdown,"):
            machine.set_service("clock", False)


def test_sockets_are_switched_like_a_service(tmp_path: Path) -> None:
    with life((runs_on,)) as one:
        machine = one.machine
        with pytest.raises(HvHostError, match="no service 'sockets'"):
            machine.set_service("sockets", False)
        machine._sockets = sockets = SocketBridge(tmp_path, one.loop)
        machine.set_service("kvp", False)
        assert sockets.enabled and "kvp" not in switched_on(one)
        machine.set_service("sockets", False)
        assert not sockets.enabled and "sockets" not in switched_on(one)
        machine.set_service("sockets", True)
        assert sockets.enabled and "sockets" in switched_on(one)


def test_a_file_is_not_copied_while_that_is_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x")
    with life((runs_on,)) as one:
        one.machine.set_service("file-copy", False)
        with pytest.raises(HvHostError, match="`hvhost services test --enable file-copy`"):
            one.machine.copy_start(str(file), "/file", create_path=False, overwrite=False)


def test_a_time_that_is_not_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with life((runs_on,)) as one:
        machine = one.machine
        with pytest.raises(HvHostError, match="no time synchronization driver"):
            machine.time_sync()
        monkeypatch.setattr(machine._timesync, "sync", lambda done: done(True))
        assert 0 <= machine.time_sync() < 1
        monkeypatch.setattr(machine._timesync, "sync", lambda done: done(False))
        with pytest.raises(HvHostError, match="refused the time"):
            machine.time_sync()
        monkeypatch.setattr(machine_module, "_TIME_SYNC_SECONDS", 0.01)
        monkeypatch.setattr(machine._timesync, "sync", lambda done: None)
        with pytest.raises(HvHostError, match=r"did not take the time within 0\.01 seconds"):
            machine.time_sync()
