"""Both transports against this computer's KVM, whatever it is: a guest of a few instructions."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_process import Rig, stop

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm import detect, local, remote
from hvhost.kvm.constants import Exit
from hvhost.kvm.local import LocalTransport
from hvhost.kvm.remote import RemoteTransport
from hvhost.kvm.residence import Residence
from hvhost.kvm.transport import Fixup, FixupKind, Handle
from hvhost.kvm.vcpu import Vcpu
from hvhost.machine.loop import Loop
from hvhost.machine.model import MachineConfig, Transport
from hvhost.rig import layout

pytest_plugins = ["rig_fixtures"]

Any = LocalTransport | RemoteTransport
MEMORY = 4 << 20
KVM_GET_IRQCHIP = 0xC208AE62


def why_no_kvm() -> str | None:
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm cannot be opened: {error.strerror}"
    try:
        os.close(fcntl.ioctl(descriptor, k.KVM_CREATE_VM, 0))
    except OSError as error:
        return f"/dev/kvm makes no machines: {error.strerror}"
    finally:
        os.close(descriptor)
    return None


NO_KVM = why_no_kvm()
needs_kvm = pytest.mark.skipif(NO_KVM is not None, reason=str(NO_KVM))


@pytest.fixture(params=["local", "rig"])
def transport(request: pytest.FixtureRequest) -> Iterator[Any]:
    if NO_KVM is not None:
        pytest.skip(NO_KVM)
    if request.param == "local":
        one: Any = LocalTransport(MEMORY)
    else:
        request.getfixturevalue("rig")
        one = RemoteTransport(MEMORY, 2)
    yield one
    one.close()


class Guest:
    """A machine with a chip set and one processor in real mode at 0x1000."""

    def __init__(self, transport: Any, code: bytes) -> None:
        self.transport = transport
        self.kvm = transport.open_kvm()
        self.vm = transport.ioctl_handle(self.kvm, k.KVM_CREATE_VM)
        self.call(k.KVM_SET_TSS_ADDR, 0xFFFBD000)
        self.call(k.KVM_CREATE_IRQCHIP)
        self.call(
            k.KVM_SET_USER_MEMORY_REGION,
            bytearray(struct.pack("<IIQQQ", 0, 0, 0, MEMORY, 0)),
            [Fixup(24, FixupKind.MEMORY_ADDRESS, 0)],
        )
        self.vcpu = Vcpu(transport, self.vm, 0)
        special = self.vcpu.special_registers()
        flat = special.segment("cs")._replace(base=0, selector=0)
        self.vcpu.set_special_registers(special.with_segments(cs=flat))
        self.vcpu.set_registers(self.vcpu.registers()._replace(rip=0x1000, rflags=2))
        self.transport.memory[0x1000 : 0x1000 + len(code)] = code

    def call(self, request: int, argument: int | bytearray = 0, fixups: object = ()) -> int:
        return self.transport.ioctl(self.vm, request, argument, fixups)  # type: ignore[arg-type]

    def run(self) -> int:
        """The exit's reason; interruptions are run again."""
        while True:
            error = self.vcpu.run()
            if not error:
                return int.from_bytes(self.vcpu.run_state[8:12], "little")
            assert error in (errno.EINTR, errno.EAGAIN)


SELF_JUMP = b"\xeb\xfe"
OUT_THEN_IN = (
    b"\xb0A"  # mov $'A', %al
    b"\xba\xf8\x03"  # mov $0x3f8, %dx
    b"\xee"  # out %al, (%dx)
    b"\xec"  # in (%dx), %al
    b"\xa2\x00\x20"  # mov %al, 0x2000
) + SELF_JUMP


def test_exits_and_memory(transport: Any) -> None:
    guest = Guest(transport, OUT_THEN_IN)
    run = guest.vcpu.run_state
    assert guest.run() == Exit.IO
    assert struct.unpack_from("<BBHIQ", run, 32) == (1, 1, 0x3F8, 1, 4096)
    assert run[4096] == ord("A")
    assert guest.run() == Exit.IO
    assert struct.unpack_from("<BBHIQ", run, 32) == (0, 1, 0x3F8, 1, 4096)
    run[4096] = 0x5A
    timer = threading.Timer(0.2, guest.vcpu.kick)
    timer.start()
    assert guest.vcpu.run() == errno.EINTR
    timer.join()
    assert transport.memory[0x2000] == 0x5A, "the guest's memory is ours"
    assert guest.vcpu.registers().rip == 0x1000 + len(OUT_THEN_IN) - 2


@needs_kvm
def test_a_kick_before_the_run_is_not_lost() -> None:
    transport = LocalTransport(MEMORY)
    guest = Guest(transport, SELF_JUMP)
    guest.vcpu.kick()
    assert guest.vcpu.run() == errno.EINTR
    transport.close()


def test_kicks_again_and_again(transport: Any) -> None:
    guest = Guest(transport, SELF_JUMP)
    stop = threading.Event()

    def kick() -> None:
        while not stop.wait(0.001):
            guest.vcpu.kick()

    thread = threading.Thread(target=kick)
    thread.start()
    try:
        for _ in range(200):
            assert guest.vcpu.run() == errno.EINTR
    finally:
        stop.set()
        thread.join()


def test_calls_of_a_processor(transport: Any) -> None:
    guest = Guest(transport, SELF_JUMP)
    registers = guest.vcpu.registers()._replace(r15=2**63 + 7)
    guest.vcpu.set_registers(registers)
    assert guest.vcpu.registers().r15 == 2**63 + 7
    special = guest.vcpu.special_registers()
    assert special.segment("cs").base == 0
    assert guest.vcpu.mp_state() == k.KVM_MP_STATE_RUNNABLE
    assert guest.vcpu.translate(0x1234) == 0x1234
    guest.vcpu.set_msrs([(0xC0000082, 0xFFFFFFFF81000000)])
    assert guest.vcpu.msrs([0xC0000082]) == [0xFFFFFFFF81000000]
    events = guest.vcpu.events()
    guest.vcpu.set_events(events)
    guest.vcpu.nmi()
    clock = bytearray(48)
    guest.call(k.KVM_GET_CLOCK, clock)
    assert any(clock)


def test_errors_are_errors(transport: Any) -> None:
    guest = Guest(transport, SELF_JUMP)
    with pytest.raises(OSError, match=r"Invalid argument|Inappropriate") as caught:
        guest.call(0xAEFF)
    assert caught.value.errno in (errno.EINVAL, errno.ENOTTY)
    with pytest.raises(OSError, match=r".") as caught:
        guest.call(k.KVM_SET_USER_MEMORY_REGION, bytearray(struct.pack("<IIQQQ", 1, 0, 1, 1, 0)))
    assert caught.value.errno == errno.EINVAL


def test_handles_that_fail_are_not_lost(transport: Any) -> None:
    """More failures than there are handles left in a rig: each gives its handle back."""
    guest = Guest(transport, SELF_JUMP)
    if isinstance(transport, RemoteTransport):
        del transport._free_handles[:-5]
    for _ in range(10):
        with pytest.raises(OSError, match=r"."):
            transport.ioctl_handle(guest.vm, k.KVM_CREATE_VCPU, 0)
    transport.release(transport.out_event().handle)


def test_an_event_towards_kvm(transport: Any) -> None:
    """Raised here, latched as line 4 of the PIC there."""
    guest = Guest(transport, SELF_JUMP)
    line = transport.out_event()
    guest.call(
        k.KVM_IRQFD,
        bytearray(struct.pack("<4I16x", 0, 4, 0, 0)),
        [Fixup(0, FixupKind.DESCRIPTOR, line.handle)],
    )

    def requested() -> int:
        chip = bytearray(520)
        guest.call(KVM_GET_IRQCHIP, chip)
        return chip[9]

    assert requested() == 0
    line.trigger()
    deadline = time.monotonic() + 5
    while requested() != 1 << 4:
        assert time.monotonic() < deadline


OUT_FOR_EVER = b"\xba\x34\x12" + b"\xee" * 3 + SELF_JUMP  # three times out %al, (0x1234)


def run_and_raise(guest: Guest, event: Handle) -> threading.Thread:
    """Run *guest*, whose writes to port 0x1234 raise *event*, until it is kicked."""
    guest.call(
        k.KVM_IOEVENTFD,
        bytearray(struct.pack("<QQIiI36x", 0, 0x1234, 1, 0, 2)),
        [Fixup(20, FixupKind.DESCRIPTOR, event)],
    )
    thread = threading.Thread(target=guest.vcpu.run)
    thread.start()
    return thread


def test_an_event_from_kvm(transport: Any) -> None:
    guest = Guest(transport, OUT_FOR_EVER)
    loop = Loop()
    raised: list[int] = []

    def callback() -> None:
        raised.append(1)
        loop.stop()

    event = transport.in_event(loop, callback)
    other = transport.in_event(loop, lambda: pytest.fail("nobody raised this one"))
    thread = run_and_raise(guest, event)
    loop.call_later(5, loop.stop)
    loop.run()
    assert raised == [1]
    guest.vcpu.kick()
    thread.join(5)
    transport.release(event)
    transport.release(other)
    transport.close()
    loop.close()


def test_an_event_from_kvm_to_another_process(transport: Any) -> None:
    guest = Guest(transport, OUT_FOR_EVER)
    loop = Loop()
    descriptor = os.eventfd(0, os.EFD_CLOEXEC)
    event = transport.signal(loop, descriptor)
    thread = run_and_raise(guest, event)
    loop.call_later(1, loop.stop)
    loop.run()
    assert os.eventfd_read(descriptor) >= 1
    guest.vcpu.kick()
    thread.join(5)
    transport.release(event)
    os.eventfd_write(descriptor, 1)  # it is still ours
    os.close(descriptor)
    transport.close()
    loop.close()


def test_memory_of_two_processes(transport: Any) -> None:
    if isinstance(transport, LocalTransport):
        with pytest.raises(HvHostError, match="was not made shared"):
            transport.share()
        transport.close()
        transport = LocalTransport(MEMORY, shared=True)
    descriptor, offset = transport.share()
    there = mmap.mmap(descriptor, MEMORY, offset=offset)
    transport.memory[4096:8192] = b"a" * 4096
    assert there[4096:8192] == b"a" * 4096
    there[0:5] = b"there"
    assert transport.memory[0:5].tobytes() == b"there"
    transport.discard(4096, 4096)
    assert not any(there[4096:8192]) and there[0:5] == b"there"
    transport.close()
    deadline = time.monotonic() + 5
    while any(there[0:5]):  # closing gives the pages back, whoever still has them mapped
        assert time.monotonic() < deadline
        time.sleep(0.01)
    there.close()


def test_port_writes_are_coalesced(transport: Any) -> None:
    code = b"\xba\xf8\x03" + b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in b"hello") + SELF_JUMP
    guest = Guest(transport, code)
    guest.call(k.KVM_REGISTER_COALESCED_MMIO, bytearray(struct.pack("<QII", 0x3F8, 1, 1)))
    ring = transport.coalesced_ring()
    threading.Timer(0.2, guest.vcpu.kick).start()
    assert guest.vcpu.run() == errno.EINTR
    transport.drain_coalesced()
    first, last = struct.unpack_from("<II", ring)
    assert (first, last) == (0, 5)
    entries = [struct.unpack_from("<QIIQ", ring, 8 + 24 * i) for i in range(5)]
    assert bytes(data & 0xFF for _, _, _, data in entries) == b"hello"
    assert {entry[:3] for entry in entries} == {(0x3F8, 1, 1)}


def test_a_buffer_that_points_into_itself(transport: Any) -> None:
    """The MSR filter's bitmap lies behind it; a wrong address would be EFAULT."""
    guest = Guest(transport, SELF_JUMP)
    size = 8 + 16 * 24
    buffer = bytearray(size + 1)
    struct.pack_into("<IIII", buffer, 8, 3, 6, 0x40000100, 0)
    try:
        guest.call(k.KVM_X86_SET_MSR_FILTER, buffer, [Fixup(24, FixupKind.BUFFER_ADDRESS, size)])
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.ENOTTY), "this KVM has no filter"


def test_closing_gives_the_memory_back(transport: Any) -> None:
    transport.memory[0:4096] = b"\xff" * 4096
    view = transport.memory[0:4096]
    transport.close()
    deadline = time.monotonic() + 5
    while any(view):
        assert time.monotonic() < deadline, "the pages are still there"
        time.sleep(0.01)
    transport.close()


# --- each in its own way ------------------------------------------------------------------------


@needs_kvm
def test_closing_closes_everything() -> None:
    gc.collect()  # what earlier tests left is not ours to count
    before = len(list(Path("/proc/self/fd").iterdir()))
    transport = LocalTransport(MEMORY)
    guest = Guest(transport, SELF_JUMP)
    loop = Loop()
    transport.in_event(loop, lambda: None)
    transport.out_event()
    assert len(loop._callbacks) == 2
    transport.close()
    assert len(loop._callbacks) == 1
    loop.close()
    del guest, transport
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@needs_kvm
def test_releasing_twice_closes_nobody_elses(transport: Any) -> None:
    event = transport.out_event()
    transport.release(event.handle)
    if isinstance(transport, LocalTransport):
        other = os.open("/dev/null", os.O_RDONLY)
        assert other == event.handle, "the number is used again"
        transport.release(event.handle)
        os.fstat(other)
        os.close(other)
    else:
        with pytest.raises(OSError, match=r"."):
            transport.release(event.handle)


@needs_kvm
def test_big_arguments_by_value() -> None:
    transport = LocalTransport(MEMORY)
    vm = transport.ioctl_handle(transport.open_kvm(), k.KVM_CREATE_VM)
    assert transport.ioctl(vm, k.KVM_SET_TSS_ADDR, 0xFFFBD000) == 0, "above 2^31"
    transport.close()


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(HvHostError, match=r"/dev/nothing cannot be opened .*--kvm rig"):
        LocalTransport(MEMORY, "/dev/nothing")


def test_a_device_that_is_no_kvm() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(HvHostError, match="/dev/null cannot run a machine with 4 MiB"):
        LocalTransport(MEMORY, "/dev/null")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@needs_kvm
def test_memory_this_computer_does_not_have() -> None:
    with pytest.raises(HvHostError, match="cannot run a machine with 4096 TiB of memory"):
        LocalTransport(1 << 52)


def test_the_rig_has_only_so_many_handles(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    loop = Loop()
    events = [transport.in_event(loop, lambda: None) for _ in range(layout.MAXIMUM_IN_EVENTS)]
    with pytest.raises(HvHostError, match="more events than the rig sends"):
        transport.in_event(loop, lambda: None)
    transport.release(events.pop())
    transport.in_event(loop, lambda: None)
    vectors = [transport.out_event() for _ in range(8)]
    with pytest.raises(HvHostError, match="more interrupts than the rig lent"):
        transport.out_event()
    assert len({vector.descriptor for vector in vectors}) == 8
    transport._free_handles.clear()
    transport.release(events.pop())
    transport._free_handles.clear()
    with pytest.raises(HvHostError, match="more descriptors than the rig keeps"):
        transport.in_event(loop, lambda: None)
    transport.close()
    loop.close()


def test_a_callback_that_fails_does_not_hide_the_next_event(rig: Rig) -> None:
    """Both are in the ring when the loop looks; a signal lost here would hang a channel."""
    transport = RemoteTransport(MEMORY, 1)
    loop = Loop()
    seen: list[str] = []

    def fails() -> None:
        seen.append("first")
        raise RuntimeError("a bug")

    transport.in_event(loop, fails)
    transport.in_event(loop, lambda: seen.append("second"))
    words = transport._control_words
    ring = layout.CONTROL_RAISED_RING // 4
    words[ring], words[ring + 1] = 0, 1
    words[layout.CONTROL_RAISED_HEAD // 4] = 2
    os.eventfd_write(transport._session.events[0], 1)
    loop.call_later(0.2, loop.stop)
    loop.run()
    assert seen == ["first", "second"]
    transport.close()
    loop.close()


def test_doorbells_lost_at_the_start_cost_no_time(rig: Rig) -> None:
    """A busy QEMU learns of a peer's doorbells while the agent rings them already."""
    rig.settings["command"] = ["/bin/sh", "-c", f'exec {rig.stand_in} "$0" slow']
    transport = RemoteTransport(MEMORY, 1)
    doorbell = transport._session.events[layout.CONTROL_DOORBELL]
    for _ in range(5):
        transport.drain_coalesced()
        assert select.select([doorbell], [], [], 1)[0], "from now on every answer rings"
        os.eventfd_read(doorbell)
    transport.close()


def test_a_qemu_that_passes_no_doorbells_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_CALL_SECONDS", 0.1)
    rig.settings["command"] = ["/bin/sh", "-c", f'exec {rig.stand_in} "$0" slow']
    with pytest.raises(HvHostError, match="does not pass doorbells on"):
        RemoteTransport(MEMORY, 1)


def test_a_call_that_is_not_answered_is_the_last(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer may come when the mailbox is somebody else's: nobody uses it again."""
    transport = RemoteTransport(MEMORY, 1)
    monkeypatch.setattr(remote, "_CALL_SECONDS", 0.2)
    (qemu_process,) = rig.qemus()
    stop(qemu_process)
    with pytest.raises(HvHostError, match="has not answered a call for 0 s"):
        transport.drain_coalesced()
    os.kill(qemu_process, signal.SIGCONT)
    with pytest.raises(HvHostError, match="has not answered a call for 0 s"):
        transport.drain_coalesced()
    transport.close()


@needs_kvm
def test_a_processor_of_a_rig_that_dies(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 2)
    guest = Guest(transport, SELF_JUMP)
    threading.Timer(0.2, lambda: os.kill(rig.qemus()[0], signal.SIGKILL)).start()
    for call in (guest.vcpu.run, guest.vcpu.kick):
        with pytest.raises(HvHostError, match="the rig's QEMU died"):
            call()
    transport.close()


def test_too_many_processors_for_the_rig(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    with pytest.raises(HvHostError, match="at most 64 virtual processors"):
        transport.start_processor(64, Handle(0))
    transport.close()


# --- the agent's own checks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "arguments", "number"),
    [
        (99, {}, errno.ENOSYS),
        ("OPERATION_CLOSE", {"target": 5}, errno.EBADF),
        ("OPERATION_CLOSE", {"target": 0xFFFFFFF0}, errno.EBADF),
        ("OPERATION_IOCTL", {"target": 0xFFFFFFF0, "request": 0xAE00}, errno.EBADF),
        ("OPERATION_VECTOR_EVENT", {"argument": 0, "keep_as": 1}, errno.EINVAL),
        ("OPERATION_VECTOR_EVENT", {"argument": 160, "keep_as": 1}, errno.EINVAL),
        ("OPERATION_VECTOR_EVENT", {"argument": 40, "keep_as": 5000}, errno.EBADF),
        ("OPERATION_IN_EVENT", {"argument": 512, "keep_as": 1}, errno.EINVAL),
        ("OPERATION_START_PROCESSOR", {"argument": 64}, errno.EINVAL),
        ("OPERATION_START_PROCESSOR", {"argument": 0, "target": 7}, errno.EBADF),
        ("OPERATION_KICK", {"argument": 64}, errno.EINVAL),
        ("OPERATION_KICK", {"argument": 3}, errno.EINVAL),
        (
            "OPERATION_IOCTL",
            {"fixups": [(0x6000 - 7, layout.FIXUP_ADD_BAR, 0)], "argument": bytearray(8)},
            errno.EINVAL,
        ),
        (
            "OPERATION_IOCTL",
            {"fixups": [(0xFFFFFFFC, layout.FIXUP_ADD_BAR, 0)], "argument": bytearray(8)},
            errno.EINVAL,
        ),
        ("OPERATION_IOCTL", {"fixups": [(0, 9, 0)], "argument": bytearray(8)}, errno.EINVAL),
        (
            "OPERATION_IOCTL",
            {"fixups": [(0, layout.FIXUP_ADD_BAR, 0)] * 17, "argument": bytearray(8)},
            errno.EINVAL,
        ),
    ],
)
def test_the_agent_checks_what_it_is_told(
    rig: Rig, operation: int | str, arguments: dict[str, object], number: int
) -> None:
    """It runs under the sanitizers: a check that is missing ends it."""
    transport = RemoteTransport(MEMORY, 1)
    code = getattr(layout, operation) if isinstance(operation, str) else operation
    with pytest.raises(OSError, match=r".") as caught:
        transport._mailbox.call(code, **arguments)  # type: ignore[arg-type]
    assert caught.value.errno == number
    transport.drain_coalesced()
    transport.close()


def test_a_handle_in_use_is_not_given_again(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    call = transport._mailbox.call
    call(layout.OPERATION_IN_EVENT, argument=0, keep_as=3)
    with pytest.raises(OSError, match="Bad file descriptor"):
        call(layout.OPERATION_IN_EVENT, argument=1, keep_as=3)
    call(layout.OPERATION_CLOSE, 3)
    call(layout.OPERATION_IN_EVENT, argument=1, keep_as=3)
    transport.close()


# --- which one ----------------------------------------------------------------------------------


def test_what_this_computer_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags: list[str] = []
    read_text = Path.read_text

    def cpuinfo(path: Path, *arguments: object) -> str:
        if str(path) == "/proc/cpuinfo":
            return f"processor: 0\nflags\t: fpu {' '.join(flags)}\nbugs: svm\n"
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", cpuinfo)
    assert detect.why_not_local() == (
        "the processor offers no hardware virtualization (neither svm nor vmx)"
    )
    for flag in ("vmx", "svm"):
        flags[:] = [flag]
        assert detect.why_not_local("/dev/nothing") == (
            "/dev/nothing cannot be opened (No such file or directory)"
        )
    answer = detect.why_not_local("/dev/null")
    assert answer is not None
    assert answer.startswith("/dev/null does not answer as a KVM")

    answers: dict[int, int] = {}
    monkeypatch.setattr(fcntl, "ioctl", lambda descriptor, request, number: answers.get(number, 1))
    assert detect.why_not_local("/dev/null") is None
    for capability in detect.NEEDED:
        answers.clear()
        answers[int(capability)] = 0
        assert detect.why_not_local("/dev/null") == f"/dev/null lacks KVM_CAP_{capability.name}"


def test_a_choice_that_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "why_not_local", lambda: "it lacks everything")
    config = MachineConfig("m", "/kernel", transport=Transport.LOCAL)
    with pytest.raises(HvHostError, match="--kvm local is not possible: it lacks everything"):
        detect.connect(config, lambda text: None)


@pytest.mark.parametrize(
    ("choice", "able", "expected"),
    [
        (Transport.AUTO, True, "local"),
        (Transport.AUTO, False, "rig"),
        (Transport.LOCAL, True, "local"),
        (Transport.RIG, True, "rig"),
    ],
)
def test_which_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, choice: Transport, able: bool, expected: str
) -> None:
    monkeypatch.setattr(detect, "why_not_local", lambda: None if able else "no")
    monkeypatch.setattr(local, "LocalTransport", lambda memory, shared: ("local", memory, shared))
    monkeypatch.setattr(remote, "RemoteTransport", lambda memory, cpus, tell: ("rig", memory, cpus))
    config = MachineConfig(
        "m", "/kernel", transport=choice, memory=64 << 20, cpus=3, storage_process=True
    )
    taken = detect.connect(config, lambda text: None)
    assert config.backing > 64 << 20, "memory may be added while the machine runs"
    assert taken == (
        ("local", config.backing, True) if expected == "local" else ("rig", config.backing, 3)
    )  # type: ignore[comparison-overlap]


@needs_kvm
def test_memory_that_the_computer_gets_back(transport: Any) -> None:
    """What is discarded reads as zero, and the computer holds it no more."""
    page = 4096
    transport.memory[: 64 * page] = b"\xa5" * (64 * page)
    held = transport.resident(0, MEMORY)
    assert held >= 64 * page
    transport.discard(16 * page, 32 * page)
    assert transport.memory[15 * page : 49 * page] == (
        b"\xa5" * page + bytes(32 * page) + b"\xa5" * page
    )
    # Reading brought them in again, anonymous memory as the one page of zeros.
    transport.discard(16 * page, 32 * page)
    assert transport.resident(16 * page, 32 * page) == 0
    assert transport.resident(0, 16 * page) == 16 * page


def test_code_is_loaded_into_ones_own_memory_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows in the rig's memory is another machine's."""
    mine, other = RemoteTransport(MEMORY, 1), RemoteTransport(MEMORY, 1)
    assert mine.share()[1] < other.share()[1]
    other.memory[8192:12288] = b"\xa5" * 4096
    mine.code_loaded()
    mine.memory[8192:12288] = b"\x5a" * 4096
    mine.code_loaded()
    assert mine.memory[8192:12288] == b"\x5a" * 4096
    assert other.memory[8192:12288] == b"\xa5" * 4096

    def broken(*arguments: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "lseek", broken)
        with pytest.raises(OSError, match="Input/output error"):
            mine.code_loaded()
    for each in (mine, other):
        each.close()


def test_an_answer_that_came_with_the_rigs_end_counts(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    mailbox = transport._mailbox
    epoll, post = mailbox._epoll, mailbox.post

    class BothAtOnce:
        def poll(self, patience: float, most: int) -> list[tuple[int, int]]:
            mailbox._words[mailbox._state] = mailbox._done
            return [(mailbox._connection, select.EPOLLIN)]

    mailbox.post = lambda: None  # type: ignore[method-assign]
    mailbox._words[mailbox._state] = mailbox._request
    mailbox._epoll = BothAtOnce()  # type: ignore[assignment]
    mailbox.wait()
    assert mailbox._failure is None
    mailbox._epoll, mailbox.post = epoll, post  # type: ignore[method-assign]
    transport.close()


def test_a_rig_is_left_once(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    transport.close()
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    transport.close()
    for each in others:
        os.close(each)


def test_memory_that_cannot_be_given_back_or_counted_is_a_sentence(rig: Rig) -> None:
    transport = RemoteTransport(MEMORY, 1)
    with pytest.raises(HvHostError, match=r"could not give memory back .*: Invalid argument"):
        transport.discard(1, 4096)
    transport.close()
    with mmap.mmap(-1, 4096) as mapping:
        residence = Residence(mapping)
        with pytest.raises(HvHostError, match="does not tell what memory it holds: "):
            residence.bytes_in(1, 4096)
        del residence
        gc.collect()
