"""A 16550A serial port.

The line is infinitely fast: a byte written to THR is sent at once, so THRE and TEMT are always
set, and a byte from the host enters the receive FIFO as soon as there is room. There is no time
in here; a receive FIFO below its trigger level therefore reports the character time-out at once.

Interrupts follow the data sheet (National Semiconductor PC16550D), which is what Linux's
``8250_port.c`` start-up tests look for: the THRE interrupt becomes pending when IER bit 1 goes
from 0 to 1 and after each byte sent, and is cleared by reading it from IIR.

Output is collected and handed to the sink in batches: at each newline, whenever the driver writes
IER (drivers do so when they finish a burst, which keeps prompts prompt), after
:data:`OUTPUT_BATCH` bytes, and on :meth:`Uart.flush`. KVM may deliver THR writes late but never
out of order with other exits of that port, so nothing here depends on when they come.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

FIFO_SIZE = 16
INPUT_QUEUE_SIZE = 4096
OUTPUT_BATCH = 1024


class Register(IntEnum):
    """Offsets of the eight registers; three of them change with direction or DLAB."""

    RBR_THR_DLL = 0
    IER_DLM = 1
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


class Ier(IntFlag):
    """Interrupt enable register."""

    RECEIVED_DATA = 1 << 0
    THR_EMPTY = 1 << 1
    LINE_STATUS = 1 << 2
    MODEM_STATUS = 1 << 3
    ALL = 0x0F


class Iir(IntEnum):
    """Interrupt identification, highest priority first; FIFO mode adds :data:`IIR_FIFOS`."""

    LINE_STATUS = 0x06
    RECEIVED_DATA = 0x04
    CHARACTER_TIMEOUT = 0x0C
    THR_EMPTY = 0x02
    MODEM_STATUS = 0x00
    NONE = 0x01


IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 1 << 0, 1 << 1
FCR_TRIGGER_LEVELS = (1, 4, 8, 14)
LCR_DLAB = 1 << 7
MCR_OUT2, MCR_LOOPBACK = 1 << 3, 1 << 4
LSR_DATA_READY, LSR_OVERRUN, LSR_TRANSMITTER_EMPTY = 1 << 0, 1 << 1, 0x60
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7


@dataclass(slots=True)
class UartState:
    """Everything a UART must carry over a save; *queue* is input the FIFO had no room for yet."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    divisor: int = 12
    overrun: bool = False
    thr_empty_pending: bool = False
    modem_lines: int = MSR_DCD | MSR_DSR | MSR_CTS
    modem_deltas: int = 0
    fifo: deque[int] = field(default_factory=deque)
    queue: deque[int] = field(default_factory=deque)


class Uart:
    """One serial port; a :class:`hvhost.chipset.ports.PortDevice` of eight byte registers.

    *set_irq* gets the interrupt line's new level (0 or 1) on each change; *sink* gets output, in
    order. Both are called with the port's lock held, from whatever thread drives the port.
    """

    def __init__(
        self,
        set_irq: Callable[[int], None],
        sink: Callable[[bytes], None],
        *,
        on_room: Callable[[], None] | None = None,
    ) -> None:
        self._set_irq = set_irq
        self._sink = sink
        self._on_room = on_room
        self._lock = threading.RLock()
        self._output = bytearray()
        self._line = 0
        self._refused = False
        self.state = UartState()

    # -- the host's side

    def feed(self, data: bytes) -> int:
        """Queue input for the guest; returns how many bytes were taken, possibly 0.

        After a short count, ``on_room`` is called once the guest has read what was queued.
        """
        with self._lock:
            state = self.state
            room = INPUT_QUEUE_SIZE - len(state.queue)
            taken = data[:room]
            self._refused = self._refused or len(taken) < len(data)
            state.queue.extend(taken)
            self._fill_fifo()
            self._update_irq()
            return len(taken)

    def flush(self) -> None:
        """Hand all output collected so far to the sink."""
        with self._lock:
            if self._output:
                batch = bytes(self._output)
                self._output.clear()
                self._sink(batch)

    def reset(self) -> None:
        """Power-on state; output is flushed, input the guest has not read is dropped."""
        with self._lock:
            self.flush()
            self.state = UartState()
            self._update_irq()

    # -- the guest's side

    def read(self, offset: int, size: int) -> int:
        """One register; the upper bytes of a wide access are 0."""
        with self._lock:
            return self._read(offset)

    def write(self, offset: int, size: int, value: int) -> None:
        """One register; only the low byte of a wide access counts."""
        with self._lock:
            self._write(offset, value & 0xFF)

    def _read(self, offset: int) -> int:
        state = self.state
        if offset == Register.LSR:
            value = LSR_TRANSMITTER_EMPTY
            if state.fifo:
                value |= LSR_DATA_READY
            if state.overrun:
                value |= LSR_OVERRUN
                state.overrun = False
                self._update_irq()
            return value
        if offset == Register.RBR_THR_DLL:
            if state.lcr & LCR_DLAB:
                return state.divisor & 0xFF
            value = state.fifo.popleft() if state.fifo else 0
            self._fill_fifo()
            self._update_irq()
            return value
        if offset == Register.IER_DLM:
            return state.divisor >> 8 if state.lcr & LCR_DLAB else state.ier
        if offset == Register.IIR_FCR:
            identification = self._pending()
            if identification is Iir.THR_EMPTY:
                state.thr_empty_pending = False
                self._update_irq()
            return identification | (IIR_FIFOS if state.fcr & FCR_ENABLE else 0)
        if offset == Register.MSR:
            value = state.modem_lines | state.modem_deltas
            state.modem_deltas = 0
            self._update_irq()
            return value
        if offset == Register.LCR:
            return state.lcr
        if offset == Register.MCR:
            return state.mcr
        return state.scr

    def _write(self, offset: int, value: int) -> None:
        state = self.state
        if offset == Register.RBR_THR_DLL:
            if state.lcr & LCR_DLAB:
                state.divisor = state.divisor & 0xFF00 | value
                return
            self._transmit(value)
        elif offset == Register.IER_DLM:
            if state.lcr & LCR_DLAB:
                state.divisor = state.divisor & 0xFF | value << 8
                return
            enabled = value & ~state.ier
            state.ier = value & Ier.ALL
            if enabled & Ier.THR_EMPTY:
                state.thr_empty_pending = True
            self.flush()
        elif offset == Register.IIR_FCR:
            if (value ^ state.fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER:
                state.fifo.clear()
            state.fcr = value & (FCR_ENABLE | 0xC0) if value & FCR_ENABLE else 0
            self._fill_fifo()
        elif offset == Register.LCR:
            state.lcr = value
        elif offset == Register.MCR:
            state.mcr = value & 0x1F
            self._update_modem_lines()
            self._fill_fifo()
        elif offset == Register.SCR:
            state.scr = value
        self._update_irq()

    def _transmit(self, value: int) -> None:
        state = self.state
        state.thr_empty_pending = True
        if state.mcr & MCR_LOOPBACK:
            if len(state.fifo) < self._fifo_size():
                state.fifo.append(value)
            else:
                state.overrun = True
            return
        self._output.append(value)
        if value == 0x0A or len(self._output) >= OUTPUT_BATCH:
            self.flush()

    def _fifo_size(self) -> int:
        return FIFO_SIZE if self.state.fcr & FCR_ENABLE else 1

    def _fill_fifo(self) -> None:
        """Move queued input into the FIFO; the host never overruns it."""
        state = self.state
        if state.mcr & MCR_LOOPBACK:  # the receiver is cut off from the line
            return
        size = self._fifo_size()
        while state.queue and len(state.fifo) < size:
            state.fifo.append(state.queue.popleft())
        if self._refused and not state.queue:
            self._refused = False
            if self._on_room is not None:
                self._on_room()

    def _update_modem_lines(self) -> None:
        state = self.state
        if state.mcr & MCR_LOOPBACK:  # DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD
            mcr = state.mcr
            lines = (mcr & 0x01) << 5 | (mcr & 0x02) << 3 | (mcr & 0x0C) << 4
        else:
            lines = MSR_DCD | MSR_DSR | MSR_CTS
        changed = lines ^ state.modem_lines
        deltas = changed >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        if changed & MSR_RI and not lines & MSR_RI:
            deltas |= MSR_TERI
        state.modem_deltas |= deltas
        state.modem_lines = lines

    def _pending(self) -> Iir:
        state = self.state
        ier = state.ier
        if state.overrun and ier & Ier.LINE_STATUS:
            return Iir.LINE_STATUS
        if state.fifo and ier & Ier.RECEIVED_DATA:
            trigger = FCR_TRIGGER_LEVELS[state.fcr >> 6] if state.fcr & FCR_ENABLE else 1
            if len(state.fifo) >= trigger:
                return Iir.RECEIVED_DATA
            return Iir.CHARACTER_TIMEOUT
        if state.thr_empty_pending and ier & Ier.THR_EMPTY:
            return Iir.THR_EMPTY
        if state.modem_deltas and ier & Ier.MODEM_STATUS:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _update_irq(self) -> None:
        # On a PC the line reaches the interrupt controller only through OUT2, and in loopback
        # mode the OUT pins are inactive.
        gate = self.state.mcr & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2
        line = int(gate and self._pending() is not Iir.NONE)
        if line != self._line:
            self._line = line
            self._set_irq(line)
