"""The host's side of the synthetic interrupt controller ([TLFS] chapter 11).

KVM keeps the SynIC's registers and injects its interrupts; what is written into the guest's
message and event-flag pages is ours. A message waits here until its slot is free; KVM tells of an
end of message (or of interrupt) by the resample event of the route.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from hvhost.errors import GuestMemoryError, LocalProtocolError
from hvhost.partition.atomic import SharedBytes, barrier
from hvhost.partition.memory import GuestMemory

log = logging.getLogger(__name__)

HV_MESSAGE_SIZE = 256
HV_MESSAGE_PAYLOAD_BYTE_COUNT = 240
HV_EVENT_FLAGS_BYTE_COUNT = 256
HV_SYNIC_SINT_COUNT = 16
HV_MESSAGE_FLAG_PENDING = 0x01
VMBUS_MESSAGE_SINT = 2
MAXIMUM_WARNINGS = 100  # of one VP and boot: a guest must not fill the log
_ENABLED = 1
_PAGE = ~0xFFF
_EVENT_FLAGS_PAGE_SIZE = HV_SYNIC_SINT_COUNT * HV_EVENT_FLAGS_BYTE_COUNT
_MAXIMUM_QUEUED = 4096
_HEADER = struct.Struct("<BB2xQ")  # payload size, flags, sender: all but the type
_TYPE_SIZE = 4


class Line(Protocol):
    """Something that raises an interrupt."""

    def trigger(self) -> None: ...


@dataclass(slots=True)
class SynicState:
    """What a guest told its SynIC, and the messages it has not taken yet."""

    control: int = 0
    event_flags_page: int = 0
    message_page: int = 0
    queue: deque[tuple[int, bytes]] = field(default_factory=deque)


class Synic:
    """One VP's message and event-flag pages for :data:`VMBUS_MESSAGE_SINT`.

    The caller holds the machine's lock. A page that is not in RAM is a log line, never an error.
    """

    def __init__(self, memory: GuestMemory, vp: int, message_line: Line, event_line: Line) -> None:
        self.state = SynicState()
        self.vp = vp
        self._warnings = 0
        self._memory = memory
        self._event_flags: SharedBytes | None = None  # the page at _event_flags_at
        self._event_flags_at = 0
        self._message_line = message_line
        self._event_line = event_line
        #: Told where the event flags are, with each change, for who signals from another process.
        self.on_event_flags: Callable[[int], None] = lambda page: None

    def registers_changed(self, control: int, event_flags_page: int, message_page: int) -> None:
        """The guest wrote SCONTROL, SIEFP or SIMP (``KVM_EXIT_HYPERV_SYNIC``)."""
        self.state.control = control
        self.state.event_flags_page = event_flags_page
        self.state.message_page = message_page
        self.on_event_flags(event_flags_page)
        self.deliver()

    def post(self, message_type: int, payload: bytes) -> None:
        """Queue a message ([TLFS] 11.8.2) and deliver it when its slot is free.

        :class:`LocalProtocolError` for a payload above 240 bytes.
        """
        if len(payload) > HV_MESSAGE_PAYLOAD_BYTE_COUNT:
            raise LocalProtocolError(
                f"a SynIC message cannot carry {len(payload)} bytes; split it."
            )
        if len(self.state.queue) >= _MAXIMUM_QUEUED:
            self._warn(f"takes no messages: message of type {message_type} dropped")
            return
        self.state.queue.append((message_type, payload))
        self.deliver()

    def deliver(self) -> None:
        """Put the next message into the slot, if there is one and the slot is free."""
        queue, page = self.state.queue, self.state.message_page
        if not queue or not page & _ENABLED:
            return
        slot = (page & _PAGE) + HV_MESSAGE_SIZE * VMBUS_MESSAGE_SINT
        memory = self._memory
        try:
            if memory.load32(slot):
                # Ask for an end of message, then look again: the guest may just have freed it.
                memory.view(slot + 5, 1)[0] |= HV_MESSAGE_FLAG_PENDING
                barrier()
                if memory.load32(slot):
                    return
            message_type, payload = queue.popleft()
            more = HV_MESSAGE_FLAG_PENDING if queue else 0
            body = _HEADER.pack(len(payload), more, 0) + payload
            memory.write(slot + _TYPE_SIZE, body)
            memory.store32(slot, message_type)  # last: this is what the guest polls
        except GuestMemoryError as error:
            queue.clear()
            self._warn(f"message page: {error}")
            return
        self._message_line.trigger()

    def signal(self, sint: int, flag: int) -> None:
        """Set event flag *flag* (0..2047) of *sint* ([TLFS] 11.8.3) and raise the interrupt."""
        if not 0 <= sint < HV_SYNIC_SINT_COUNT or not 0 <= flag < 8 * HV_EVENT_FLAGS_BYTE_COUNT:
            raise LocalProtocolError(f"SINT {sint} has no event flag {flag}; use 0 to 2047.")
        page = self.state.event_flags_page
        if not page & _ENABLED:
            return
        flags = self._event_flags
        if flags is None or page != self._event_flags_at:
            try:
                view = self._memory.view(page & _PAGE, _EVENT_FLAGS_PAGE_SIZE)
            except GuestMemoryError as error:
                self._warn(f"event flags page: {error}")
                return
            flags = self._event_flags = SharedBytes(view)
            self._event_flags_at = page
        flags.set_bits(HV_EVENT_FLAGS_BYTE_COUNT * sint + (flag >> 3), 1 << (flag & 7))
        self._event_line.trigger()

    def _warn(self, what: str) -> None:
        self._warnings += 1
        if self._warnings <= MAXIMUM_WARNINGS:
            log.warning("VP %d: %s", self.vp, what)

    def reset(self) -> None:
        """As after power-on."""
        self.state = SynicState()
