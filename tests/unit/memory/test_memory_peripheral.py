"""A machine's memory from the administrator's word to the guest's pages, without KVM."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hvhost.errors import HvHostError
from hvhost.firmware.layout import memory_layout
from hvhost.machine.model import MachineConfig
from hvhost.memory.host import STALE_SECONDS, Commons, HostMemory, read_host_memory
from hvhost.memory.peripheral import MemoryPeripheral
from hvhost.memory.policy import Claim, guest_floor, reserve
from hvhost.memory.settings import DynamicMemory, check_dynamic
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import GIB, MIB
from simulated.balloon import BalloonDriver
from simulated.driver import SimulatedGuest

STARTUP = 512 * MIB
DYNAMIC = DynamicMemory(256 * MIB, GIB)
KERNEL = 64 * MIB  # what the guest's kernel took of its memory


class Host:
    """A host with *available* memory."""

    def __init__(self, available: int = 32 * GIB) -> None:
        self.available = available

    def __call__(self) -> HostMemory:
        return HostMemory(64 * GIB, self.available)


class World:
    """A peripheral plugged into a computer whose RAM is only told of, and a driver."""

    def __init__(
        self, directory: Path, dynamic: DynamicMemory | None = None, *, connect: bool = True
    ) -> None:
        config = MachineConfig("m", "/k", memory=STARTUP, dynamic_memory=dynamic)
        self.host = Host()
        self.events: list[str] = []
        self.peripheral = MemoryPeripheral(
            config,
            Commons(directory, self.host),
            lambda kind, detail: self.events.append(detail),
            aside=lambda work: work(),
        )
        self.plugged: list[int] = []
        self.discarded: list[tuple[int, int]] = []
        self.plug_error: str | None = None
        self.used = 0
        self.boot(config)
        if connect:
            self.connect()

    def boot(self, config: MachineConfig) -> None:
        self.guest = SimulatedGuest(pages=64)
        layout = memory_layout(STARTUP, hot_add_bytes=config.backing - STARTUP)
        self.computer: Any = SimpleNamespace(
            lock=threading.RLock(),
            bus=self.guest.server,
            memory=SimpleNamespace(backing_offset=lambda address, size: address),
            hot_add=layout.hot_add,
            plug_memory=self.plug,
            discard_memory=lambda address, size: self.discarded.append((address, size)),
            resident_memory=lambda: 100 * MIB,
            discarded_bytes=0,
            reported_bytes=0,
            paused=False,
            require_running=self.require_running,
        )
        self.peripheral.attach(cast("Any", self.computer))

    def plug(self, end: int) -> None:
        if self.plug_error is not None:
            raise HvHostError(self.plug_error)
        self.plugged.append(end)

    def require_running(self) -> None:
        if self.computer.paused:
            raise HvHostError("machine 'm' is paused.")

    def connect(self) -> None:
        self.guest.connect()
        self.driver = BalloonDriver(self.guest.open(1), STARTUP // PAGE_SIZE)
        assert self.driver.connect()

    @property
    def assigned(self) -> int:
        return self.peripheral.info().assigned

    def report(self, used: int) -> None:
        """The guest uses, or promised its programs, *used* bytes, its kernel included."""
        free = max(0, self.assigned - used)
        self.driver.free = free // PAGE_SIZE
        self.driver.floor = guest_floor(self.assigned) // PAGE_SIZE
        promised = (used + guest_floor(self.assigned)) // PAGE_SIZE
        self.driver.status(self.driver.free, promised + len(self.driver.ballooned))

    def run(self, used: int, seconds: float, start: float = 0.0) -> None:
        """The policy at work: a report, a tick, and the driver's answer, every two seconds."""
        for tick in range(int(seconds / 2)):
            self.report(used)
            with self.computer.lock:
                self.peripheral.tick(start + 2.0 * tick)
            self.driver.run()

    def set(self, size: int, timeout: float = 5.0) -> None:
        """The administrator's word, while the driver does its work."""
        failures: list[HvHostError] = []

        def call() -> None:
            try:
                self.peripheral.set(size, timeout)
            except HvHostError as error:
                failures.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            with self.computer.lock:
                self.driver.run()
                self.driver.floor = guest_floor(self.assigned) // PAGE_SIZE
            time.sleep(0.001)
        if failures:
            raise failures[0]


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "fixed").mkdir()
    world = World(tmp_path / "fixed")
    world.report(100 * MIB)
    return world


@pytest.fixture
def dynamic(tmp_path: Path) -> World:
    return World(tmp_path, DYNAMIC)


def test_up_and_down(world: World) -> None:
    for size in (640 * MIB, 717 * MIB, 435 * MIB, 2 * GIB - 3 * MIB, STARTUP, 300 * MIB):
        world.set(size)
        info = world.peripheral.info()
        assert info.assigned == size and info.work == "idle" and info.target is None
        assert info.assigned == STARTUP + info.added - info.ballooned
        world.report(100 * MIB)
    assert not world.guest.faults
    # KVM was given the memory before the guest was told of it, in whole blocks of the guest's.
    assert world.plugged == sorted(world.plugged) and world.plugged[0] % (128 * MIB) == 0
    assert sum(size for _, size in world.discarded) >= world.peripheral.info().ballooned


def test_down_to_the_least_takes_several_requests(world: World) -> None:
    """The guest's floor falls as it gives."""
    least = world.peripheral.info().needed
    assert least is not None and least < 100 * MIB + guest_floor(STARTUP)
    world.set(least + 4 * MIB)
    assert world.assigned == least + 4 * MIB


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (100 * MIB, "demand is 100 MiB and it keeps"),
        (5 * GIB, "more than the 2 GiB"),
        (600 * MIB + 4096, "steps of 1 MiB"),
    ],
)
def test_sizes_that_are_refused(world: World, size: int, said: str) -> None:
    with pytest.raises(HvHostError, match=said):
        world.set(size)
    assert world.assigned == STARTUP


def test_more_than_the_host_has(world: World) -> None:
    world.host.available = reserve(64 * GIB) + 50 * MIB
    with pytest.raises(HvHostError, match=r"has 50 MiB to give, not the 128 MiB"):
        world.set(640 * MIB)
    world.set(562 * MIB)


def test_less_before_the_first_report(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(HvHostError, match="has not told yet what it needs"):
        world.set(500 * MIB)
    world.set(600 * MIB)  # more is no question of need


def test_a_guest_without_the_driver(tmp_path: Path) -> None:
    world = World(tmp_path, connect=False)
    with pytest.raises(HvHostError, match="no driver for dynamic memory"):
        world.peripheral.set(600 * MIB, 1.0)
    info = world.peripheral.info()
    assert (info.driver, info.version, info.demand) == ("no-driver", None, None)


def test_kvm_refuses_the_memory(world: World) -> None:
    """The host runs out during hot-add: the machine goes on, and may be tried again."""
    world.plug_error = "KVM takes no more memory."
    with pytest.raises(HvHostError, match="KVM takes no more memory; it has 512 MiB now"):
        world.set(640 * MIB)
    world.plug_error = None
    world.set(640 * MIB)
    assert world.assigned == 640 * MIB


def test_a_guest_that_does_not_add(world: World) -> None:
    world.driver.answers_hot_add = (0, 1)
    with pytest.raises(HvHostError, match="did not add all the memory"):
        world.set(640 * MIB)
    with pytest.raises(HvHostError, match="said that it takes no more memory than it has; it has"):
        world.set(640 * MIB)
    assert world.assigned == STARTUP


@pytest.mark.parametrize(
    ("alignment", "said"),
    [(12, r"in blocks of 4 GiB, and 3 GiB of address.*has 512 MiB now, not 640"), (7, None)],
)
def test_blocks_that_find_no_room(tmp_path: Path, alignment: int, said: str | None) -> None:
    world = World(tmp_path, connect=False)
    world.guest.connect()
    world.driver = BalloonDriver(world.guest.open(1), STARTUP // PAGE_SIZE, alignment=alignment)
    assert world.driver.connect()
    if said is None:
        world.set(640 * MIB)
        return
    with pytest.raises(HvHostError, match=said):
        world.set(640 * MIB)
    assert world.plugged == [] and world.assigned == STARTUP


def test_a_guest_that_gives_less(world: World) -> None:
    world.driver.free = 20 * MIB // PAGE_SIZE
    world.driver.floor = 0
    with pytest.raises(HvHostError, match=r"gave 30 MiB less.*has 492 MiB now, not 462 MiB"):
        world.peripheral._slice = lambda device, pages: pages  # type: ignore[method-assign]
        world.set(462 * MIB)


def test_a_late_answer_counts(world: World) -> None:
    """The caller waits no longer, the journey goes on."""
    with pytest.raises(HvHostError, match="is still busy"):
        world.peripheral.set(450 * MIB, 0.01)
    with pytest.raises(HvHostError, match="busy with another change"):
        world.peripheral.set(600 * MIB, 0.01)
    while world.peripheral.info().target is not None:
        world.driver.run()
    assert world.assigned == 450 * MIB


def test_the_driver_leaves_while_it_is_asked(world: World) -> None:
    with pytest.raises(HvHostError, match="still busy"):
        world.peripheral.set(600 * MIB, 0.01)
    assert world.peripheral.info().demand is not None
    world.guest.close(1)
    info = world.peripheral.info()
    assert (info.target, info.driver) == (None, "no-driver")
    assert info.demand is None, "what the next driver will tell is not known yet"
    assert info.problem == "the guest's memory driver went away"
    world.driver.channel = world.guest.open(1)
    world.driver.regions.clear()
    assert world.driver.connect()
    world.set(640 * MIB)
    assert world.assigned == 640 * MIB


def test_a_report_in_the_middle_of_a_change_tells_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(HvHostError, match="still busy"):
        world.peripheral.set(600 * MIB, 0.01)
    world.report(100 * MIB)
    info = world.peripheral.info()
    assert info.available is not None and info.demand is None
    world.driver.run()
    assert world.assigned == 600 * MIB
    world.report(100 * MIB)
    assert world.peripheral.info().demand == 100 * MIB


def a_set_that_fails(world: World) -> tuple[threading.Thread, list[str]]:
    """Somebody who waits for memory to be 600 MiB, under way, and the words this ends with."""
    failures: list[str] = []

    def set_memory() -> None:
        with pytest.raises(HvHostError) as caught:
            world.peripheral.set(600 * MIB, 60.0)
        failures.append(str(caught.value))

    waiting = threading.Thread(target=set_memory)
    waiting.start()
    while world.peripheral.info().work == "idle":
        time.sleep(0.001)
    return waiting, failures


def test_a_paused_machine(world: World) -> None:
    """Its guest answers nothing: asked for nothing, and nobody waits in vain."""
    world.computer.paused = True
    with pytest.raises(HvHostError, match="'m' is paused"):
        world.peripheral.set(600 * MIB, 60.0)
    assert world.assigned == STARTUP and not world.driver.channel.read(), "it was asked"
    world.computer.paused = False
    waiting, failures = a_set_that_fails(world)
    world.computer.paused = True
    waiting.join(10.0)
    assert failures == [
        "machine 'm' was paused when it had 512 MiB of the 600 MiB; the change goes on when it is "
        "resumed."
    ]
    world.computer.paused = False
    while world.peripheral.info().target is not None:
        world.driver.run()
    assert world.assigned == 600 * MIB


def test_a_reset_while_somebody_waits(world: World) -> None:
    """What the guest has after it is not what was asked for, and is not told to be."""
    waiting, failures = a_set_that_fails(world)
    world.guest.server.reset()
    world.peripheral.detach()
    world.boot(MachineConfig("m", "/k", memory=STARTUP))
    waiting.join(10.0)
    assert failures == [
        "machine 'm' was reset or stopped before it had 600 MiB; see `hvhost info`."
    ]


def test_a_reset_while_ballooned(world: World) -> None:
    """A guest that crashed with memory ballooned starts with all it had at first."""
    world.set(400 * MIB)
    world.guest.server.reset()
    world.peripheral.detach()
    with pytest.raises(HvHostError, match="is not running"):
        world.peripheral.info()
    world.boot(MachineConfig("m", "/k", memory=STARTUP))
    world.connect()
    assert world.assigned == STARTUP and world.peripheral.info().ballooned == 0


# Dynamic memory.


def test_trimmed_then_grown(dynamic: World) -> None:
    dynamic.run(120 * MIB, 120)
    lean = dynamic.assigned
    assert 256 * MIB <= lean < 400 * MIB
    dynamic.run(600 * MIB, 4, 120)
    info = dynamic.peripheral.info()
    assert info.assigned >= 720 * MIB and info.added > 0 and info.ballooned == 0
    assert any("the guest has" in event for event in dynamic.events)


def test_never_beyond_the_limits(dynamic: World) -> None:
    dynamic.run(20 * MIB, 200)
    assert dynamic.assigned == 256 * MIB
    for tick in range(10):
        dynamic.run(dynamic.assigned - 10 * MIB, 2, 200 + 2 * tick)
    assert dynamic.assigned == GIB


def test_the_hosts_memory_is_left_to_the_host(dynamic: World) -> None:
    dynamic.host.available = reserve(64 * GIB) + 560 * MIB - 100 * MIB
    dynamic.run(500 * MIB, 10)
    assert dynamic.assigned == 560 * MIB


def test_a_refusal_is_not_asked_again_at_once(dynamic: World) -> None:
    dynamic.driver.answers_hot_add = (0, 0)
    before = time.monotonic()
    dynamic.run(500 * MIB, 2, before)
    assert (
        dynamic.peripheral.info().problem == "the guest did not add all the memory it was offered"
    )
    asked = len(dynamic.driver.channel.read())
    dynamic.driver.answers_hot_add = None
    dynamic.run(500 * MIB, 20, before + 2)
    assert (asked, dynamic.assigned) == (0, STARTUP)
    dynamic.run(500 * MIB, 4, before + 40)
    assert dynamic.assigned > STARTUP


def test_while_one_request_is_under_way_there_is_no_other(dynamic: World) -> None:
    now = time.monotonic()
    dynamic.report(500 * MIB)
    with dynamic.computer.lock:
        dynamic.peripheral.tick(now)
    goal = dynamic.peripheral.info().target
    assert goal is not None and goal > STARTUP
    with dynamic.computer.lock:
        dynamic.peripheral.tick(now + 2)
    info = dynamic.peripheral.info()
    assert (info.target, info.problem) == (goal, None)
    dynamic.driver.run()
    assert dynamic.assigned > STARTUP


def test_a_guest_that_cannot_grow_may_shrink_meanwhile(dynamic: World) -> None:
    dynamic.driver.answers_hot_add = (0, 0)
    now = time.monotonic()
    dynamic.run(500 * MIB, 2, now)
    assert "did not add" in (dynamic.peripheral.info().problem or "")
    dynamic.run(120 * MIB, 20, now + 2)
    assert dynamic.assigned < STARTUP


def test_fixed_memory_takes_no_part_in_sharing(world: World, tmp_path: Path) -> None:
    world.peripheral.tick(0.0)
    assert not any((tmp_path / "fixed/shares").read_bytes())


def test_between_two_boots_there_is_nothing_to_decide(dynamic: World) -> None:
    dynamic.report(500 * MIB)
    dynamic.peripheral.detach()
    dynamic.peripheral.tick(0.0)
    assert dynamic.events == []


def test_a_guest_that_gave_less_than_asked_gets_what_it_needs_at_once(dynamic: World) -> None:
    """It had come into need when it was asked."""
    now = time.monotonic()
    dynamic.run(120 * MIB, 10, now)
    dynamic.report(120 * MIB)
    with dynamic.computer.lock:
        dynamic.peripheral.tick(now + 10)
    dynamic.driver.free = dynamic.driver.floor
    dynamic.driver.run()
    assert "less than it was asked for" in (dynamic.peripheral.info().problem or "")
    assert dynamic.assigned == STARTUP
    dynamic.run(120 * MIB, 10, now + 12)
    assert dynamic.assigned == STARTUP, "it is not asked again yet"
    dynamic.run(500 * MIB, 4, now + 22)
    assert dynamic.assigned > STARTUP


def test_a_guest_that_cannot_grow_keeps_nothing_from_others(dynamic: World, tmp_path: Path) -> None:
    """Linux without memory hot-plug says that it adds nothing only when it is asked."""
    dynamic.driver.answers_hot_add = (0, 0)
    dynamic.host.available = reserve(64 * GIB) + 1600 * MIB
    other = Commons(tmp_path, dynamic.host)
    hungry = Claim(512 * MIB, 900 * MIB, 256 * MIB, 8 * GIB, 20, 5000)
    now = time.monotonic()
    dynamic.run(500 * MIB, 2, now)
    assert other.target(hungry, 0) < hungry.wanted, "it might grow"
    assert dynamic.peripheral.info().problem is not None
    dynamic.run(500 * MIB, 2, now + 2)
    assert other.target(hungry, 0) == hungry.wanted
    dynamic.run(500 * MIB, 2, now + 40)
    assert other.target(hungry, 0) < hungry.wanted, "it is tried again"
    dynamic.driver.answers_hot_add = None
    dynamic.run(500 * MIB, 4, now + 80)
    assert dynamic.assigned > STARTUP


def test_what_may_change_while_it_runs(dynamic: World) -> None:
    info = dynamic.peripheral.change(
        minimum=128 * MIB, maximum=2 * GIB, buffer=DYNAMIC.buffer, weight=DYNAMIC.weight
    )
    assert info.dynamic == replace(DYNAMIC, minimum=128 * MIB, maximum=2 * GIB)
    dynamic.driver.run()
    assert dynamic.driver.maximum == 2 * GIB // PAGE_SIZE
    dynamic.run(20 * MIB, 200)
    assert dynamic.assigned == 128 * MIB


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minimum": 300 * MIB}, "only go down from 256 MiB"),
        ({"maximum": 900 * MIB}, "only go up from 1 GiB"),
        ({"maximum": 99 * GIB}, "cannot become 99 GiB"),
        ({"buffer": 50}, "buffer changes only while the machine is stopped.*--memory-buffer 50"),
        ({"weight": 1}, "weight changes only while the machine is stopped.*--memory-weight 1"),
        ({"minimum": 16 * MIB}, "cannot be 16 MiB"),
        ({"minimum": 200 * MIB + 1}, "not a whole number of MiB"),
    ],
)
def test_what_may_not(dynamic: World, change: dict[str, int], said: str) -> None:
    with pytest.raises(HvHostError, match=said):
        dynamic.peripheral.change(**change)
    assert dynamic.peripheral.dynamic == DYNAMIC


def test_the_kind_of_memory_stays(world: World, dynamic: World) -> None:
    with pytest.raises(HvHostError, match="cannot become dynamic"):
        world.peripheral.change(minimum=256 * MIB)
    with pytest.raises(HvHostError, match="is dynamic and sets itself"):
        dynamic.peripheral.set(600 * MIB, 1.0)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (DynamicMemory(600 * MIB, GIB), "minimum cannot be 600 MiB"),
        (DynamicMemory(256 * MIB, 300 * MIB), "less than the 512 MiB"),
        (DynamicMemory(256 * MIB, GIB, buffer=4), "buffer cannot be 4 %"),
        (DynamicMemory(256 * MIB, GIB, weight=0), "weight cannot be 0"),
        (DynamicMemory(256 * MIB, GIB + 1), "not a whole number"),
    ],
)
def test_limits_that_make_no_sense(limits: DynamicMemory, said: str) -> None:
    with pytest.raises(HvHostError, match=said):
        check_dynamic(STARTUP, limits)


# The host's memory among machines.


def a_claim(**values: int) -> Claim:
    return replace(Claim(GIB, 2 * GIB, 256 * MIB, 8 * GIB, 20, 5000), **values)


def test_machines_know_of_each_other(tmp_path: Path) -> None:
    host = Host(reserve(64 * GIB) + 2 * GIB)
    one, two = (Commons(tmp_path, host) for _ in range(2))
    assert one.target(a_claim(), GIB // 2) == a_claim().wanted  # it is alone
    rich, poor = two.target(a_claim(weight=1000), GIB // 2), one.target(a_claim(), GIB // 2)
    assert rich < poor and rich + poor == pytest.approx(3 * GIB, abs=8)
    two.close()
    assert one.target(a_claim(), GIB // 2) > poor
    one.close()
    three = Commons(tmp_path, host)
    assert three.target(a_claim(), GIB // 2) == a_claim().wanted, "it took the first one's place"
    assert (tmp_path / "shares").stat().st_size <= 2 * 48


def test_the_reserve_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVHOST_MEMORY_RESERVE", "31.5G")
    assert Commons(tmp_path, Host(32 * GIB)).room() == GIB // 2
    poor = Commons(tmp_path, Host(GIB))
    assert poor.room() == 0
    claim = Claim(GIB, 2 * GIB, 256 * MIB, 8 * GIB, 20, 5000)
    assert poor.target(claim, GIB) == GIB, "there is nothing to give"
    monkeypatch.setenv("HVHOST_MEMORY_RESERVE", "much")
    with pytest.raises(HvHostError, match="HVHOST_MEMORY_RESERVE 'much' is not a size"):
        Commons(tmp_path, Host())


def test_a_worker_that_was_killed_does_not_count_for_long(tmp_path: Path) -> None:
    host, now = Host(reserve(64 * GIB) + 2 * GIB), [10**12]
    one, two = (Commons(tmp_path, host, lambda: now[0]) for _ in range(2))
    two.target(a_claim(), GIB)
    os.close(two._descriptor)  # as when its worker is killed
    assert one.target(a_claim(), GIB) < a_claim().wanted
    now[0] += int(STALE_SECONDS * 1e9) + 1
    assert one.target(a_claim(), GIB) == a_claim().wanted
    three = Commons(tmp_path, host, lambda: now[0])
    three.target(a_claim(), GIB)
    assert (tmp_path / "shares").stat().st_size == 2 * 48, "in the dead one's place"


def test_a_machine_that_stands_still_counts(tmp_path: Path) -> None:
    """Paused, it writes no more; what it has may come into use again at any time."""
    host, now = Host(reserve(64 * GIB) + 2 * GIB), [10**12]
    one, two = (Commons(tmp_path, host, lambda: now[0]) for _ in range(2))
    two.target(a_claim(), GIB)
    share = one.target(a_claim(), GIB)
    now[0] += 1000 * int(STALE_SECONDS * 1e9)
    assert one.target(a_claim(), GIB) == share < a_claim().wanted
    two.close()
    assert one.target(a_claim(), GIB) == a_claim().wanted


def test_rubbish_does_not_count(tmp_path: Path) -> None:
    host = Host(reserve(64 * GIB) + 2 * GIB)
    (tmp_path / "shares").write_bytes(bytes(48) + b"\0" * 40 + b"\xff" * 17)
    one = Commons(tmp_path, host)
    assert one.target(a_claim(), GIB) == a_claim().wanted


def test_the_hosts_own_figures(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 1000 kB\nMemFree: 3 kB\nMemAvailable:  500 kB\nHugePages_Total: 0\n")
    assert read_host_memory(path) == HostMemory(1000 << 10, 500 << 10)
    assert read_host_memory().available <= read_host_memory().total
