"""One power-on of a machine: its board, and the bus in the board's socket.

A reset makes a new computer: nothing of the old one is left, as on real hardware.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hvhost.errors import HvHostError
from hvhost.kvm.constants import KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE
from hvhost.kvm.transport import Handle, OutEvent
from hvhost.kvm.vcpu import Vcpu
from hvhost.kvm.vm import SintRoute, Vm
from hvhost.machine.board import Board, Plug
from hvhost.machine.loop import Loop
from hvhost.machine.model import CrashReport, ProcessorInfo, ProcessorState, paused_error
from hvhost.partition.crash import CrashRegisters
from hvhost.partition.hang import hang
from hvhost.partition.hypercall import Hypercalls
from hvhost.partition.memory import MemoryRegion
from hvhost.partition.msrs import HV_X64_MSR_GUEST_OS_ID
from hvhost.partition.standstill import Standstill
from hvhost.partition.synic import VMBUS_MESSAGE_SINT, Synic
from hvhost.vmbus.channel import Channel, ChannelDevice
from hvhost.vmbus.server import VmbusServer

log = logging.getLogger(__name__)

#: Channels whose signals KVM takes itself; a guest with hundreds of sockets has more channels.
MAXIMUM_SIGNALS = 256
FIRST_SYNIC_GSI = 32
_SLEEP_S5 = 5
_PROCESSOR_STATES = {
    KVM_MP_STATE_RUNNABLE: ProcessorState.RUNNING,
    KVM_MP_STATE_HALTED: ProcessorState.HALTED,
}


@dataclass(frozen=True, slots=True)
class Notices:
    """What a computer tells its machine; called on any thread, with the computer's lock held."""

    event: Callable[[str, str], None]
    """Kind and detail of a :class:`hvhost.machine.model.MachineEvent`."""
    crashed: Callable[[CrashReport], None]
    power_off: Callable[[], None]
    reset: Callable[[str], None]
    failed: Callable[[str], None]


class BusPort:
    """The bus's way to the guest: SynIC pages one way, signals the other."""

    def __init__(self, vm: Vm, loop: Loop, lock: threading.RLock) -> None:
        self._vm = vm
        self._loop = loop
        self._lock = lock
        self.synics: list[Synic] = []
        self._signals: dict[int, Handle] = {}

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> None:
        self.synics[vp].post(message_type, payload)

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        self.synics[vp].signal(sint, flag)

    def connect_signal(self, connection_id: int, channel: Channel) -> None:
        if len(self._signals) >= MAXIMUM_SIGNALS:
            return  # the signal arrives as a hypercall, which costs an exit
        if channel.elsewhere is not None:
            event = self._vm.transport.signal(self._loop, channel.elsewhere.signal)
            self._connect(connection_id, event)
            return

        def signalled() -> None:
            with self._lock:
                if channel.process():
                    self._loop.call_soon_threadsafe(signalled)

        self._connect(connection_id, self._vm.in_event(self._loop, signalled))

    def _connect(self, connection_id: int, event: Handle) -> None:
        self._vm.connect_hyperv_signal(connection_id, event)
        self._signals[connection_id] = event

    def disconnect_signal(self, connection_id: int) -> None:
        event = self._signals.pop(connection_id, None)
        if event is not None:
            self._vm.disconnect_hyperv_signal(connection_id)
            self._vm.transport.release(event)


class Computer:
    """One boot of one machine: a board and its bus, in touch after :meth:`start`."""

    def __init__(
        self,
        board: Board,
        loop: Loop,
        devices: Sequence[ChannelDevice],
        serial_sinks: Sequence[Callable[[bytes], None]],
        notices: Notices,
    ) -> None:
        self.config = board.config
        self.lock = board.lock
        self.memory = board.memory
        self.uarts = board.uarts
        self.processors = board.processors
        self.hot_add = board.layout.hot_add
        self._board = board
        self._vm = board.vm
        self._notices = notices
        self._loop = loop
        self._over = False
        #: Whether it stands still by the user's wish; written with :attr:`lock` held.
        self.paused = False
        #: Bytes that were given back to the computer, and of them those the guest told to be free.
        self.discarded_bytes = self.reported_bytes = 0
        self._plugged = self.hot_add.start
        self.transport = self._vm.transport
        self.memory_written = self.transport.memory_written
        #: Called with each piece of RAM that is plugged, before the guest knows of it.
        self.on_memory: Callable[[MemoryRegion], None] = lambda region: None

        port = BusPort(self._vm, loop, self.lock)
        self.synics = port.synics
        #: What raises each VP's interrupt, once its event flags are set.
        self.event_lines: list[OutEvent] = []
        port.synics += self._wire_synics()
        self.bus = VmbusServer(
            self.memory, port, on_event=notices.event, processors=self.config.cpus
        )
        for device in devices:
            self.bus.add_device(device)
        self._plug = Plug(
            hypercall=Hypercalls(
                self.memory, self.bus.post_message, self.bus.signal, self._discarded
            ).call,
            synic=lambda vp, control, flags, messages: port.synics[vp].registers_changed(
                control, flags, messages
            ),
            msrs=CrashRegisters(self.memory, notices.crashed),
            sleep=self._sleep,
            reset=self._reset,
            failed=self._failed,
            serial=serial_sinks[: self.config.serial_ports],
        )
        #: Pauses the computer; without :attr:`lock`, which a processor may be waiting for.
        self.standstill = Standstill(self.processors, self._vm)

    # --- building ------------------------------------------------------------------------------

    def _wire_synics(self) -> list[Synic]:
        """Two lines a VP; KVM reports a message's end on the one with the higher number."""
        routes, pairs = [], []
        for vp in range(self.config.cpus):
            gsi = FIRST_SYNIC_GSI + 2 * vp
            routes += [
                SintRoute(gsi, vp, VMBUS_MESSAGE_SINT),
                SintRoute(gsi + 1, vp, VMBUS_MESSAGE_SINT),
            ]
            pairs.append((vp, gsi))
        self._vm.set_routes(routes)
        synics: list[Synic] = []
        for vp, gsi in pairs:
            taken = self._vm.in_event(self._loop, lambda vp=vp: self._message_taken(synics[vp]))  # type: ignore[misc]
            event_line = self._vm.irq_event(gsi)
            self.event_lines.append(event_line)
            message_line = self._vm.irq_event(gsi + 1, resample=taken)
            synics.append(Synic(self.memory, vp, message_line, event_line))
        return synics

    def _message_taken(self, synic: Synic) -> None:
        with self.lock:
            synic.deliver()

    # --- memory that comes and goes ------------------------------------------------------------

    def plug_memory(self, end: int) -> None:
        """Have RAM in :attr:`hot_add` up to the guest address *end*, a multiple of a page.

        The guest does not know of it until it is told. :class:`HvHostError` when KVM refuses.
        """
        start = self._plugged
        if end <= start:
            return
        offset = self.config.memory + start - self.hot_add.start
        size = end - start
        try:
            self._vm.add_memory(start, size, offset)
        except OSError as error:
            raise HvHostError(
                f"KVM takes no more memory for the machine ({error.strerror}); it keeps what it "
                "has."
            ) from error
        view = self._vm.transport.memory[offset : offset + size]
        region = MemoryRegion(start, view, offset)
        self.memory.append(region)
        self._plugged = end
        self.on_memory(region)

    def discard_memory(self, address: int, size: int) -> None:
        """The guest does not use these whole pages: the computer has them back, they read as zero.

        :class:`GuestMemoryError` unless they are RAM in one piece.
        """
        offset = self.memory.backing_offset(address, size)
        self._vm.transport.discard(offset, size)
        self.discarded_bytes += size

    def _discarded(self, address: int, size: int) -> None:
        self.discard_memory(address, size)
        self.reported_bytes += size

    def resident_memory(self) -> int:
        """Bytes of the computer's memory that the guest's RAM occupies."""
        plugged = self._plugged - self.hot_add.start
        return self._vm.transport.resident(0, self.config.memory + plugged)

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the guest have the bus."""
        self._board.plug(self._plug)

    def require_running(self) -> None:
        """:class:`HvHostError` if the guest stands still; for what needs its answer."""
        if self.paused:
            raise paused_error(self.config.name)

    def fail(self, why: str) -> None:
        """The machine cannot go on: something that it needs is gone; with :attr:`lock` held."""
        self._failed(why)

    def close(self) -> None:
        """Stop for good and give everything back; what the guest wrote last still comes out."""
        self._over = True
        self._board.stop()
        with self.lock, contextlib.suppress(OSError, HvHostError):
            self.bus.reset()
        self._board.close()

    def tick(self) -> None:
        """Now and then: output that the guest left behind without another exit."""
        self._board.flush()

    def nmi(self) -> None:
        """A non-maskable interrupt on VP 0."""
        processor = self.processors[0]
        processor.call(processor.vcpu.nmi)

    def hang(self) -> list[int]:
        """See :mod:`hvhost.partition.hang`."""
        return hang(self.processors, self.memory)

    def where(self) -> list[ProcessorInfo]:
        """Where every processor is just now."""
        return [processor.call(partial(_where, processor.vcpu)) for processor in self.processors]

    def reference_nanoseconds(self) -> int:
        """The clock from which the partition's reference counter is made ([TLFS] 12.4)."""
        return self._vm.clock_nanoseconds()

    def guest_os_id(self) -> int:
        """``HV_X64_MSR_GUEST_OS_ID`` as the guest wrote it."""
        processor = self.processors[0]
        return processor.call(lambda: processor.vcpu.msrs([HV_X64_MSR_GUEST_OS_ID])[0])

    def exits(self) -> dict[str, int]:
        """Exits of all processors by reason."""
        total: Counter[str] = Counter()
        for processor in self.processors:
            total.update(dict(processor.exits))  # a copy: its thread goes on counting
        return dict(total.most_common())

    # --- what the guest does -------------------------------------------------------------------

    def _sleep(self, state: int) -> None:
        if not self._over and state == _SLEEP_S5:
            self._over = True
            self._notices.event("sleep", "S5")
            self._notices.power_off()

    def _reset(self, why: str) -> None:
        if not self._over:
            self._over = True
            self._notices.reset(why)

    def _failed(self, why: str) -> None:
        if not self._over:  # several processors may stop at once: the first one tells
            self._over = True
            self._notices.failed(why)


def _where(vcpu: Vcpu) -> ProcessorInfo:
    registers = vcpu.registers()
    return ProcessorInfo(
        index=vcpu.index,
        state=_PROCESSOR_STATES.get(vcpu.mp_state(), ProcessorState.NOT_STARTED),
        rip=registers.rip,
        rflags=registers.rflags,
        ring=vcpu.special_registers().segment("cs").selector & 3,
    )
