"""The rig transport: a KVM in another kernel, reached through shared memory.

Set-up calls go through one mailbox, each virtual processor has its own; the agent spins on a
mailbox for a moment after it answered, so an exit costs a few microseconds and no interrupt.
Guest memory is mapped here natively. See ``rig/layout.h`` for the layout.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvhost.errors import HvHostError
from hvhost.kvm.residence import MADV_REMOVE, Residence
from hvhost.kvm.transport import EventLoop, Fixup, FixupKind, Handle
from hvhost.rig import layout
from hvhost.rig.client import RigSession, close_session, open_session, reason_of_end

_CALL_SECONDS = 20.0
_FIRST_LOOK_SECONDS = 0.02
_FIXUP = struct.Struct("<IIQ")
_FIXUP_KINDS = {
    FixupKind.MEMORY_ADDRESS: layout.FIXUP_ADD_BAR,
    FixupKind.DESCRIPTOR: layout.FIXUP_DESCRIPTOR,
    FixupKind.BUFFER_ADDRESS: layout.FIXUP_ADD_BUFFER,
}
_VECTORS_PER_PROCESSOR = 2
_VECTORS_PER_MACHINE = 6


class _Mailbox:
    """One mailbox and the eventfd that says it was answered."""

    def __init__(
        self, session: RigSession, control: memoryview, offset: int, buffer_size: int, event: int
    ) -> None:
        self._session = session
        self._control = control
        self._words = control[offset : offset + layout.MAILBOX_BUFFER].cast("I")
        self._head = control[offset : offset + layout.MAILBOX_BUFFER]
        start = offset + layout.MAILBOX_BUFFER
        self._buffer = control[start : start + buffer_size]
        self._state = layout.MAILBOX_STATE // 4
        self._operation = layout.MAILBOX_OPERATION // 4
        self._asleep = layout.MAILBOX_ASLEEP // 4
        self._result = layout.MAILBOX_RESULT
        self._request, self._done = layout.MAILBOX_REQUEST, layout.MAILBOX_DONE
        if offset == layout.CONTROL_MAILBOX:
            self._words_asleep = control[: layout.CONTROL_MAILBOX].cast("I")
            self._asleep_index = layout.CONTROL_ASLEEP // 4
        else:
            self._words_asleep, self._asleep_index = self._words, self._asleep
        self._epoll = select.epoll()
        # The agent's raises need not be read away: each one is an edge.
        self._epoll.register(event, select.EPOLLIN | select.EPOLLET)
        self._connection = session.connection.fileno()
        self._epoll.register(self._connection, select.EPOLLIN)
        self._failure: str | None = None
        self._barrier = threading.Lock()
        self.lock = threading.Lock()

    def post(self) -> None:
        """Hand the mailbox to the agent and wake it if it sleeps."""
        words = self._words
        words[self._state] = self._request
        with self._barrier:  # a locked instruction: our store before our load
            pass
        if self._words_asleep[self._asleep_index]:
            os.eventfd_write(self._session.wake, 1)

    def wait(self, seconds: float = -1) -> None:
        """Until the agent answered; :class:`HvHostError` when the rig is gone or hangs."""
        words, state, done = self._words, self._state, self._done
        patience = -1.0 if seconds < 0 else _FIRST_LOOK_SECONDS
        deadline = time.monotonic() + seconds
        while words[state] != done:
            ready = self._epoll.poll(patience, 2)
            if words[state] == done:
                return
            if not ready and time.monotonic() < deadline:
                patience *= 2  # a doorbell may have been lost, see RemoteTransport._meet
            elif not ready:
                # The mailbox stays the agent's: an answer that comes later is to no other call.
                self._failure = (
                    f"the rig has not answered a call for {seconds:.0f} s; start the machine again."
                )
            elif any(descriptor == self._connection for descriptor, _ in ready):
                self._failure = reason_of_end(self._session)
            if self._failure is not None:
                raise HvHostError(self._failure)

    def run(self) -> int:
        """One ``KVM_RUN``: zero or a positive errno."""
        self._words[self._operation] = _RUN
        self.post()
        self.wait()
        result: int = _I64.unpack_from(self._head, self._result)[0]
        return -result

    def call(
        self,
        operation: int,
        target: Handle = 0,
        request: int = 0,
        argument: int | bytearray = 0,
        fixups: Sequence[tuple[int, int, int]] = (),
        keep_as: Handle | None = None,
    ) -> int:
        """One call; a ``bytearray`` comes back updated. Raises :class:`OSError`."""
        with self.lock:
            if self._failure is not None:
                raise HvHostError(self._failure)
            head = self._head
            uses_buffer = isinstance(argument, bytearray)
            if isinstance(argument, bytearray):
                self._buffer[: len(argument)] = argument
            _CALL.pack_into(
                head,
                layout.MAILBOX_OPERATION,
                operation,
                target,
                layout.NO_HANDLE if keep_as is None else keep_as,
                request,
                0 if isinstance(argument, bytearray) else argument,
                uses_buffer,
                len(fixups),
            )
            for index, fixup in enumerate(fixups):
                _FIXUP.pack_into(
                    head, layout.MAILBOX_FIXUP_TABLE + index * layout.FIXUP_SIZE, *fixup
                )
            self.post()
            self.wait(_CALL_SECONDS)
            result: int = _I64.unpack_from(head, self._result)[0]
            if isinstance(argument, bytearray):
                argument[:] = self._buffer[: len(argument)]
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def close(self) -> None:
        self._failure = "the machine has given its place in the rig back; start it again."
        self._epoll.close()


_RUN = layout.OPERATION_RUN
_I64 = struct.Struct("<q")
_CALL = struct.Struct("<IIIQQII")
_PAIR = struct.Struct("<QQ")
_PLACES = 256
"""Places of memory in one call to rewrite them."""


@dataclass(frozen=True, slots=True)
class RemoteOutEvent:
    """An MSI-X vector of the rig's device that the agent gave to KVM."""

    handle: Handle
    descriptor: int

    def trigger(self) -> None:
        os.eventfd_write(self.descriptor, 1)


class RemoteTransport:
    """One machine in the rig; *memory_size* in bytes, *processors* for the vectors it needs."""

    name = "rig"
    notices_writes = True

    def __init__(
        self,
        memory_size: int,
        processors: int,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        vectors = _VECTORS_PER_MACHINE + _VECTORS_PER_PROCESSOR * processors
        self._session = open_session(memory_size, vectors, progress)
        session = self._session
        self._map = mmap.mmap(session.memory_descriptor, memory_size, offset=session.memory_offset)
        self.memory = memoryview(self._map)
        self._residence = Residence(self._map)
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._control_map = mmap.mmap(
            session.memory_descriptor, layout.CONTROL_SIZE, offset=session.control_offset
        )
        self._control = memoryview(self._control_map)
        self._control_words = self._control[: layout.CONTROL_MAILBOX].cast("I")
        self._mailbox = _Mailbox(
            session,
            self._control,
            layout.CONTROL_MAILBOX,
            layout.CONTROL_BUFFER_SIZE,
            session.events[layout.CONTROL_DOORBELL],
        )
        self._processors: dict[int, _Mailbox] = {}
        self._mailbox_of: dict[Handle, _Mailbox] = {}
        self._free_handles = list(range(layout.MAXIMUM_HANDLES - 1, -1, -1))
        self._free_vectors = list(session.vectors)
        self._callbacks: dict[int, tuple[Handle, Callable[[], None]]] = {}
        self._loop: EventLoop | None = None
        self._tail = 0
        self._closed = False
        self._meet()

    # --- calls ---------------------------------------------------------------------------

    def _meet(self) -> None:
        """Call the agent until its doorbell is heard.

        QEMU learns of our doorbells one by one while the agent works already, and those it does
        not know yet are lost. The one that answers calls is the last: with it, all are known.
        """
        deadline = time.monotonic() + _CALL_SECONDS
        while time.monotonic() < deadline:
            self.drain_coalesced()
            try:
                os.eventfd_read(self._session.events[layout.CONTROL_DOORBELL])
            except BlockingIOError:
                continue
            return
        self.close()
        raise HvHostError("the rig's QEMU does not pass doorbells on; start the machine again.")

    def _keep(
        self, operation: int, target: Handle = 0, request: int = 0, argument: int = 0
    ) -> Handle:
        """A call whose result the agent keeps under a new handle."""
        if not self._free_handles:
            raise HvHostError("the machine needs more descriptors than the rig keeps for it.")
        handle = self._free_handles.pop()
        try:
            self._mailbox.call(operation, target, request, argument, keep_as=handle)
        except OSError:
            self._free_handles.append(handle)
            raise
        return handle

    def open_kvm(self) -> Handle:
        try:
            return self._keep(layout.OPERATION_OPEN_KVM)
        except OSError as error:
            raise HvHostError(
                f"the rig's kernel has no KVM ({error.strerror}); run `hvhost doctor`."
            ) from error

    def code_loaded(self) -> None:
        # QEMU keeps translated code by its place in memory, and machines come and go there. It
        # sees no writes of ours, so the agent writes all that there is once more.
        descriptor, place = self._session.memory_descriptor, self._session.memory_offset
        end = place + len(self.memory)
        while place < end:
            try:
                start = os.lseek(descriptor, place, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # nothing but holes
            if start >= end:
                return
            place = min(end, os.lseek(descriptor, start, os.SEEK_HOLE))
            self._mailbox.call(layout.OPERATION_REWRITE, request=place - start, argument=start)

    def memory_written(self, views: Sequence[memoryview]) -> None:
        first, places = self._session.memory_offset, self._residence.places(views)
        for start in range(0, len(places), _PLACES):
            some = places[start : start + _PLACES]
            pairs = bytearray(b"".join(_PAIR.pack(first + offset, size) for offset, size in some))
            self._mailbox.call(layout.OPERATION_REWRITE, request=len(some), argument=pairs)

    def share(self) -> tuple[int, int]:
        return self._session.memory_descriptor, self._session.memory_offset

    def discard(self, offset: int, size: int) -> None:
        # Of shared memory, only removal frees the pages: for us, for QEMU and for the guest.
        address = ctypes.c_void_p(self._residence.address + offset)
        if self._madvise(address, ctypes.c_size_t(size), MADV_REMOVE):
            reason = os.strerror(ctypes.get_errno())
            raise HvHostError(f"the rig could not give memory back to this computer: {reason}.")

    def resident(self, offset: int, size: int) -> int:
        return self._residence.bytes_in(offset, size)

    def ioctl(
        self,
        target: Handle,
        request: int,
        argument: int | bytearray = 0,
        fixups: Sequence[Fixup] = (),
    ) -> int:
        base = self._session.memory_offset
        wire = [
            (
                fixup.offset,
                _FIXUP_KINDS[fixup.kind],
                fixup.value + (base if fixup.kind is FixupKind.MEMORY_ADDRESS else 0),
            )
            for fixup in fixups
        ]
        mailbox = self._mailbox_of.get(target, self._mailbox)
        return mailbox.call(layout.OPERATION_IOCTL, target, request, argument, wire)

    def ioctl_handle(self, target: Handle, request: int, argument: int = 0) -> Handle:
        return self._keep(layout.OPERATION_IOCTL, target, request, argument)

    def release(self, handle: Handle) -> None:
        for index, (kept, _) in list(self._callbacks.items()):
            if kept == handle:
                del self._callbacks[index]
        self._mailbox.call(layout.OPERATION_CLOSE, handle)
        self._free_handles.append(handle)

    # --- events --------------------------------------------------------------------------

    def out_event(self) -> RemoteOutEvent:
        if not self._free_vectors:
            raise HvHostError("the machine needs more interrupts than the rig lent it.")
        number, descriptor = self._free_vectors[0]
        handle = self._keep(layout.OPERATION_VECTOR_EVENT, argument=number)
        del self._free_vectors[0]
        return RemoteOutEvent(handle, descriptor)

    def in_event(self, loop: EventLoop, callback: Callable[[], None]) -> Handle:
        if self._loop is None:
            self._loop = loop
            loop.add_reader(self._session.events[0], self._on_raised)
        free = (i for i in range(layout.MAXIMUM_IN_EVENTS) if i not in self._callbacks)
        index = next(free, None)
        if index is None:
            raise HvHostError("the machine needs more events than the rig sends it.")
        handle = self._keep(layout.OPERATION_IN_EVENT, argument=index)
        self._callbacks[index] = (handle, callback)
        return handle

    def signal(self, loop: EventLoop, descriptor: int) -> Handle:
        return self.in_event(loop, lambda: os.eventfd_write(descriptor, 1))

    def _on_raised(self) -> None:
        try:
            os.eventfd_read(self._session.events[0])
        except BlockingIOError:
            return
        words = self._control_words
        ring = layout.CONTROL_RAISED_RING // 4
        while self._tail != words[layout.CONTROL_RAISED_HEAD // 4]:
            index = words[ring + self._tail % layout.RAISED_RING_ENTRIES]
            self._tail = (self._tail + 1) & 0xFFFFFFFF
            # Cleared before the callback looks: a raise from now on queues again.
            self._control[layout.CONTROL_QUEUED + index] = 0
            entry = self._callbacks.get(index)
            if entry is not None:
                try:
                    entry[1]()
                except BaseException:
                    os.eventfd_write(self._session.events[0], 1)  # the others in another round
                    raise

    # --- virtual processors --------------------------------------------------------------

    def start_processor(self, index: int, handle: Handle) -> memoryview:
        if index >= layout.MAXIMUM_PROCESSORS:
            raise HvHostError(
                f"the rig runs at most {layout.MAXIMUM_PROCESSORS} virtual processors a machine."
            )
        self._mailbox.call(layout.OPERATION_START_PROCESSOR, handle, argument=index)
        offset = layout.CONTROL_PROCESSORS + index * layout.PROCESSOR_STRIDE
        mailbox = _Mailbox(
            self._session,
            self._control,
            offset,
            layout.PROCESSOR_BUFFER_SIZE,
            self._session.events[1 + index],
        )
        self._processors[index] = mailbox
        self._mailbox_of[handle] = mailbox
        start = offset + layout.PROCESSOR_RUN
        return self._control[start : start + layout.RUN_IMAGE_SIZE]

    def run(self, index: int) -> int:
        return self._processors[index].run()

    def kick(self, index: int) -> None:
        self._mailbox.call(layout.OPERATION_KICK, argument=index)

    def coalesced_ring(self) -> memoryview:
        start = layout.CONTROL_COALESCED
        return self._control[start : start + layout.COALESCED_SIZE]

    def drain_coalesced(self) -> None:
        self._mailbox.call(layout.OPERATION_DRAIN_COALESCED)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.remove(self._session.events[0])
        for mailbox in (self._mailbox, *self._processors.values()):
            mailbox.close()
        close_session(self._session)
