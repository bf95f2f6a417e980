"""What a guest lends for frames: sizes that are enough, and each one that is not."""

from __future__ import annotations

import os
import struct

import pytest

from hvhost.network import buffers
from hvhost.network.buffers import SECTION_SIZE
from hvhost.partition.memory import PAGE_SIZE
from simulated.frames import ethernet
from simulated.netvsc import MAC, NO_OFFLOAD, SEND_SECTION, NetvscDriver, nvsp, rndis_packet


def negotiated() -> NetvscDriver:
    driver = NetvscDriver(sections=64)
    driver.open()
    driver.negotiate()
    driver.configure()
    return driver


def lent(driver: NetvscDriver, size: int, offset: int = 0) -> int:
    """A list of pages for *size* bytes that begin *offset* bytes behind a page's start."""
    pages = driver.guest.allocate(-(-(offset + size) // PAGE_SIZE), scattered=True)
    handle, status = driver.guest.make_gpadl(1, [(size, offset, pages)])
    assert status == 0
    return handle


def test_a_send_buffer_holds_a_section_at_least() -> None:
    driver = negotiated()
    driver.tell(nvsp(104, lent(driver, SEND_SECTION - 1), 0))
    (fault,) = driver.guest.faults
    assert "a send buffer of 6143 bytes holds no section of 6144" in fault
    assert driver.adapter.state.send_buffer is None
    driver = negotiated()
    handle = lent(driver, SEND_SECTION)
    assert struct.unpack_from("<3I", driver.call(nvsp(104, handle, 0))) == (105, 1, SEND_SECTION)
    assert driver.adapter.state.send_buffer == handle


def test_a_section_is_filled_to_its_end() -> None:
    driver = NetvscDriver()
    driver.start()
    data = ethernet(0x1234, os.urandom(SEND_SECTION - 44 - 14))
    for section in (0, 20, 0):
        driver.send(rndis_packet(data), section=section)
    assert driver.wire.sent == [NO_OFFLOAD + data] * 3
    driver.channel.write(nvsp(107, 0, 21, 100))
    (fault,) = driver.guest.faults
    assert "100 bytes of section 21 of 21" in fault


@pytest.mark.parametrize("sections", [0, 1])
def test_a_receive_buffer_with_too_few_sections(sections: int) -> None:
    """A frame takes one, and an answer must find room beside it."""
    driver = negotiated()
    driver.tell(nvsp(101, lent(driver, SECTION_SIZE * (sections + 1) - 4096), 0xCAFE))
    (fault,) = driver.guest.faults
    assert f"holds {sections} sections of {SECTION_SIZE}, which is too few" in fault
    assert driver.adapter.state.receive_buffer is None


def test_a_receive_buffer_that_is_just_enough() -> None:
    driver = negotiated()
    answer = driver.call(nvsp(101, lent(driver, SECTION_SIZE * 2), 0xCAFE))
    sections = (SECTION_SIZE, 2, 2 * SECTION_SIZE)
    assert struct.unpack_from("<7I", answer) == (102, 1, 1, 0, *sections)


def test_a_receive_buffer_begins_at_a_page() -> None:
    driver = negotiated()
    driver.tell(nvsp(101, lent(driver, SECTION_SIZE * 2, offset=8), 0xCAFE))
    (fault,) = driver.guest.faults
    assert "does not start at a page" in fault


def test_of_a_very_large_receive_buffer_the_first_sections_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "MAXIMUM_SECTIONS", 7)
    driver = NetvscDriver()
    driver.start()
    assert driver.sections == 7
    data = ethernet(0x1234, bytes(60), to=MAC)
    driver.wire.incoming.extend([NO_OFFLOAD + data] * 30)
    assert len(driver.pull()) == 30


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 4097, 8191, 8192, 9000])
def test_a_span_reads_across_its_pieces(start: int) -> None:
    data = os.urandom(10_000)
    memory = memoryview(bytearray(data))
    span = buffers.Span([memory[:4096], memory[4096:8192], memory[8192:]])
    assert span.length == 10_000
    for length in (0, 1, 95, 1000, 10_000 - start):
        wanted = data[start : start + length]
        assert span.read(start, length) == wanted
        assert b"".join(span.slice(start, length)) == wanted
    assert span.read(start, 20_000) == data[start:] and span.read(10_000, 5) == b""
    assert buffers.Span([]).read(0, 10) == b""
