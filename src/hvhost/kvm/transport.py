"""What a way to reach KVM must be able to do.

Two exist: :mod:`hvhost.kvm.local` (``/dev/kvm`` of this kernel) and :mod:`hvhost.kvm.remote` (the
rig). Everything above speaks to this protocol through the typed objects of
:mod:`hvhost.kvm.vm` and :mod:`hvhost.kvm.vcpu`; nothing above knows which one it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

Handle = int
"""A KVM object or eventfd: a file descriptor here, or its stand-in in the rig."""


class FixupKind(IntEnum):
    """What is put into an argument buffer where only the transport knows the value."""

    MEMORY_ADDRESS = 1
    """Address, in the process that calls KVM, of an offset into the machine's memory."""
    DESCRIPTOR = 2
    """File descriptor (32 bits) behind a handle."""
    BUFFER_ADDRESS = 3
    """Address of an offset into the argument buffer itself."""


class Fixup(NamedTuple):
    """Put *value*, as *kind* says, at byte *offset* of the argument buffer."""

    offset: int
    kind: FixupKind
    value: int


class OutEvent(Protocol):
    """An eventfd that the VMM raises and KVM listens to (``KVM_IRQFD``)."""

    @property
    def handle(self) -> Handle: ...

    @property
    def descriptor(self) -> int:
        """The eventfd of this process that raises it; others may be given copies."""
        ...

    def trigger(self) -> None:
        """Raise it; never blocks."""
        ...


class EventLoop(Protocol):
    """The part of the worker's loop that a transport needs."""

    def add_reader(self, descriptor: int, callback: Callable[[], None]) -> None: ...

    def remove(self, descriptor: int) -> None: ...


class Transport(Protocol):
    """One machine's connection to a KVM."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> memoryview:
        """The machine's backing memory, writable, shared with the guest."""
        ...

    def code_loaded(self) -> None:
        """The VMM has put code into the memory; before it is run, processors must take notice.

        Real processors do by themselves; emulated ones may remember what was there before.
        """
        ...

    def memory_written(self, views: Sequence[memoryview]) -> None:
        """A device has put data into these parts of :attr:`memory`, and nobody else writes there.

        As :meth:`code_loaded`, for what the guest may run later, such as programs from a disk.
        """
        ...

    def share(self) -> tuple[int, int]:
        """A descriptor of :attr:`memory` for another process of the machine, and where it begins.

        It stays the transport's. :class:`HvHostError` where the memory was not made to be shared.
        """
        ...

    @property
    def notices_writes(self) -> bool:
        """Whether :meth:`memory_written` does anything."""
        ...

    def discard(self, offset: int, size: int) -> None:
        """Give whole pages of the memory back to the computer; they read as zero again."""
        ...

    def resident(self, offset: int, size: int) -> int:
        """How many bytes of that part of the memory the computer holds for the machine."""
        ...

    def open_kvm(self) -> Handle:
        """``/dev/kvm`` itself."""
        ...

    def ioctl(
        self,
        target: Handle,
        request: int,
        argument: int | bytearray = 0,
        fixups: Sequence[Fixup] = (),
    ) -> int:
        """One ioctl; a ``bytearray`` argument is updated in place. Raises :class:`OSError`."""
        ...

    def ioctl_handle(self, target: Handle, request: int, argument: int = 0) -> Handle:
        """An ioctl whose result is a new descriptor."""
        ...

    def out_event(self) -> OutEvent:
        """An event towards KVM."""
        ...

    def in_event(self, loop: EventLoop, callback: Callable[[], None]) -> Handle:
        """An event from KVM; *callback* runs on *loop* after one or more raises."""
        ...

    def signal(self, loop: EventLoop, descriptor: int) -> Handle:
        """An event from KVM that raises the eventfd *descriptor*, which another process waits for.

        It costs nothing here where KVM can raise it itself.
        """
        ...

    def release(self, handle: Handle) -> None:
        """Close a handle."""
        ...

    def start_processor(self, index: int, handle: Handle) -> memoryview:
        """Make virtual processor *index* ready to run; its ``struct kvm_run``, writable."""
        ...

    def run(self, index: int) -> int:
        """``KVM_RUN``; 0 or a positive errno (EINTR after a kick, EAGAIN before SIPI)."""
        ...

    def kick(self, index: int) -> None:
        """Make a running (or about to run) processor come back with EINTR; any thread."""
        ...

    def coalesced_ring(self) -> memoryview:
        """``struct kvm_coalesced_mmio_ring`` of the machine."""
        ...

    def drain_coalesced(self) -> None:
        """Bring the coalesced ring up to date while no processor exits."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
