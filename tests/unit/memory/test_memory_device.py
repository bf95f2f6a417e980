"""The dynamic memory device against a driver that does as Linux's, and against bad ones."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from hvhost.errors import HvHostError, LocalProtocolError
from hvhost.memory.area import REQUEST_PAGES_MAX, HotAddArea
from hvhost.memory.device import UNBALLOON_PAGES_MAX, MemoryDevice, Phase, Work
from hvhost.memory.protocol import PageRange
from simulated.balloon import BalloonDriver, message, words
from simulated.driver import SimulatedGuest

RAM = 1 << 20  # pages
AREA = 1 << 20


@dataclass
class Memory:
    released: list[PageRange] = field(default_factory=list)

    def is_ram(self, pages: PageRange) -> bool:
        return pages.end <= RAM

    def release(self, pages: PageRange) -> None:
        self.released.append(pages)


class World:
    def __init__(self, free: int = 200_000, floor: int = 0, **options: object) -> None:
        self.guest = SimulatedGuest(pages=64)
        self.memory = Memory()
        self.changes = 0
        self.device = MemoryDevice(
            HotAddArea(AREA, AREA + 10 * 32768), 7777, self.memory, self.changed
        )
        self.guest.server.add_device(self.device)
        self.guest.connect()
        self.driver = BalloonDriver(self.guest.open(1), free, floor=floor)

    def changed(self) -> None:
        self.changes += 1

    def connect(self) -> World:
        assert self.driver.connect()
        assert self.device.idle
        return self

    def reopen(self) -> None:
        """The driver leaves and comes back."""
        self.guest.close(1)
        self.driver.channel = self.guest.open(1)
        assert self.driver.connect()

    @property
    def fault(self) -> str:
        (fault,) = self.guest.faults
        return fault


@pytest.fixture
def world() -> World:
    return World().connect()


def test_negotiation(world: World) -> None:
    state = world.device.state
    assert (state.version, state.phase) == (0x20000, Phase.READY)
    assert state.capabilities is not None
    assert state.capabilities.balloon and state.capabilities.hot_add
    assert state.capabilities.hot_add_alignment == 128 << 20
    assert world.driver.maximum == 7777 and world.changes == 1


def test_the_guest_numbers_its_messages_as_it_likes(world: World) -> None:
    """Linux counts its own, and does not answer with the number of the request."""
    for number in (0, 7, 7, 0xFFFFFFFD):
        world.driver.number = number
        world.device.balloon(16)
        world.driver.run()
        assert world.device.idle
    assert world.device.state.balloon.count == 64 and not world.guest.faults


@pytest.mark.parametrize("versions", [(0x30000, 0x20000), (0x30001, 0x10000), (0x40000, 3)])
def test_an_older_version(versions: tuple[int, ...]) -> None:
    world = World()
    assert world.driver.connect(versions)
    assert world.driver.version_answers == [False, True]
    assert world.device.state.version == versions[1]
    assert (world.driver.maximum is None) == (versions[1] == 3)  # a message of 1.0


def test_no_common_version() -> None:
    world = World()
    assert not world.driver.connect((0x30000, 0x40000))
    assert not world.device.ready and not world.guest.faults


def test_balloon_there_and_back(world: World) -> None:
    device, driver = world.device, world.driver
    device.balloon(100_001)
    assert device.state.work is Work.BALLOON
    driver.run()
    assert device.idle and device.state.balloon.count == len(driver.ballooned) == 100_001
    assert sum(each.count for each in world.memory.released) == 100_001
    device.unballoon(60_000)
    driver.run()
    assert device.idle and device.state.balloon.count == len(driver.ballooned) == 40_001
    device.unballoon(1 << 30)  # all there is
    driver.run()
    assert device.idle and not device.state.balloon.count and not driver.ballooned
    assert not world.guest.faults


def test_single_pages_come_back_in_many_messages(world: World) -> None:
    """Fragmented memory: far more ranges than fit the ring at once."""
    device, driver = world.device, world.driver
    device.balloon(5000)
    for start in range(0, 5000, 500):
        ranges = [(2 * page, 1) for page in range(start, start + 500)]
        driver.ballooned.update(page for page, _ in ranges)
        more = start < 4500
        driver.send(7, struct.pack("<II", 0, 500 << 1 | more) + words(ranges))
    driver.channel.read()
    assert device.idle
    device.unballoon(5000)
    for _ in range(10):
        driver.run()
    assert device.idle and not driver.ballooned and not world.guest.faults


def test_one_message_frees_no_more_than_a_softirq_should() -> None:
    world = World(free=4 * UNBALLOON_PAGES_MAX).connect()
    world.device.balloon(3 * UNBALLOON_PAGES_MAX)
    world.driver.run()
    world.device.unballoon(3 * UNBALLOON_PAGES_MAX)
    packets = world.driver.channel.read()
    assert len(packets) == 3
    for packet in packets:
        (word,) = struct.unpack_from("<Q", packet.payload, 16)
        assert word >> 40 == UNBALLOON_PAGES_MAX


def test_a_guest_that_gives_less() -> None:
    world = World(free=1000, floor=300).connect()
    world.device.balloon(5000)
    world.driver.run()
    assert world.device.idle and world.device.state.balloon.count == 700
    world.device.balloon(10)  # nothing more above its floor
    world.driver.run()
    assert world.device.idle and world.device.state.balloon.count == 700


def test_hot_add_fills_blocks(world: World) -> None:
    device, driver = world.device, world.driver
    for pages, announced in ((10_000, 1), (5_000, 1), (40_000, 1), (40_000, 3)):
        offer = device.next_range(pages)
        assert offer is not None
        device.hot_add(*offer)
        driver.run()
        assert device.idle and len(driver.regions) >= min(announced, 2)
    # 10,000 and 5,000 in the first block; its rest; then whole blocks of the guest's alignment
    assert driver.added[:3] == [(AREA, 10_000), (AREA + 10_000, 5_000), (AREA + 15_000, 17_768)]
    assert driver.added[3] == (AREA + 32768, 40_000)
    assert device.state.added == sum(count for _, count in driver.added)


def test_hot_add_until_there_is_no_room(world: World) -> None:
    device, driver = world.device, world.driver
    while offer := device.next_range(100_000):
        device.hot_add(*offer)
        driver.run()
    assert device.state.added == 10 * 32768 and not world.guest.faults


def test_a_guest_that_never_adds(world: World) -> None:
    world.driver.answers_hot_add = (0, 1)
    offer = world.device.next_range(100)
    assert offer is not None
    world.device.hot_add(*offer)
    world.driver.run()
    assert world.device.idle and world.device.state.adds_nothing
    assert world.device.next_range(100) is None


def test_why_no_memory_is_added_is_said() -> None:
    world = World()
    assert world.device.next_range(100) is None
    assert "cannot add memory" in world.device.why_no_range()
    world.driver.abilities = 1  # a balloon alone
    world.connect()
    assert world.device.next_range(100) is None
    assert "cannot add memory" in world.device.why_no_range()
    world.driver.abilities = 3
    world.reopen()
    assert world.device.next_range(100) is not None
    assert "blocks of 128 MiB" in world.device.why_no_range()


def test_a_guest_that_may_add_later(world: World) -> None:
    world.driver.answers_hot_add = (0, 0)
    offer = world.device.next_range(100)
    assert offer is not None
    world.device.hot_add(*offer)
    world.driver.run()
    assert world.device.idle and world.device.next_range(100) == offer


def test_a_guest_that_adds_a_part(world: World) -> None:
    offer = world.device.next_range(40_000)
    assert offer is not None
    world.driver.answers_hot_add = (32768, 1)
    world.device.hot_add(*offer)
    world.driver.run()
    assert world.device.state.added == 32768
    assert world.device.next_range(40_000) == (PageRange(AREA + 32768, 32768), None)


def test_a_driver_that_leaves_and_returns(world: World) -> None:
    """What the balloon holds is given back to the new driver; a begun block is left alone."""
    device, driver = world.device, world.driver
    device.balloon(5000)
    driver.run()
    offer = device.next_range(1000)
    assert offer is not None
    device.hot_add(*offer)
    driver.run()
    world.reopen()
    assert device.idle and device.state.balloon.count == 5000
    assert device.next_range(1000) == (
        PageRange(AREA + 32768, 1000),
        PageRange(AREA + 32768, 32768),
    )
    device.unballoon(5000)
    driver.run()
    assert not driver.ballooned and not world.guest.faults


def test_a_driver_that_leaves_in_the_middle(world: World) -> None:
    for pages in (100, None):
        if pages is None:
            world.device.hot_add(*world.device.next_range(100))  # type: ignore[misc]
        else:
            world.device.balloon(pages)
        world.reopen()
        assert world.device.idle and not world.guest.faults
    # Perhaps the guest has that block by now: it is not offered again.
    assert world.device.next_range(100)[0].start == AREA + 32768  # type: ignore[index]


def test_status(world: World) -> None:
    world.driver.status(123, 456)
    status = world.device.state.status
    assert status is not None and (status.num_avail, status.num_committed) == (123, 456)
    assert world.device.reports == 1


def test_requests_that_make_no_sense(world: World) -> None:
    with pytest.raises(LocalProtocolError):
        world.device.balloon(0)
    with pytest.raises(LocalProtocolError):
        world.device.unballoon(1)
    world.device.balloon(1)
    with pytest.raises(LocalProtocolError):
        world.device.balloon(1)


def test_requests_hold_what_a_message_can_say() -> None:
    device = MemoryDevice(HotAddArea(AREA, AREA + (1 << 26)), 7777, Memory())
    world = World()
    world.guest = SimulatedGuest(pages=64)
    world.guest.server.add_device(device)
    world.guest.connect()
    world.driver = BalloonDriver(world.guest.open(1), 0)
    world.driver.connect()
    offer = device.next_range(1 << 30)
    assert offer is not None and offer[0].count <= REQUEST_PAGES_MAX
    device.balloon(1 << 40)
    (packet,) = world.driver.channel.read()
    assert struct.unpack_from("<HHII", packet.payload)[3] == device.state.wanted < 1 << 32


@pytest.mark.parametrize(("version", "told"), [(0x20000, 9000), (0x10000, 9000), (3, None)])
def test_a_maximum_is_raised_for_who_knows_it(version: int, told: int | None) -> None:
    world = World()
    world.device.raise_maximum(8000)
    assert world.driver.connect((version,))
    assert world.driver.maximum == (None if told is None else 8000)
    world.device.raise_maximum(9000)
    world.driver.run()
    assert world.driver.maximum == told
    world.guest.close(1)
    world.device.raise_maximum(9500)  # for the next driver
    world.driver.channel = world.guest.open(1)
    assert world.driver.connect((version,))
    assert world.driver.maximum == (None if told is None else 9500)


def test_a_driver_that_leaves_over_a_begun_block(world: World) -> None:
    device, driver = world.device, world.driver
    for _ in range(2):
        offer = device.next_range(100)
        assert offer is not None
        device.hot_add(*offer)
        driver.run()
    offer = device.next_range(100)
    assert offer == (PageRange(AREA + 200, 100), None)
    device.hot_add(*offer)
    world.reopen()
    assert device.next_range(100)[0].start == AREA + 32768  # type: ignore[index]
    assert not world.guest.faults


@pytest.mark.parametrize("work", [Work.BALLOON, Work.UNBALLOON, Work.HOT_ADD])
@pytest.mark.parametrize("answer", [Work.BALLOON, Work.UNBALLOON, Work.HOT_ADD])
def test_an_answer_to_something_else(world: World, work: Work, answer: Work) -> None:
    device, driver = world.device, world.driver
    device.balloon(100)
    driver.run()
    if work is Work.BALLOON:
        device.balloon(100)
    elif work is Work.UNBALLOON:
        device.unballoon(100)
    else:
        device.hot_add(*device.next_range(100))  # type: ignore[misc]
    body = {Work.BALLOON: (7, bytes(8)), Work.UNBALLOON: (9, b""), Work.HOT_ADD: (11, bytes(8))}
    driver.send(*body[answer])
    if work is answer:
        assert device.idle and not world.guest.faults
    else:
        assert f"while the memory device was ready and {work}" in world.fault


def test_a_status_instead_of_capabilities() -> None:
    world = World()
    world.driver.send(1, struct.pack("<II", 0x20000, 0))
    world.driver.send(5, bytes(40))
    assert "a Status while the memory device was capabilities" in world.fault


def test_a_driver_without_balloon() -> None:
    world = World()
    world.driver.send(1, struct.pack("<II", 0x20000, 0))
    world.driver.send(3, struct.pack("<QQQ", 0, 0, 0))
    with pytest.raises(HvHostError, match="cannot give memory back"):
        world.device.balloon(1)
    assert world.device.next_range(1) is None


READY_ONLY = [
    (5, bytes(40), "Status"),
    (7, struct.pack("<II", 0, 0), "BalloonResponse"),
    (9, b"", "UnballoonResponse"),
    (11, bytes(8), "HotAddResponse"),
]


@pytest.mark.parametrize(("kind", "body", "named"), READY_ONLY)
def test_before_its_time(kind: int, body: bytes, named: str) -> None:
    world = World()
    world.driver.send(kind, body)
    assert named in world.fault and "version" in world.fault


@pytest.mark.parametrize(
    ("kind", "body"),
    [*[(kind, body) for kind, body, _ in READY_ONLY[1:]], (1, bytes(8)), (3, bytes(24))],
)
def test_without_being_asked(world: World, kind: int, body: bytes) -> None:
    world.driver.send(kind, body)
    assert "while the memory device was ready and idle" in world.fault


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(RAM - 1, 2)], "does not have"),
        ([(2**40 - 1, 2)], "does not have"),
        ([(8, 4), (10, 1)], "a second time"),
        ([(0, 101)], "of which 100 were asked for"),
    ],
)
def test_pages_that_cannot_be(world: World, ranges: list[tuple[int, int]], said: str) -> None:
    world.device.balloon(100)
    world.driver.send(7, struct.pack("<II", 0, len(ranges) << 1) + words(ranges))
    assert said in world.fault
    assert not world.device.ready


def test_more_added_than_offered(world: World) -> None:
    world.device.hot_add(*world.device.next_range(100))  # type: ignore[misc]
    world.driver.send(11, struct.pack("<II", 101, 1))
    assert "added 101 pages of 100" in world.fault


def test_pages_taken_back_before_all_were_given(world: World) -> None:
    world.device.balloon(200_000)
    world.driver.run()
    channel = world.device._channel
    assert channel is not None
    world.device.state.balloon.marks[0::2] = bytes(len(world.device.state.balloon.marks[0::2]))
    world.device.state.balloon.count = sum(world.device.state.balloon.marks)
    world.device.unballoon(world.device.state.balloon.count)
    assert world.device.state.to_return
    world.driver.send(9, b"")
    assert "before it got them all" in world.fault


def test_other_packets(world: World) -> None:
    world.driver.channel.write(message(5, bytes(40), 1), packet_type=11)
    assert "packet COMP" in world.fault
