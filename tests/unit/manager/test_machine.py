from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hvhost
from hvhost import HeartbeatStatus, HvHostError, Machine
from hvhost.machine.model import IpSettings, KvpPool, KvpRecord, MachineConfig, ShutdownAction
from hvhost.manager import console as console_module
from hvhost.manager.client import MachineClient
from hvhost.manager.console import Console
from hvhost.manager.directory import MachineDirectory, NameState
from hvhost.manager.launcher import launch

Body = Callable[[Machine], Coroutine[Any, Any, None]]


def run(config: MachineConfig, body: Body, **settings: Any) -> None:
    """*body* in a machine's block."""

    async def main() -> None:
        async with await Machine.start(kernel=config.kernel, name="m1", **settings) as machine:
            await body(machine)

    asyncio.run(main())


def test_a_machine_lives_as_long_as_its_block(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        info = await machine.info()
        assert (machine.name, info.cpus, info.memory) == ("m1", 2, 1 << 30)
        assert MachineClient("m1").info().pid == info.pid

    run(config, body, cpus=2, memory="1G")
    assert not MachineDirectory.of("m1").path.exists()


def test_an_exception_in_the_block_stops_it_too(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config, body)
    assert MachineDirectory.of("m1").state() is NameState.FREE


def test_shut_down_and_wait(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        await machine.shut_down()
        assert await machine.wait_stopped(timeout=10) == "power-off"
        with pytest.raises(HvHostError, match="'m1' has stopped"):
            await machine.info()
        await machine.force_stop()  # is stopped already: nothing to do

    run(config, body)


def test_every_control(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        await machine.reset()
        await machine.shut_down(reboot=True)
        assert (await machine.info()).boots == 3
        await machine.nmi()
        await machine.pause()
        assert (await machine.info()).heartbeat is HeartbeatStatus.PAUSED
        await machine.resume()
        assert await machine.measure_heartbeats(2) == [0.001] * 2
        await machine.force_stop()
        assert MachineDirectory.of("m1").state() is NameState.FREE

    run(config, body)


def test_memory(runtime: Path, config: MachineConfig) -> None:
    async def fixed(machine: Machine) -> None:
        info = await machine.set_memory("700M")
        assert (info.assigned, info.added) == (700 << 20, 188 << 20)
        with pytest.raises(HvHostError, match="too little"):
            await machine.set_memory(100 << 20)
        assert await machine.memory() == info

    run(config, fixed, memory="512M")

    async def dynamic(machine: Machine) -> None:
        assert (await machine.memory()).dynamic == hvhost.DynamicMemory(256 << 20, 1 << 30)
        limits = (await machine.limit_memory(maximum="2G")).dynamic
        assert limits is not None and limits.maximum == 2 << 30

    limits = hvhost.DynamicMemory(256 << 20, 1 << 30)
    run(config, dynamic, memory="512M", dynamic_memory=limits)


def test_time_and_key_value_pairs(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        assert await machine.time_sync() == 0.0005
        await machine.kvp_set("a b", "c")
        await machine.kvp_set("d", "e", "guest")
        assert await machine.kvp_list("guest") == [KvpRecord(KvpPool.GUEST, "d", "e")]
        assert len(await machine.kvp_list()) == 2
        assert await machine.kvp_get("a b") == "c"
        await machine.kvp_delete("a b")
        with pytest.raises(HvHostError, match="no item 'a b'"):
            await machine.kvp_get("a b", KvpPool.EXTERNAL)
        assert (await machine.ip_settings("00:15:5D:00:00:01")).family == 1
        with pytest.raises(HvHostError, match="did not configure adapter"):
            await machine.set_ip(IpSettings("{x}"))

    run(config, body)


def test_events_until_the_end(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        kinds = []
        async for event in machine.events():
            kinds.append(event.kind)
            if event.kind == "started":
                await machine.reset()
            if event.kind == "reset":
                await machine.shut_down()
        assert kinds == ["started", "reset", "stopped"]
        await machine.wait_stopped()
        assert [event.kind async for event in machine.events(1)] == ["reset", "stopped"]
        assert [event async for event in machine.events(3)] == []

    run(config, body)


def test_heartbeat_waits(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        await machine.wait_heartbeat(HeartbeatStatus.OK)
        waiting = asyncio.create_task(machine.wait_heartbeat(HeartbeatStatus.NO_CONTACT, 10))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert await machine.hang() == await machine.processors()
        assert (await waiting).heartbeat is HeartbeatStatus.NO_CONTACT
        with pytest.raises(HvHostError, match=r"is no-contact, not ok, after 0\.1 seconds"):
            await machine.wait_heartbeat(HeartbeatStatus.OK, timeout=0.1)

    run(config, body)


def test_the_console_is_read_typed_at_and_expected_of(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        console = machine.console
        match = await console.expect(r"fake (\w+) up\s+", timeout=5)
        assert match[1] == "guest"
        console.send_line("echo é")
        assert (await console.expect("echo (.)\r", timeout=5))[1] == "é"
        console.write("rest")
        assert await console.read() == "rest"
        with pytest.raises(HvHostError, match=r"did not show 'never' within 0\.1 seconds.*fake"):
            await console.expect("never", timeout=0.1)
        waiting = asyncio.create_task(console.expect("never", timeout=10))
        await machine.shut_down()
        with pytest.raises(HvHostError, match=r"stopped before its console showed 'never'.*bye"):
            await waiting
        assert await console.read() == "bye\r\n"
        assert await console.read() == ""
        assert console.transcript.startswith("fake guest up")
        with pytest.raises(HvHostError, match="nothing can be typed"):
            console.write("x")

    run(config, body)


def test_a_console_keeps_the_end_of_a_long_past(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(console_module, "TRANSCRIPT_LIMIT", 10)
        console = Console("m")
        console._receive(b"0123456789")
        assert (await console.expect("34"))[0] == "34"
        console._receive("xäöüäöüäöüäö".encode()[:-1])
        assert console.transcript == "äöüäöüäöüä"
        console._receive(b"", end=True)
        assert await console.read() == "äöüäöüäöüä\N{REPLACEMENT CHARACTER}"

    asyncio.run(main())


def test_waiting_in_vain(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        with pytest.raises(HvHostError, match=r"still running after 0\.1 seconds"):
            await machine.wait_stopped(timeout=0.1)

    run(config, body)


def test_a_machine_that_fails_says_why(runtime: Path, config: MachineConfig) -> None:
    async def body(machine: Machine) -> None:
        machine.console.write("die")
        with pytest.raises(HvHostError, match="the guest broke; mend it"):
            await machine.wait_stopped(timeout=10)

    run(config, body)
    assert MachineDirectory.of("m1").log_file.exists()  # kept, for it failed


def test_attach_leaves_the_machine_running(runtime: Path, config: MachineConfig) -> None:
    worker = launch(config, detach=True)

    async def main() -> None:
        async with await Machine.attach("m1") as machine:
            await machine.console.expect("fake guest up")
        assert worker.process.poll() is None
        async with await Machine.attach("m1") as machine:
            waiting = asyncio.create_task(machine.wait_stopped(timeout=10))
            await asyncio.to_thread(MachineClient("m1").shut_down, ShutdownAction.POWER_OFF)
            assert await waiting == "power-off"
        with pytest.raises(HvHostError, match="no running machine"):
            await Machine.attach("m1")

    asyncio.run(main())
    assert worker.process.wait(5) == 0


def test_bad_input(runtime: Path, config: MachineConfig) -> None:
    for wrong, sentence in (
        ({}, "either a kernel"),
        ({"kernel": "k", "guest": "g"}, "either a kernel"),
        ({"guest": "debian-12", "initrd": "i"}, "either a kernel"),
        ({"kernel": "/nowhere"}, "there is no kernel"),
        ({"guest": "plan-9"}, "There is no guest plan-9"),
        ({"kernel": config.kernel, "command_line": "fail"}, "no KVM here; buy one"),
    ):
        with pytest.raises(HvHostError, match=sentence):
            asyncio.run(Machine.start(**wrong))  # type: ignore[arg-type]


def test_a_start_that_is_cancelled_leaves_nothing(runtime: Path, config: MachineConfig) -> None:
    async def main() -> None:
        starting = asyncio.create_task(Machine.start(kernel=config.kernel, name="m1"))
        while not MachineDirectory.of("m1").config_file.exists():
            await asyncio.sleep(0.005)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        while MachineDirectory.of("m1").state() is not NameState.FREE:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_worker_that_dies_under_the_api(runtime: Path, config: MachineConfig) -> None:
    async def main() -> None:
        worker = launch(replace(config, name="m2"), detach=True)
        async with await Machine.attach("m2") as machine:
            worker.process.kill()
            worker.process.wait()
            with pytest.raises(HvHostError, match="'m2' has stopped"):
                await machine.nmi()
            assert await machine.wait_stopped(timeout=5) is None

    asyncio.run(main())


def test_the_package_exports_lazily() -> None:
    assert hvhost.Machine is Machine
    with pytest.raises(AttributeError, match="no attribute 'Virtual'"):
        hvhost.Virtual  # noqa: B018
