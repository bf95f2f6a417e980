from __future__ import annotations

import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import (
    ClockSample,
    HeartbeatStatus,
    IpSettings,
    KvpPool,
    KvpRecord,
    MachineConfig,
)
from hvhost.manager import client as client_module
from hvhost.manager import control
from hvhost.manager.client import MachineClient
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.launcher import launch


def test_stop_shuts_down_and_waits(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    control.stop("m1")
    assert worker.process.wait(5) == 0
    assert worker.directory.state() is NameState.FREE


def test_stop_by_force(runtime: Path, config: MachineConfig) -> None:
    worker = launch(replace(config, command_line="no-shutdown stubborn"), detach=True)
    control.stop("m1", force=True)
    assert worker.process.wait(5) == 0


@pytest.mark.parametrize("verb", [control.stop, control.restart])
def test_a_guest_without_the_service(runtime: Path, config: MachineConfig, verb: object) -> None:
    assert callable(verb)
    worker = launch(replace(config, command_line="no-shutdown"), detach=True)
    with pytest.raises(HvHostError, match=r"has no shutdown service .* --force m1"):
        verb("m1")
    worker.stop()


@pytest.mark.parametrize("verb", [control.stop, control.restart])
def test_a_guest_that_does_not_obey(runtime: Path, config: MachineConfig, verb: object) -> None:
    assert callable(verb)
    worker = launch(replace(config, command_line="stubborn"), detach=True)
    with pytest.raises(HvHostError, match=r"0\.2 seconds.* --force m1"):
        verb("m1", timeout=0.2)
    assert worker.process.poll() is None
    worker.stop()


@pytest.mark.parametrize("force", [False, True])
def test_restart_waits_for_the_next_boot(runtime: Path, config: MachineConfig, force: bool) -> None:
    worker = launch(config, detach=True)
    control.restart("m1", force=force)
    assert MachineClient("m1").info().boots == 2
    worker.stop()


def test_all_else_a_client_can_ask(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    client = MachineClient("m1")
    client.nmi()
    client.pause()
    assert client.info().heartbeat is HeartbeatStatus.PAUSED
    client.resume()
    assert client.hang() == client.processors()
    assert client.info().heartbeat is HeartbeatStatus.NO_CONTACT
    assert [event.kind for event in client.events(timeout=5)] == ["started", "heartbeat"]
    assert client.events(2, 0.05) == []
    assert client.measure_heartbeats(2) == [0.001] * 2
    worker.stop()


def test_time_and_key_value_pairs(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    client = MachineClient("m1")
    assert client.time_sync() == 0.0005
    assert client.watch_clock(8, 1, 0.0) == [ClockSample(1000, 1008, 5)]
    client.kvp_set("ä&b=", "värde")
    record = KvpRecord(KvpPool.EXTERNAL, "ä&b=", "värde")
    assert client.kvp_list() == client.kvp_list(KvpPool.EXTERNAL) == [record]
    assert client.kvp_list(KvpPool.GUEST) == []
    assert client.kvp_get("ä&b=") == client.kvp_get("ä&b=", KvpPool.EXTERNAL) == record
    client.kvp_delete("ä&b=")
    assert client.kvp_list() == []
    assert client.ip_settings("00:15:5D:00:00:01").addresses == "192.0.2.7"
    with pytest.raises(HvHostError, match="did not configure adapter"):
        client.set_ip(IpSettings("{x}"))
    worker.stop()


def test_what_the_worker_refuses(runtime: Path, config: MachineConfig) -> None:
    worker = launch(replace(config, command_line="no-heartbeat"), detach=True)
    with pytest.raises(HvHostError, match="load hv_utils"):
        MachineClient("m1").measure_heartbeats()
    with pytest.raises(HvHostError, match="count"):
        MachineClient("m1").measure_heartbeats(0)
    worker.stop()


def test_a_machine_that_stops_under_the_client(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)
    client = MachineClient("m1")
    worker.stop()
    with pytest.raises(HvHostError, match="no running machine 'm1'"):
        client.info()


def test_the_list(runtime: Path, config: MachineConfig) -> None:
    assert control.machines() == []
    one = launch(config, detach=True)
    two = launch(replace(config, name="m2"), detach=True)
    two.process.kill()
    two.process.wait()
    MachineDirectory.of("m3").create()
    with MachineDirectory.of("m4").claim():
        listings = control.machines()
    assert [(each.name, each.state) for each in listings] == [
        ("m1", "running"),
        ("m2", "dead"),
        ("m4", "starting"),
    ]
    assert listings[0].info is not None
    assert listings[1].pid == two.process.pid
    one.stop()


def test_what_stopped_machines_left_is_removed(runtime: Path, config: MachineConfig) -> None:
    one, two, three = (
        launch(replace(config, name=name), detach=True) for name in ("m1", "m2", "m3")
    )
    with pytest.raises(HvHostError, match="'m1' is running; stop it with `hvhost stop m1` first"):
        control.remove("m1")
    two.process.kill()
    two.process.wait()
    control.stop("m3")
    assert three.process.wait(5) == 0
    assert three.directory.log_file.exists()
    control.remove("m3")
    assert not three.directory.path.exists()
    with pytest.raises(HvHostError, match="nothing is left of a machine 'm3'"):
        control.remove("m3")
    assert control.remove_stopped() == ["m2"]
    assert [each.name for each in control.machines()] == ["m1"]
    one.stop()
    assert control.remove_stopped() == ["m1"]


class Mute:
    """A worker of which only the socket is left: takes connections, says *answer* or nothing."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        self.answer = answer
        self.kept: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.kept.append(connection)
            if self.answer is not None:
                connection.recv(65536)
                connection.sendall(self.answer)
                connection.close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, r"gave no answer within 0\.2 seconds"),
        (b"", "cannot be spoken to"),
        (b"garbage\r\n\r\n", "cannot be spoken to"),
        (b"HTTP/1.1 500 x\r\nContent-Length: 2\r\n\r\n[]", "HTTP status 500"),
    ],
)
def test_a_worker_that_answers_wrongly(
    runtime: Path,
    config: MachineConfig,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes | None,
    sentence: str,
) -> None:
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "ENDING_SECONDS", 0.2)
    worker = launch(config, detach=True)
    worker.directory.api_socket.unlink()
    mute = Mute(worker.directory.api_socket, answer)
    with pytest.raises(HvHostError, match=sentence):
        MachineClient("m1").info()
    assert [each.state for each in control.machines()] == ["no-answer"]
    mute.listener.close()
    worker.stop()
