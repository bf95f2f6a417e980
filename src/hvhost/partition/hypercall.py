"""Hypercalls that KVM hands to us ([TLFS] chapter 3 and 11.10): posted messages and signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from hvhost.errors import GuestMemoryError
from hvhost.partition.memory import GuestMemory
from hvhost.partition.synic import HV_MESSAGE_PAYLOAD_BYTE_COUNT
from hvhost.wire import U32, Record


class HypercallCode(IntEnum):
    """Call codes ([TLFS] appendix A)."""

    POST_MESSAGE = 0x005C
    SIGNAL_EVENT = 0x005D


class HypercallStatus(IntEnum):
    """``HV_STATUS`` ([TLFS] appendix B)."""

    SUCCESS = 0x0000
    INVALID_HYPERCALL_CODE = 0x0002
    INVALID_HYPERCALL_INPUT = 0x0003
    INVALID_ALIGNMENT = 0x0004
    INVALID_PARAMETER = 0x0005
    INVALID_CONNECTION_ID = 0x0012


FAST = 1 << 16
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
    connection id; both return an ``HV_STATUS``.
    """

    def __init__(
        self,
        memory: GuestMemory,
        post_message: Callable[[int, bytes], int],
        signal_event: Callable[[int], int],
    ) -> None:
        self._memory = memory
        self._post_message = post_message
        self._signal_event = signal_event

    def call(self, value: int, parameter: int) -> int:
        """Result of hypercall input *value* with its first parameter (a GPA unless fast)."""
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
        except GuestMemoryError:
            return HypercallStatus.INVALID_PARAMETER
        return HypercallStatus.INVALID_HYPERCALL_CODE

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
