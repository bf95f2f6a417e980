"""The loop of one virtual processor: run the guest, answer what it left for."""

from __future__ import annotations

import errno
import logging
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Exit
from hvhost.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from concurrent.futures import Future

log = logging.getLogger(__name__)
T = TypeVar("T")

_IO = struct.Struct("<BBHIQ").unpack_from  # direction, size, port, count, data offset
_UNION = 32  # offset of the exit's details in struct kvm_run
_CALL_SECONDS = 20.0
_STOP_SECONDS = 5.0
_MAXIMUM_REASONS = 1024


class Ports(Protocol):
    """The I/O port space."""

    def read(self, port: int, size: int) -> int: ...

    def write(self, port: int, size: int, value: int) -> None: ...


class Msrs(Protocol):
    """Model-specific registers that KVM leaves to us."""

    def read(self, msr: int) -> int | None: ...

    def write(self, msr: int, value: int) -> bool: ...


class Handlers(NamedTuple):
    """Where exits go; *lock* is held around every call into the machine."""

    lock: threading.RLock
    ports: Ports
    msrs: Msrs
    hypercall: Callable[[int, int, int], int]
    """Input value, first and second parameter; its result."""
    synic: Callable[[int, int, int, int], None]
    """VP, SCONTROL, SIEFP, SIMP."""
    before_port: Callable[[], None]
    """Bring coalesced port writes up to date."""
    stopped: Callable[[str], None]
    """The processor cannot go on: ``reset`` (triple fault), or why KVM gave up."""


class Processor:
    """A virtual processor and its thread.

    ``exits`` counts exits by reason, such as ``out 0x3f8`` or ``hypercall 0x5c``; a guest that
    makes up ever more reasons finds the rest under ``other``.
    """

    def __init__(self, vcpu: Vcpu, handlers: Handlers) -> None:
        self.vcpu = vcpu
        self.exits: Counter[str] = Counter()
        self._handlers = handlers
        self._run_state = vcpu.run_state
        self._words = vcpu.run_state[:4096].cast("I")
        self._quads = vcpu.run_state[:4096].cast("Q")
        self._requests: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._requests_lock = threading.Lock()
        self._news = threading.Condition(self._requests_lock)
        self._accepting = False
        self._stopping = False
        self._pausing = False
        self._thread = threading.Thread(target=self._main, name=f"vp-{vcpu.index}", daemon=True)

    def start(self) -> None:
        """Run the guest, on a thread of the processor's own; called once."""
        self._accepting = True
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run *function* on the processor's thread, out of the guest; its result or exception.

        Any thread, but without the machine's lock, which the processor may be waiting for.
        :class:`HvHostError` when the processor does not run (any more), or does not leave the
        guest for 20 seconds.
        """
        if self._thread is threading.current_thread():
            return function()
        from concurrent.futures import Future

        future: Future[object] = Future()
        with self._requests_lock:
            if not self._accepting:
                raise self._stopped()
            self._requests.append((function, future))
            self._news.notify()
        self.vcpu.kick()
        try:
            return future.result(_CALL_SECONDS)  # type: ignore[return-value] # function's result
        except TimeoutError:
            if future.done():
                raise  # function's own
            future.cancel()
            raise HvHostError(
                f"virtual processor {self.vcpu.index} did not answer for {_CALL_SECONDS:.0f} s; "
                "the computer may be overloaded, try again."
            ) from None

    def pause(self) -> None:
        """Keep the guest from running until :meth:`resume`; when this returns, it does not run.

        Calls are still served. Any thread, without the machine's lock; :class:`HvHostError` as for
        :meth:`call`, and then the processor is not paused.
        """
        self._pausing = True
        try:
            # Served by a thread that is out of the guest and has seen the flag before it goes back.
            self.call(lambda: None)
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Run the guest again; any thread."""
        with self._news:
            self._pausing = False
            self._news.notify()

    def _stopped(self) -> HvHostError:
        return HvHostError(
            f"virtual processor {self.vcpu.index} does not run (any more); start the machine again."
        )

    def stop(self) -> None:
        """End the thread; the guest is not run again. Any thread, without the machine's lock."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread is threading.current_thread():
            return
        while self._thread.is_alive():
            try:
                self.vcpu.kick()
            except (OSError, HvHostError):
                # Nobody can be kicked in a rig that is gone, but the thread learns of it as well.
                self._thread.join(_STOP_SECONDS)
                return
            self._thread.join(0.2)

    # --- the thread --------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._loop()
        except HvHostError as error:
            self._handlers.stopped(str(error))
        except Exception as error:
            log.exception("virtual processor %d", self.vcpu.index)
            self._handlers.stopped(
                f"virtual processor {self.vcpu.index} met a bug of hvhost ({error!r}); "
                "the machine's log has the details."
            )
        finally:
            with self._requests_lock:
                self._accepting = False
                left = list(self._requests)
                self._requests.clear()
            for _, future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(self._stopped())

    def _loop(self) -> None:
        run, words, exits = self.vcpu.run, self._words, self.exits
        answer = {
            Exit.IO: self._io,
            Exit.HYPERV: self._hyperv,
            Exit.MMIO: self._mmio,
            Exit.X86_WRMSR: self._wrmsr,
            Exit.X86_RDMSR: self._rdmsr,
        }
        while not self._stopping:
            if self._requests or self._pausing:
                self._stay_out()
                if self._stopping:
                    return
            error = run()
            if error:
                exits["interrupted"] += 1
                if error not in (errno.EINTR, errno.EAGAIN):
                    raise HvHostError(
                        f"KVM cannot run virtual processor {self.vcpu.index}: "
                        f"{errno.errorcode.get(error, error)}."
                    )
                continue
            reason = words[2]
            handler = answer.get(reason)  # type: ignore[call-overload] # an int may be no Exit
            if handler is not None:
                handler()
            elif not self._other(reason):
                return

    def _stay_out(self) -> None:
        """Serve requests; while the processor is paused, do nothing else."""
        self._serve_requests()
        while self._pausing and not self._stopping:
            with self._news:
                self._news.wait_for(lambda: self._requests or self._stopping or not self._pausing)
            self._serve_requests()

    def _serve_requests(self) -> None:
        while self._requests:
            function, future = self._requests.popleft()
            if not future.set_running_or_notify_cancel():
                continue  # the caller has given up
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _count(self, reason: str) -> None:
        exits = self.exits
        if reason not in exits and len(exits) >= _MAXIMUM_REASONS:
            reason = "other"  # addresses are the guest's choice
        exits[reason] += 1

    def _io(self) -> None:
        is_write, size, port, count, offset = _IO(self._run_state, _UNION)
        self._count(f"{'out' if is_write else 'in'} {port:#x}")
        handlers, run_state = self._handlers, self._run_state
        with handlers.lock:
            handlers.before_port()
            for place in range(offset, offset + count * size, size):
                data = run_state[place : place + size]
                if is_write:
                    handlers.ports.write(port, size, int.from_bytes(data, "little"))
                else:
                    value = handlers.ports.read(port, size)
                    data[:] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def _mmio(self) -> None:
        # Nobody lives there: reads see an empty bus, writes go nowhere.
        self._count(f"mmio {self._quads[_UNION // 8] & ~0xFFF:#x}")
        if not self._run_state[_UNION + 20]:
            self._run_state[_UNION + 8 : _UNION + 16] = b"\xff" * 8

    def _hyperv(self) -> None:
        quads, kind = self._quads, self._words[_UNION // 4]
        if kind == k.KVM_EXIT_HYPERV_HCALL:
            self._count(f"hypercall {quads[5] & 0xFFFF:#x}")
            with self._handlers.lock:
                quads[6] = self._handlers.hypercall(quads[5], quads[7], quads[8])
        elif kind == k.KVM_EXIT_HYPERV_SYNIC:
            self.exits["synic"] += 1
            with self._handlers.lock:
                self._handlers.synic(self.vcpu.index, quads[6], quads[7], quads[8])

    def _rdmsr(self) -> None:
        words = self._words
        self._count(f"rdmsr {words[11]:#x}")
        with self._handlers.lock:
            value = self._handlers.msrs.read(words[11])
        if value is None:
            self._run_state[_UNION] = 1  # #GP
        else:
            self._run_state[_UNION] = 0
            self._quads[6] = value

    def _wrmsr(self) -> None:
        words = self._words
        self._count(f"wrmsr {words[11]:#x}")
        with self._handlers.lock:
            known = self._handlers.msrs.write(words[11], self._quads[6])
        self._run_state[_UNION] = 0 if known else 1

    def _other(self, reason: int) -> bool:
        """Rare exits; whether the processor goes on."""
        words = self._words
        name = Exit(reason).name if reason in Exit.__members__.values() else str(reason)
        self.exits[name.lower()] += 1
        if reason in (Exit.INTR, Exit.IRQ_WINDOW_OPEN, Exit.HLT):
            return True
        kind = words[_UNION // 4]
        if reason == Exit.SYSTEM_EVENT and kind == k.KVM_SYSTEM_EVENT_CRASH:
            return True  # the crash registers have told us already
        if reason == Exit.SHUTDOWN or (
            reason == Exit.SYSTEM_EVENT and kind == k.KVM_SYSTEM_EVENT_RESET
        ):
            self._handlers.stopped("reset")
            return False
        self._handlers.stopped(
            f"KVM stopped virtual processor {self.vcpu.index} with {name} (detail {kind:#x})."
        )
        return False
