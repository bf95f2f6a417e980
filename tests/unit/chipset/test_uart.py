from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvhost.chipset.uart import (
    FIFO_SIZE,
    INPUT_QUEUE_SIZE,
    LSR_DATA_READY,
    LSR_OVERRUN,
    LSR_TRANSMITTER_EMPTY,
    OUTPUT_BATCH,
    Uart,
)

THR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
RDI, THRI, RLSI, MSI = 1, 2, 4, 8
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16


class Port:
    """A UART with its line and output recorded."""

    def __init__(self, on_room: Callable[[], None] | None = None) -> None:
        self.levels: list[int] = []
        self.batches: list[bytes] = []
        self.uart = Uart(self.levels.append, self.batches.append, on_room=on_room)

    def read(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def write_all(self, data: bytes) -> None:
        for byte in data:
            self.write(THR, byte)

    @property
    def line(self) -> int:
        return self.levels[-1] if self.levels else 0


@pytest.fixture
def port() -> Port:
    return Port()


def test_output_goes_out_by_lines(port: Port) -> None:
    port.write_all(b"one\r\ntwo\r\ntail")
    assert port.batches == [b"one\r\n", b"two\r\n"]
    port.uart.flush()
    assert port.batches[-1] == b"tail"
    port.uart.flush()
    assert len(port.batches) == 3


def test_output_tail_goes_out_when_the_driver_finishes(port: Port) -> None:
    port.write(IER, THRI)
    port.write_all(b"login: ")
    assert port.batches == []
    port.write(IER, RDI)
    assert port.batches == [b"login: "]


def test_output_batch_is_bounded(port: Port) -> None:
    port.write_all(b"x" * (OUTPUT_BATCH + 1))
    assert port.batches == [b"x" * OUTPUT_BATCH]


def test_divisor_latch_hides_data_and_ier(port: Port) -> None:
    port.write(IER, RDI)
    port.write(LCR, 0x83)
    port.write(0, 0x34)
    port.write(1, 0x12)
    assert (port.read(0), port.read(1)) == (0x34, 0x12)
    port.write(LCR, 0x03)
    assert port.read(IER) == RDI
    assert port.read(LCR) == 0x03
    port.uart.flush()
    assert port.batches == []


def test_reserved_bits_do_not_read_back(port: Port) -> None:
    port.write(IER, 0xFF)
    port.write(MCR, 0xFF)
    port.write(SCR, 0xA5)
    assert (port.read(IER), port.read(MCR), port.read(SCR)) == (0x0F, 0x1F, 0xA5)
    for read_only in (LSR, MSR):
        port.write(read_only, 0x5A)
    assert port.read(SCR) == 0xA5


def test_transmitter_is_always_empty(port: Port) -> None:
    port.write_all(b"abc")
    assert port.read(LSR) == LSR_TRANSMITTER_EMPTY == 0x60


def test_iir_shows_the_fifos(port: Port) -> None:
    assert port.read(IIR) == 0x01
    port.write(FCR, 0x01)
    assert port.read(IIR) == 0xC1
    port.write(FCR, 0x00)
    assert port.read(IIR) == 0x01


def test_linux_startup_thre_test(port: Port) -> None:
    """8250_port.c: enabling THRI must interrupt again each time it goes from 0 to 1."""
    port.write(MCR, OUT2)
    port.write(FCR, 0x01)
    for _ in range(2):
        port.write(IER, THRI)
        assert port.line == 1
        assert port.read(IIR) == 0xC2
        assert port.line == 0
        assert port.read(IIR) == 0xC1
        port.write(IER, 0)
    port.write(IER, THRI)
    port.read(IIR)
    port.write(IER, THRI)  # no edge, no interrupt
    assert port.read(IIR) == 0xC1


def test_each_byte_sent_interrupts(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(IER, THRI)
    port.read(IIR)
    assert port.line == 0
    port.write(THR, 0x41)
    assert port.line == 1
    assert port.read(IIR) == 0x02


def test_line_needs_out2(port: Port) -> None:
    port.write(IER, THRI)
    assert port.levels == []
    port.write(MCR, OUT2)
    assert port.levels == [1]
    port.write(MCR, OUT2 | LOOP)
    assert port.levels == [1, 0]
    port.write(MCR, 0)
    assert port.levels == [1, 0]


def test_receive_below_and_at_the_trigger_level(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(FCR, 0x81)  # trigger at 8
    port.write(IER, RDI)
    assert port.uart.feed(b"1234567") == 7
    assert port.line == 1
    assert port.read(IIR) == 0xCC
    port.uart.feed(b"8")
    assert port.read(IIR) == 0xC4
    assert bytes(port.read(THR) for _ in range(8)) == b"12345678"
    assert port.line == 0
    assert port.read(LSR) & LSR_DATA_READY == 0
    assert port.read(THR) == 0


def test_without_fifo_each_byte_is_data_available(port: Port) -> None:
    port.write(IER, RDI)
    port.uart.feed(b"ab")
    assert port.read(IIR) == 0x04
    assert len(port.uart.state.fifo) == 1
    assert (port.read(THR), port.read(THR)) == (0x61, 0x62)


def test_long_input_waits_in_the_queue_and_never_overruns(port: Port) -> None:
    port.write(FCR, 0x01)
    data = bytes(range(256)) * 20
    taken = port.uart.feed(data)
    assert taken == INPUT_QUEUE_SIZE
    assert len(port.uart.state.fifo) == FIFO_SIZE
    received = bytearray()
    while port.read(LSR) & LSR_DATA_READY:
        assert not port.read(LSR) & LSR_OVERRUN
        received.append(port.read(THR))
    assert received == data[:taken]


def test_feed_takes_nothing_when_full_and_says_when_there_is_room() -> None:
    rooms: list[None] = []
    port = Port(on_room=lambda: rooms.append(None))
    port.write(FCR, 0x01)
    assert port.uart.feed(bytes(INPUT_QUEUE_SIZE)) == INPUT_QUEUE_SIZE
    assert port.uart.feed(bytes(FIFO_SIZE + 5)) == FIFO_SIZE
    assert port.uart.feed(b"x") == 0
    for _ in range(INPUT_QUEUE_SIZE + FIFO_SIZE):
        port.read(THR)
    assert len(rooms) == 1
    port.uart.feed(b"x")
    port.read(THR)
    assert len(rooms) == 1


def test_fifo_clear_drops_the_fifo_only(port: Port) -> None:
    port.write(FCR, 0x01)
    port.uart.feed(b"a" * FIFO_SIZE + b"b")
    port.write(FCR, 0x03)
    assert port.read(THR) == 0x62


def test_turning_the_fifo_off_clears_it(port: Port) -> None:
    port.write(FCR, 0x01)
    port.uart.feed(b"abc")
    port.write(FCR, 0x00)
    assert not port.read(LSR) & LSR_DATA_READY


def test_linux_counts_sixteen_bytes_of_fifo_in_loopback(port: Port) -> None:
    """8250_port.c, size_fifo: what comes back in loopback is the FIFO, and nothing leaks out."""
    port.write(FCR, 0x07)
    port.write(MCR, LOOP | RTS)
    port.write_all(bytes(range(256)))
    count = 0
    while port.read(LSR) & LSR_DATA_READY:
        assert port.read(THR) == count
        count += 1
    assert count == FIFO_SIZE
    port.uart.flush()
    assert port.batches == []


def test_loopback_overrun_interrupts_until_lsr_is_read(port: Port) -> None:
    port.write(IER, RLSI)
    port.write(MCR, LOOP)
    port.write_all(b"ab")
    assert port.read(IIR) == 0x06
    assert port.read(LSR) & LSR_OVERRUN
    assert port.read(IIR) == 0x01
    assert not port.read(LSR) & LSR_OVERRUN


def test_overrun_interrupts_only_when_enabled(port: Port) -> None:
    port.write(MCR, LOOP)
    port.write_all(b"ab")
    assert port.uart.state.overrun
    assert port.read(IIR) == 0x01


def test_input_waits_while_in_loopback(port: Port) -> None:
    port.write(MCR, LOOP)
    port.uart.feed(b"x")
    assert not port.read(LSR) & LSR_DATA_READY
    port.write(MCR, 0)
    assert port.read(THR) == 0x78


def test_modem_lines_and_linux_loopback_probe(port: Port) -> None:
    for outputs in (0, DTR, RTS | OUT1, OUT2):
        port.write(MCR, outputs)
        assert port.read(MSR) == 0xB0
    port.write(MCR, LOOP | OUT2 | RTS)
    assert port.read(MSR) & 0xF0 == 0x90
    port.write(MCR, LOOP | OUT1 | DTR)
    assert port.read(MSR) & 0xF0 == 0x60


def test_modem_deltas(port: Port) -> None:
    port.write(IER, MSI)
    assert port.read(IIR) == 0x01
    port.write(MCR, LOOP)  # CTS, DSR and DCD fall
    assert port.read(IIR) == 0x00
    assert port.read(MSR) == 0x0B
    assert port.read(IIR) == 0x01
    assert port.read(MSR) == 0x00
    port.write(MCR, LOOP | OUT1)  # RI rises: no trailing edge
    assert port.read(MSR) == 0x40
    port.write(MCR, LOOP)
    assert port.read(MSR) == 0x04


def test_interrupt_priority(port: Port) -> None:
    port.write(FCR, 0x01)
    port.write(MCR, LOOP)
    port.write_all(b"x" * (FIFO_SIZE + 1))
    port.write(IER, 0x0F)
    assert port.read(IIR) == 0xC6
    port.read(LSR)
    assert port.read(IIR) == 0xC4
    for _ in range(FIFO_SIZE):
        port.read(THR)
    assert port.read(IIR) == 0xC2
    assert port.read(IIR) == 0xC0
    port.read(MSR)
    assert port.read(IIR) == 0xC1


def test_reset_keeps_output_and_drops_the_line(port: Port) -> None:
    port.write(MCR, OUT2)
    port.write(IER, THRI)
    port.write(THR, 0x41)
    port.uart.feed(b"zzz")
    port.uart.reset()
    assert port.batches == [b"A"]
    assert port.line == 0
    assert not port.read(LSR) & LSR_DATA_READY
    assert port.read(MCR) == 0


ACCESSES = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(0, 7), st.just(b"")),
        st.tuples(st.just("write"), st.integers(0, 7), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("feed"), st.just(0), st.binary(max_size=40)),
    ),
    max_size=80,
)


@given(ACCESSES)
def test_any_guest_gets_consistent_answers(accesses: list[tuple[str, int, bytes]]) -> None:
    port = Port()
    for action, offset, data in accesses:
        if action == "read":
            assert 0 <= port.read(offset) <= 0xFF
        elif action == "write":
            port.uart.write(offset, len(data), int.from_bytes(data, "little"))
        else:
            assert port.uart.feed(data) == len(data)
        state = port.uart.state
        assert len(state.fifo) <= (FIFO_SIZE if state.fcr & 1 else 1)
        assert all(first != second for first, second in pairwise(port.levels))
        # The line is up exactly when IIR would name a cause and OUT2 lets it through.
        pending = port.uart._pending() != 0x01
        assert port.line == int(pending and state.mcr & (OUT2 | LOOP) == OUT2)


@given(st.binary(max_size=300), st.lists(st.binary(max_size=30), max_size=20), st.booleans())
def test_nothing_is_lost_or_reordered(output: bytes, inputs: list[bytes], fifo: bool) -> None:
    port = Port()
    port.write(FCR, 0x01 if fifo else 0)
    port.write(IER, RDI | THRI)
    received = bytearray()
    for data in inputs:
        port.uart.feed(data)
        if port.read(IIR) & 0x0F in (0x04, 0x0C):
            received.append(port.read(THR))
    port.write_all(output)
    while port.read(LSR) & LSR_DATA_READY:
        received.append(port.read(THR))
    port.uart.flush()
    assert received == b"".join(inputs)
    assert b"".join(port.batches) == output
