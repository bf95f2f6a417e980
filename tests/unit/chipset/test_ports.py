from __future__ import annotations

import pytest

from hvhost.chipset.irq import SharedIrqLine
from hvhost.chipset.ports import PortBus
from hvhost.errors import LocalProtocolError


class Recorder:
    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nobody_answers_with_ones(size: int) -> None:
    bus = PortBus()
    assert bus.read(0xCF8, size) == (1 << 8 * size) - 1
    bus.write(0xCF8, size, 0)


def test_device_sees_offsets_and_the_bus_cuts_its_answer() -> None:
    bus = PortBus()
    device = Recorder(0x1234)
    bus.register(range(0x3F8, 0x400), device)
    assert bus.read(0x3FD, 1) == 0x34
    assert bus.read(0x3F8, 2) == 0x1234
    bus.write(0x3FF, 1, 7)
    assert device.seen == [(5, 1), (0, 2), (7, 1, 7)]
    assert bus.read(0x3F7, 1) == 0xFF
    assert bus.read(0x400, 1) == 0xFF


def test_taken_ports_are_refused_whole() -> None:
    bus = PortBus()
    bus.register(range(0x64, 0x65), Recorder())
    with pytest.raises(LocalProtocolError, match="0x64"):
        bus.register(range(0x60, 0x68), Recorder())
    assert bus.read(0x60, 1) == 0xFF


@pytest.mark.parametrize("ports", [range(0), range(-1, 2), range(0xFFFF, 0x10001), range(0, 8, 2)])
def test_not_ports(ports: range) -> None:
    with pytest.raises(LocalProtocolError):
        PortBus().register(ports, Recorder())


def test_shared_line_is_up_while_any_source_is() -> None:
    levels: list[int] = []
    line = SharedIrqLine(levels.append)
    first, second = line.source(), line.source()
    first(1)
    second(1)
    first(0)
    assert levels == [1]
    second(0)
    assert levels == [1, 0]
