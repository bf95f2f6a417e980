"""Hypercalls that KVM hands to us ([TLFS] chapter 3 and 11.10): posted messages and signals.

Also, from Linux 6.3 on, the extended ones: with HvExtCallMemoryHeatHint a guest tells of memory
that it does not use (names as in ``asm-generic/hyperv-tlfs.h``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from hvhost.errors import GuestMemoryError
from hvhost.partition.memory import PAGE_SHIFT, PAGE_SIZE, GuestMemory
from hvhost.partition.synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT
from hvhost.wire import U32, Record


class HypercallCode(IntEnum):
    """Call codes ([TLFS] appendix A)."""

    POST_MESSAGE = 0x005C
    SIGNAL_EVENT = 0x005D
    EXT_CALL_QUERY_CAPABILITIES = 0x8001
    EXT_CALL_MEMORY_HEAT_HINT = 0x8003


class HypercallStatus(IntEnum):
    """``HV_STATUS`` ([TLFS] appendix B)."""

    SUCCESS = 0x0000
    INVALID_HYPERCALL_CODE = 0x0002
    INVALID_HYPERCALL_INPUT = 0x0003
    INVALID_ALIGNMENT = 0x0004
    INVALID_PARAMETER = 0x0005
    INVALID_CONNECTION_ID = 0x0012


FAST = 1 << 16
EXT_CAPABILITY_MEMORY_COLD_DISCARD_HINT = 1 << 8
EXT_MEMORY_HEAT_HINT_TYPE_COLD_DISCARD = 2
#: Ranges of one hint: what fits a page.
MEMORY_HINT_RANGES_MAX = (PAGE_SIZE - 8) // 8
_REP_COUNT_SHIFT, _REP_COUNT_MASK = 32, 0xFFF
# union hv_gpa_page_range: pages beyond the first, whether they have 2 MiB, or even 1 GiB.
_ADDITIONAL_PAGES, _LARGE_PAGE, _HUGE_PAGE = 0x7FF, 1 << 11, 1 << 12
_LARGE_SHIFT = 21
_CONNECTION_ID_MASK = 0x00FFFFFF
_MESSAGE_TYPE_CHANNEL = 1


@dataclass(frozen=True, slots=True)
class PostMessageInput(Record):
    """``hv_input_post_message`` without its payload ([TLFS] 11.10.1)."""

    connection_id: U32
    reserved: U32
    message_type: U32
    payload_size: U32


class Hypercalls:
    """Decodes what ``KVM_EXIT_HYPERV_HCALL`` brings and calls the bus.

    *post_message* takes a connection id and a payload of up to 240 bytes, *signal_event* a
    connection id; both return an ``HV_STATUS``. *discard* takes address and size of RAM that the
    guest does not use, and raises :class:`GuestMemoryError` for what is none.
    """

    def __init__(
        self,
        memory: GuestMemory,
        post_message: Callable[[int, bytes], int],
        signal_event: Callable[[int], int],
        discard: Callable[[int, int], None],
    ) -> None:
        self._memory = memory
        self._post_message = post_message
        self._signal_event = signal_event
        self._discard = discard

    def call(self, value: int, parameter: int, output: int = 0) -> int:
        """Result of hypercall input *value* with its two parameters (GPAs unless fast)."""
        code = value & 0xFFFF
        try:
            if code == HypercallCode.POST_MESSAGE:
                return self._post(value, parameter)
            if code == HypercallCode.SIGNAL_EVENT:
                if not value & FAST:
                    if parameter & 7:
                        return HypercallStatus.INVALID_ALIGNMENT
                    parameter = self._memory.load32(parameter)
                return self._signal_event(parameter & _CONNECTION_ID_MASK)
            if code == HypercallCode.EXT_CALL_QUERY_CAPABILITIES:
                if value & FAST:
                    return HypercallStatus.INVALID_HYPERCALL_INPUT
                self._memory.store64(output, EXT_CAPABILITY_MEMORY_COLD_DISCARD_HINT)
                return HypercallStatus.SUCCESS
            if code == HypercallCode.EXT_CALL_MEMORY_HEAT_HINT:
                return self._memory_hint(value, parameter)
        except GuestMemoryError:
            return HypercallStatus.INVALID_PARAMETER
        return HypercallStatus.INVALID_HYPERCALL_CODE

    def _memory_hint(self, value: int, address: int) -> int:
        """``struct hv_memory_hint``: a type, then ranges of pages."""
        count = value >> _REP_COUNT_SHIFT & _REP_COUNT_MASK
        if value & FAST or not 0 < count <= MEMORY_HINT_RANGES_MAX:
            return HypercallStatus.INVALID_HYPERCALL_INPUT
        if address & 7:
            return HypercallStatus.INVALID_ALIGNMENT
        words = struct.unpack(f"<{1 + count}Q", self._memory.read(address, 8 + 8 * count))
        if words[0] != EXT_MEMORY_HEAT_HINT_TYPE_COLD_DISCARD:
            return HypercallStatus.INVALID_PARAMETER
        for done, word in enumerate(words[1:]):
            shift = _LARGE_SHIFT if word & _LARGE_PAGE else PAGE_SHIFT
            try:
                if word & _LARGE_PAGE and word & _HUGE_PAGE:
                    raise GuestMemoryError("a hint of pages of 1 GiB, which nobody sends.")
                self._discard(word >> shift << shift, (word & _ADDITIONAL_PAGES) + 1 << shift)
            except GuestMemoryError:
                return HypercallStatus.INVALID_PARAMETER | done << _REP_COUNT_SHIFT
        return HypercallStatus.SUCCESS | count << _REP_COUNT_SHIFT

    def _post(self, value: int, address: int) -> int:
        if value & FAST:
            return HypercallStatus.INVALID_HYPERCALL_INPUT
        if address & 7:
            return HypercallStatus.INVALID_ALIGNMENT
        size = PostMessageInput.wire_size()
        data = self._memory.read(address, size + HV_MESSAGE_PAYLOAD_BYTE_COUNT)  # read once
        header = PostMessageInput.unpack(data)
        if (
            header.payload_size > HV_MESSAGE_PAYLOAD_BYTE_COUNT
            or header.message_type != _MESSAGE_TYPE_CHANNEL
        ):
            return HypercallStatus.INVALID_PARAMETER
        return self._post_message(
            header.connection_id & _CONNECTION_ID_MASK, data[size : size + header.payload_size]
        )
