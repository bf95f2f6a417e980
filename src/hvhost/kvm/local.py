"""The local transport: ``/dev/kvm`` of this kernel, by ioctl."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from collections.abc import Callable, Sequence

from hvhost.errors import HvHostError
from hvhost.kvm.constants import KVM_GET_VCPU_MMAP_SIZE, KVM_RUN
from hvhost.kvm.residence import MADV_REMOVE, Residence
from hvhost.kvm.transport import EventLoop, Fixup, FixupKind, Handle
from hvhost.partition.memory import PAGE_SIZE
from hvhost.units import format_size

_IMMEDIATE_EXIT = 1  # offset in struct kvm_run
_COALESCED_PAGE = 2
_MAP_NORESERVE = 0x4000  # asm/mman.h; mmap names it from Python 3.12 on only


def _memory(size: int, descriptor: int | None) -> mmap.mmap:
    """Guest memory; private, because only private memory gets huge pages everywhere: far fewer
    faults here and shorter page walks in the guest. *descriptor*: that of memory to be shared."""
    if descriptor is None:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    else:
        memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without them works too
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class LocalOutEvent:
    """An eventfd of this process."""

    def __init__(self) -> None:
        self.handle = self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def trigger(self) -> None:
        os.eventfd_write(self.handle, 1)


class LocalTransport:
    """One machine on this computer's own KVM; *memory_size* in bytes.

    *shared*: other processes may be given the memory; it costs the huge pages on most computers.
    """

    name = "local"
    notices_writes = False

    def __init__(self, memory_size: int, device: str = "/dev/kvm", *, shared: bool = False) -> None:
        try:
            self._kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HvHostError(
                f"{device} cannot be opened ({error.strerror}); "
                "run `hvhost doctor` to see what this computer can do, or use --kvm rig."
            ) from error
        self._shared: int | None = None
        try:
            self._run_size = fcntl.ioctl(self._kvm, KVM_GET_VCPU_MMAP_SIZE, 0)
            if shared:
                self._shared = os.memfd_create("hvhost-memory")
                os.ftruncate(self._shared, memory_size)
            self._map = _memory(memory_size, self._shared)
        except OSError as error:
            os.close(self._kvm)
            if self._shared is not None:
                os.close(self._shared)
            raise HvHostError(
                f"{device} cannot run a machine with {format_size(memory_size)} of memory "
                f"({error.strerror}); run `hvhost doctor` to see what this computer can do."
            ) from error
        self.memory = memoryview(self._map)
        self._residence = Residence(self._map)
        self._base = self._residence.address
        self._handles: set[Handle] = {self._kvm}
        self._in_events: list[tuple[EventLoop, Handle]] = []
        self._processors: dict[int, tuple[Handle, memoryview]] = {}
        self._threads: dict[int, int] = {}
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        if threading.current_thread() is threading.main_thread():
            # The handler does nothing: its delivery alone ends KVM_RUN with EINTR.
            signal.signal(signal.SIGUSR1, lambda *_: None)

    def code_loaded(self) -> None:
        pass

    def memory_written(self, views: Sequence[memoryview]) -> None:
        pass

    def discard(self, offset: int, size: int) -> None:
        self._map.madvise(self._unneeded, offset, size)

    @property
    def _unneeded(self) -> int:
        return mmap.MADV_DONTNEED if self._shared is None else MADV_REMOVE

    def share(self) -> tuple[int, int]:
        if self._shared is None:
            raise HvHostError("the machine's memory is this process's own; it was not made shared.")
        return self._shared, 0

    def resident(self, offset: int, size: int) -> int:
        return self._residence.bytes_in(offset, size)

    def open_kvm(self) -> Handle:
        return self._kvm

    def ioctl(
        self,
        target: Handle,
        request: int,
        argument: int | bytearray = 0,
        fixups: Sequence[Fixup] = (),
    ) -> int:
        if isinstance(argument, int):
            # fcntl.ioctl refuses integers above 2**31
            result: int = self._ioctl(
                ctypes.c_int(target), ctypes.c_ulong(request), ctypes.c_ulong(argument)
            )
            if result < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return result
        anchor = None
        for fixup in fixups:
            if fixup.kind is FixupKind.MEMORY_ADDRESS:
                struct.pack_into("<Q", argument, fixup.offset, self._base + fixup.value)
            elif fixup.kind is FixupKind.DESCRIPTOR:
                struct.pack_into("<I", argument, fixup.offset, fixup.value)
            else:
                anchor = anchor or ctypes.c_char.from_buffer(argument)
                address = ctypes.addressof(anchor) + fixup.value
                struct.pack_into("<Q", argument, fixup.offset, address)
        return int(fcntl.ioctl(target, request, argument, True))

    def ioctl_handle(self, target: Handle, request: int, argument: int = 0) -> Handle:
        handle = self.ioctl(target, request, argument)
        self._handles.add(handle)
        return handle

    def out_event(self) -> LocalOutEvent:
        event = LocalOutEvent()
        self._handles.add(event.handle)
        return event

    def in_event(self, loop: EventLoop, callback: Callable[[], None]) -> Handle:
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

        def ready() -> None:
            try:
                os.eventfd_read(descriptor)
            except BlockingIOError:
                return
            callback()

        loop.add_reader(descriptor, ready)
        self._handles.add(descriptor)
        self._in_events.append((loop, descriptor))
        return descriptor

    def signal(self, loop: EventLoop, descriptor: int) -> Handle:
        handle = os.dup(descriptor)
        self._handles.add(handle)
        return handle

    def release(self, handle: Handle) -> None:
        if handle not in self._handles:
            return
        for entry in self._in_events:
            if entry[1] == handle:
                entry[0].remove(handle)
                self._in_events.remove(entry)
                break
        self._handles.discard(handle)
        os.close(handle)

    def start_processor(self, index: int, handle: Handle) -> memoryview:
        view = memoryview(mmap.mmap(handle, self._run_size))
        self._processors[index] = (handle, view)
        return view

    def run(self, index: int) -> int:
        handle, view = self._processors[index]
        if index not in self._threads:
            self._threads[index] = threading.get_ident()
        try:
            fcntl.ioctl(handle, KVM_RUN, 0)
        except (InterruptedError, BlockingIOError) as error:
            view[_IMMEDIATE_EXIT] = 0
            return error.errno or errno.EINTR
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def kick(self, index: int) -> None:
        # immediate_exit closes the window between the thread's last look and KVM_RUN
        self._processors[index][1][_IMMEDIATE_EXIT] = 1
        thread = self._threads.get(index)
        if thread is not None:
            signal.pthread_kill(thread, signal.SIGUSR1)

    def coalesced_ring(self) -> memoryview:
        view = next(iter(self._processors.values()))[1]
        return view[_COALESCED_PAGE * PAGE_SIZE : (_COALESCED_PAGE + 1) * PAGE_SIZE]

    def drain_coalesced(self) -> None:
        """KVM's own ring is the one everybody reads."""

    def close(self) -> None:
        for loop, descriptor in self._in_events:
            loop.remove(descriptor)
        self._in_events.clear()
        for handle in sorted(self._handles, reverse=True):
            os.close(handle)
        self._handles.clear()
        # Views of it may live on for a while; its pages must not, the next boot wants them.
        self._map.madvise(self._unneeded)
        if self._shared is not None:
            os.close(self._shared)
            self._shared = None
