"""A KVM in memory: calls are recorded and answered, virtual processors follow a script.

A script is a generator that yields what the guest does and is sent what the VMM answered::

    def guest(kvm: FakeTransport) -> Script:
        seconds = yield In(0x71)
        yield Out(0x3F8, 1, b"A")

After its last step a processor halts until somebody kicks it.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.transport import EventLoop, Fixup, FixupKind, Handle
from hvhost.partition.cpuid import CpuidEntry

RUN_SIZE = 3 * 4096
UNION = 32
PIO_DATA = 4096
COALESCED_HEADER = 8
COALESCED_ENTRY = struct.Struct("<QIIQ")
_CPUID = struct.Struct("<7I12x")


class Step:
    """Something a guest does; puts itself into ``struct kvm_run`` and takes the answer out."""

    def leave(self, run: memoryview) -> int:
        """0, or the errno that KVM_RUN returns."""
        raise NotImplementedError

    def answer(self, run: memoryview) -> Any:
        """What the VMM left in ``struct kvm_run``."""
        return None


def _exit(run: memoryview, reason: int) -> None:
    run[8:12] = reason.to_bytes(4, "little")
    run[UNION : UNION + 256] = bytes(256)


@dataclass(frozen=True)
class Out(Step):
    port: int
    size: int
    data: bytes

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.IO)
        count = len(self.data) // self.size
        struct.pack_into("<BBHIQ", run, UNION, 1, self.size, self.port, count, PIO_DATA)
        run[PIO_DATA : PIO_DATA + len(self.data)] = self.data
        return 0


@dataclass(frozen=True)
class In(Step):
    port: int
    size: int = 1
    count: int = 1

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.IO)
        struct.pack_into("<BBHIQ", run, UNION, 0, self.size, self.port, self.count, PIO_DATA)
        run[PIO_DATA : PIO_DATA + 64] = b"\xa5" * 64
        return 0

    def answer(self, run: memoryview) -> bytes:
        data = bytes(run[PIO_DATA : PIO_DATA + 64])
        end = self.size * self.count
        assert data[end:] == b"\xa5" * (64 - end), "written beyond what was asked"
        return data[:end]


@dataclass(frozen=True)
class Mmio(Step):
    address: int
    length: int = 4
    is_write: bool = False

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.MMIO)
        struct.pack_into("<Q8sIB", run, UNION, self.address, bytes(8), self.length, self.is_write)
        return 0

    def answer(self, run: memoryview) -> bytes:
        return bytes(run[UNION + 8 : UNION + 8 + self.length])


@dataclass(frozen=True)
class Hypercall(Step):
    value: int
    first: int = 0
    second: int = 0

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.HYPERV)
        poison = 0xDEAD
        hcall = (k.KVM_EXIT_HYPERV_HCALL, self.value, poison, self.first, self.second)
        struct.pack_into("<I4xQQQQ", run, UNION, *hcall)
        return 0

    def answer(self, run: memoryview) -> int:
        return int.from_bytes(run[UNION + 16 : UNION + 24], "little")


@dataclass(frozen=True)
class SynicWrite(Step):
    control: int = 1
    event_flags_page: int = 0
    message_page: int = 0

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.HYPERV)
        values = (self.control, self.event_flags_page, self.message_page)
        struct.pack_into("<I4xI4xQQQ", run, UNION, k.KVM_EXIT_HYPERV_SYNIC, 0x40000080, *values)
        return 0


@dataclass(frozen=True)
class ReadMsr(Step):
    """Answered with the value, or None for a general protection fault."""

    index: int

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.X86_RDMSR)
        struct.pack_into("<B7xIIQ", run, UNION, 0x55, 4, self.index, 0xDEAD)
        return 0

    def answer(self, run: memoryview) -> int | None:
        error, _, _, value = struct.unpack_from("<B7xIIQ", run, UNION)
        assert error in (0, 1)
        return None if error else value


@dataclass(frozen=True)
class WriteMsr(Step):
    """Answered with whether the write was taken."""

    index: int
    value: int

    def leave(self, run: memoryview) -> int:
        _exit(run, k.Exit.X86_WRMSR)
        struct.pack_into("<B7xIIQ", run, UNION, 0x55, 4, self.index, self.value)
        return 0

    def answer(self, run: memoryview) -> bool:
        assert run[UNION] in (0, 1)
        return run[UNION] == 0


@dataclass(frozen=True)
class Other(Step):
    """Any exit, with the first word of its details."""

    reason: int
    detail: int = 0

    def leave(self, run: memoryview) -> int:
        _exit(run, self.reason)
        struct.pack_into("<Q", run, UNION, self.detail)
        return 0


@dataclass(frozen=True)
class Fails(Step):
    """KVM_RUN returns an errno; ``struct kvm_run`` is as it was."""

    number: int

    def leave(self, run: memoryview) -> int:
        return self.number


@dataclass(frozen=True)
class Halt(Step):
    """Until a kick."""


Script = Generator[Step, Any, None]


@dataclass
class VcpuState:
    """What ioctls of one virtual processor keep."""

    enabled: list[int] = field(default_factory=list)
    cpuid: list[CpuidEntry] = field(default_factory=list)
    regs: bytes = bytes(144)
    sregs: bytes = bytes(312)
    msrs: dict[int, int] = field(default_factory=lambda: {0x40000000: 0, 0xC0000082: 0})
    mp_state: int = 0
    events: bytes = bytes(64)
    nmis: int = 0


@dataclass
class _Processor:
    index: int
    handle: Handle
    run: memoryview
    script: Script | None = None
    step: Step | None = None
    kicked: bool = False
    running: bool = False


@dataclass(frozen=True)
class Call:
    """One ioctl: *argument* as it was on the way in, before fixups."""

    kind: str
    request: int
    argument: int | bytes
    fixups: tuple[Fixup, ...]


class FakeOutEvent:
    """An event towards KVM that counts its raises."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.descriptor = handle, -1
        self.raised = 0

    def trigger(self) -> None:
        self.raised += 1


INTEL_ENTRIES = [
    CpuidEntry(0, eax=0x16, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69),
    CpuidEntry(1, eax=0x306C1, ecx=0x80000000, edx=0x1783FBFF),
]
HYPERV_ENTRIES = [
    CpuidEntry(0x40000000, eax=0x40000006, ebx=0x756E694C, ecx=0x564B2078, edx=0x7648204D),
    CpuidEntry(0x40000001, eax=0x31237648),
    CpuidEntry(0x40000003, eax=0x2AFF, ebx=0x830, edx=0x80D12),
]


class FakeTransport:
    """Implements :class:`hvhost.kvm.transport.Transport`; *scripts* are by processor."""

    name = "fake"
    notices_writes = False

    def __init__(
        self,
        memory_size: int = 16 << 20,
        *scripts: Callable[[FakeTransport], Script],
        capabilities: dict[int, int] | None = None,
    ) -> None:
        self.memory = memoryview(bytearray(memory_size))
        self.calls: list[Call] = []
        self.failures: dict[int, int] = {}
        self.capabilities = {162: 1} if capabilities is None else capabilities
        self.handles: dict[Handle, str] = {}
        self.vcpus: dict[int, VcpuState] = {}
        self.slots: dict[int, tuple[int, int, int]] = {}
        self.routes: list[tuple[int, ...]] = []
        self.irqs: dict[int, FakeOutEvent] = {}
        self.resamples: dict[int, Handle] = {}
        self.signals: dict[int, Handle] = {}
        self.raises: dict[Handle, int] = {}
        """Descriptors of other processes that :meth:`signal` has KVM raise."""
        self.coalesced_ports: list[int] = []
        self.filtered: tuple[int, int] | None = None
        self.ring = memoryview(bytearray(4096))
        self.waiting: list[tuple[int, bytes]] = []
        """Port writes that only :meth:`drain_coalesced` brings into the ring."""
        self.tables: dict[int, int] = {}
        """Guest page tables: linear to physical page addresses."""
        self.gone: str | None = None
        self.closed = 0
        self.clock = 123456789
        self.code_loads = 0
        self.discarded: list[tuple[int, int]] = []
        self._scripts = scripts
        self._events: dict[Handle, FakeOutEvent] = {}
        self._readers: dict[Handle, tuple[EventLoop, int]] = {}
        self._processors: dict[int, _Processor] = {}
        self._changed = threading.Condition()
        self._next = 1000

    # --- handles ---------------------------------------------------------------------------

    def _new(self, kind: str) -> Handle:
        self._next += 1
        self.handles[self._next] = kind
        return self._next

    def discard(self, offset: int, size: int) -> None:
        self.memory[offset : offset + size] = bytes(size)
        self.discarded.append((offset, size))

    def resident(self, offset: int, size: int) -> int:
        return size - sum(length for _, length in self.discarded)

    def code_loaded(self) -> None:
        self.code_loads += 1

    def memory_written(self, views: Sequence[memoryview]) -> None:
        pass

    def share(self) -> tuple[int, int]:
        raise HvHostError("nobody shares this memory.")

    def open_kvm(self) -> Handle:
        return self._new("kvm")

    def ioctl_handle(self, target: Handle, request: int, argument: int = 0) -> Handle:
        kind = self.handles[target]
        self._record(kind, request, argument, ())
        if request == k.KVM_CREATE_VM and kind == "kvm":
            return self._new("vm")
        assert (request, kind) == (k.KVM_CREATE_VCPU, "vm")
        handle = self._new(f"vcpu {argument}")
        self.vcpus[argument] = VcpuState(mp_state=0 if argument == 0 else 1)
        return handle

    def out_event(self) -> FakeOutEvent:
        event = FakeOutEvent(self._new("event"))
        self._events[event.handle] = event
        return event

    def in_event(self, loop: EventLoop, callback: Callable[[], None]) -> Handle:
        handle = self._new("in event")
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

        def ready() -> None:
            os.eventfd_read(descriptor)
            callback()

        loop.add_reader(descriptor, ready)
        self._readers[handle] = loop, descriptor
        return handle

    def signal(self, loop: EventLoop, descriptor: int) -> Handle:
        handle = self._new("signal")
        self.raises[handle] = descriptor
        return handle

    def raise_event(self, handle: Handle) -> None:
        """KVM raises an event of :meth:`in_event`."""
        os.eventfd_write(self._readers[handle][1], 1)

    def release(self, handle: Handle) -> None:
        del self.handles[handle]
        if handle in self._readers:
            loop, descriptor = self._readers.pop(handle)
            loop.remove(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        assert not any(processor.running for processor in self._processors.values())
        self.closed += 1
        for handle in list(self.handles):
            self.release(handle)

    # --- ioctls ----------------------------------------------------------------------------

    def _record(
        self, kind: str, request: int, argument: int | bytes, fixups: tuple[Fixup, ...]
    ) -> None:
        if self.gone is not None:
            raise HvHostError(self.gone)
        self.calls.append(Call(kind, request, argument, fixups))
        number = self.failures.get(request)
        if number is not None:
            raise OSError(number, os.strerror(number))

    def ioctl(
        self,
        target: Handle,
        request: int,
        argument: int | bytearray = 0,
        fixups: Sequence[Fixup] = (),
    ) -> int:
        kind = self.handles[target]
        self._record(
            kind, request, argument if isinstance(argument, int) else bytes(argument), (*fixups,)
        )
        if request == k.KVM_CHECK_EXTENSION:
            assert isinstance(argument, int)
            return self.capabilities.get(argument, 0)
        if kind.startswith("vcpu"):
            return self._vcpu_ioctl(self.vcpus[int(kind[5:])], request, argument)
        return self._vm_ioctl(request, argument, {fixup.kind: fixup for fixup in fixups}, fixups)

    def _vm_ioctl(
        self,
        request: int,
        argument: int | bytearray,
        by_kind: dict[FixupKind, Fixup],
        fixups: Sequence[Fixup],
    ) -> int:
        if isinstance(argument, int):
            assert request in (k.KVM_SET_TSS_ADDR, k.KVM_CREATE_IRQCHIP), hex(request)
            return 0
        if request in (k.KVM_GET_SUPPORTED_CPUID, k.KVM_GET_SUPPORTED_HV_CPUID):
            entries = INTEL_ENTRIES if request == k.KVM_GET_SUPPORTED_CPUID else HYPERV_ENTRIES
            assert struct.unpack_from("<I", argument)[0] >= len(entries)
            struct.pack_into("<I", argument, 0, len(entries))
            for i, e in enumerate(entries):
                fields = (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
                _CPUID.pack_into(argument, 8 + 40 * i, *fields)
        elif request == k.KVM_SET_USER_MEMORY_REGION:
            slot, _, address, size, _ = struct.unpack("<IIQQQ", argument)
            fixup = by_kind[FixupKind.MEMORY_ADDRESS]
            assert fixup.offset == 24
            self.slots[slot] = address, size, fixup.value
        elif request == k.KVM_SET_GSI_ROUTING:
            count = struct.unpack_from("<I", argument)[0]
            self.routes = [struct.unpack_from("<6I", argument, 8 + 48 * i) for i in range(count)]
            assert len(argument) == 8 + 48 * count
        elif request == k.KVM_IRQFD:
            _, gsi, flags = struct.unpack_from("<III", argument)
            assert fixups[0].offset == 0
            self.irqs[gsi] = self._events[fixups[0].value]
            if flags & k.KVM_IRQFD_FLAG_RESAMPLE:
                assert fixups[1].offset == 12
                self.resamples[gsi] = fixups[1].value
        elif request == k.KVM_HYPERV_EVENTFD:
            connection, _, flags = struct.unpack_from("<III", argument)
            if flags & k.KVM_HYPERV_EVENTFD_DEASSIGN:
                del self.signals[connection]
            else:
                assert fixups[0].offset == 4
                self.signals[connection] = fixups[0].value
        elif request == k.KVM_REGISTER_COALESCED_MMIO:
            port, size, pio = struct.unpack("<QII", argument)
            assert pio == 1
            self.coalesced_ports.extend(range(port, port + size))
        elif request == k.KVM_X86_SET_MSR_FILTER:
            _, count, first = struct.unpack_from("<III", argument, 8)
            self.filtered = first, count
        elif request == k.KVM_GET_CLOCK:
            struct.pack_into("<Q", argument, 0, self.clock)
        elif request == k.KVM_SET_CLOCK:
            assert not any(processor.running for processor in self._processors.values())
            self.clock, *rest = struct.unpack("<6Q", argument)
            assert not any(rest)
        else:
            known = (
                k.KVM_SET_IDENTITY_MAP_ADDR,
                k.KVM_CREATE_PIT2,
                k.KVM_ENABLE_CAP,
                k.KVM_IRQ_LINE,
            )
            assert request in known, hex(request)
        return 0

    def _vcpu_ioctl(self, state: VcpuState, request: int, argument: int | bytearray) -> int:
        if isinstance(argument, int):
            assert request == k.KVM_NMI, hex(request)
            state.nmis += 1
            return 0
        if request == k.KVM_ENABLE_CAP:
            state.enabled.append(struct.unpack_from("<I", argument)[0])
        elif request == k.KVM_SET_CPUID2:
            count = struct.unpack_from("<I", argument)[0]
            state.cpuid = [
                CpuidEntry(*_CPUID.unpack_from(argument, 8 + 40 * i)) for i in range(count)
            ]
        elif request == k.KVM_GET_REGS:
            argument[:] = state.regs
        elif request == k.KVM_SET_REGS:
            state.regs = bytes(argument)
        elif request == k.KVM_GET_SREGS:
            argument[:] = state.sregs
        elif request == k.KVM_SET_SREGS:
            state.sregs = bytes(argument)
        elif request == k.KVM_GET_VCPU_EVENTS:
            argument[:] = state.events
        elif request == k.KVM_SET_VCPU_EVENTS:
            state.events = bytes(argument)
        elif request == k.KVM_GET_MP_STATE:
            argument[:] = state.mp_state.to_bytes(4, "little")
        elif request == k.KVM_SET_MP_STATE:
            state.mp_state = int.from_bytes(argument, "little")
        elif request == k.KVM_TRANSLATE:
            linear = struct.unpack_from("<Q", argument)[0]
            page = self.tables.get(linear & ~0xFFF)
            valid = page is not None
            struct.pack_into("<QB", argument, 8, (page or 0) + (linear & 0xFFF), valid)
        else:
            assert request in (k.KVM_GET_MSRS, k.KVM_SET_MSRS), hex(request)
            count = int.from_bytes(argument[:4], "little")
            for i in range(count):
                index, _, value = struct.unpack_from("<IIQ", argument, 8 + 16 * i)
                if index not in state.msrs:
                    return i
                if request == k.KVM_SET_MSRS:
                    state.msrs[index] = value
                else:
                    struct.pack_into("<Q", argument, 16 + 16 * i, state.msrs[index])
            return count
        return 0

    def requests(self, request: int) -> list[Call]:
        """The recorded calls of one kind."""
        return [call for call in self.calls if call.request == request]

    # --- virtual processors ----------------------------------------------------------------

    def start_processor(self, index: int, handle: Handle) -> memoryview:
        script = self._scripts[index](self) if index < len(self._scripts) else None
        run = memoryview(bytearray(RUN_SIZE))
        self._processors[index] = _Processor(index, handle, run, script)
        return run

    def run(self, index: int) -> int:
        processor = self._processors[index]
        assert not processor.running, "KVM_RUN in two threads"
        processor.running = True
        try:
            return self._run(processor)
        finally:
            processor.running = False

    def _run(self, processor: _Processor) -> int:
        with self._changed:
            if processor.kicked:
                processor.kicked = False
                return errno.EINTR
        if not isinstance(processor.step, Halt):
            self._advance(processor)
        if isinstance(processor.step, Halt):
            with self._changed:
                self._changed.wait_for(lambda: processor.kicked or self.gone is not None)
                processor.kicked = False
            if self.gone is not None:
                raise HvHostError(self.gone)
            return errno.EINTR
        assert processor.step is not None
        return processor.step.leave(processor.run)

    def _advance(self, processor: _Processor) -> None:
        step, script = processor.step, processor.script
        if script is None:
            processor.step = Halt()
            return
        try:
            processor.step = (
                next(script) if step is None else script.send(step.answer(processor.run))
            )
        except StopIteration:
            processor.step = Halt()

    def kick(self, index: int) -> None:
        if self.gone is not None:
            raise HvHostError(self.gone)
        with self._changed:
            self._processors[index].kicked = True
            self._changed.notify_all()

    def wake(self, index: int) -> None:
        """End a processor's :class:`Halt`: its script goes on."""
        with self._changed:
            processor = self._processors[index]
            processor.step, processor.kicked = Fails(errno.EINTR), True
            self._changed.notify_all()

    def die(self, reason: str) -> None:
        """As a rig that is gone: every call and every processor sees it."""
        with self._changed:
            self.gone = reason
            self._changed.notify_all()

    # --- coalesced port writes -------------------------------------------------------------

    def coalesce(self, port: int, data: bytes) -> None:
        """KVM puts a write into the ring, without an exit."""
        words = self.ring[:8].cast("I")
        capacity = (len(self.ring) - COALESCED_HEADER) // COALESCED_ENTRY.size
        last = words[1]
        place = COALESCED_HEADER + last * COALESCED_ENTRY.size
        value = int.from_bytes(data.ljust(8, b"\xee"), "little")
        COALESCED_ENTRY.pack_into(self.ring, place, port, len(data), 1, value)
        words[1] = (last + 1) % capacity
        assert words[1] != words[0], "the ring is full"

    def coalesced_ring(self) -> memoryview:
        return self.ring

    def drain_coalesced(self) -> None:
        if self.gone is not None:
            raise HvHostError(self.gone)
        for port, data in self.waiting:
            self.coalesce(port, data)
        self.waiting.clear()
