"""What goes wrong in a whole machine: it ends with one sentence, and leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_transport import (
    FakeTransport,
    Other,
    Script,
)
from machine_life import MEMORY, Life, life

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm.constants import Exit
from hvhost.machine import machine as machine_module
from hvhost.machine.model import MachineConfig, MachineState


def test_internal_errors_are_a_failure_with_a_sentence() -> None:
    def guest(kvm: FakeTransport) -> Script:
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest,)) as one:
        one.ended()
        info = one.machine.info()
        assert info.state is MachineState.FAILED
        assert info.error == info.last_stop
        assert info.error == "KVM stopped virtual processor 0 with INTERNAL_ERROR (detail 0x1)."
        assert one.kinds()[-1] == ("stopped", info.error)


def test_a_failure_of_the_last_boot_does_not_end_this_one() -> None:
    waiting = threading.Event()

    def guest(kvm: FakeTransport) -> Script:
        waiting.wait(10)
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest,)) as one:
        loop_is_busy = threading.Event()
        one.loop.call_soon_threadsafe(lambda: loop_is_busy.wait(10))
        one.machine.reset()
        waiting.set()
        computer = one.machine._computer
        assert computer is not None
        one.wait_for(lambda: computer._over)
        loop_is_busy.set()
        one.wait_for(lambda: one.machine.info().boots == 2)
        time.sleep(0.05)
        assert one.machine.info().state is MachineState.RUNNING


def test_processors_that_fail_at_once_tell_once() -> None:
    together = threading.Barrier(4)
    told: list[str] = []

    def guest(kvm: FakeTransport) -> Script:
        together.wait(10)
        yield Other(Exit.INTERNAL_ERROR, 1)

    with life((guest, guest, guest), cpus=3) as one:
        computer = one.machine._computer
        assert computer is not None
        computer._notices = replace(computer._notices, failed=told.append)
        together.wait(10)
        for processor in computer.processors:
            processor._thread.join(10)
        assert len(told) == 1


def test_a_tick_that_fails_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine_module, "INTERVAL", 0.01)
    with life() as one:
        ticks: list[int] = []
        computer = one.machine._computer
        assert computer is not None

        def tick() -> None:
            ticks.append(1)
            raise RuntimeError("a bug")

        monkeypatch.setattr(computer, "tick", tick)
        one.wait_for(lambda: len(ticks) > 3)


def test_a_rig_that_dies_is_one_clean_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every processor and the loop's own calls see it; people are told once."""
    monkeypatch.setattr(machine_module, "INTERVAL", 0.01)
    reason = "the rig's QEMU died: it printed nothing"
    with caplog.at_level(logging.DEBUG), life((), cpus=4) as one:
        time.sleep(0.05)
        one.transports[0].die(reason)
        one.ended()
        info = one.machine.info()
        assert info.state is MachineState.FAILED
        assert info.error == reason
        assert [event for event in one.kinds() if event[0] == "stopped"] == [("stopped", reason)]
    assert not [record for record in caplog.records if record.exc_info], "a traceback"
    assert len([each for each in caplog.records if each.levelno >= logging.ERROR]) == 1


def test_a_kvm_that_cannot_be_reached() -> None:
    one = Life()
    one.fail_connect = HvHostError("no KVM; run `hvhost doctor`.")
    with pytest.raises(HvHostError, match="no KVM"):
        one.machine.power_on()
    one.fail_connect = OSError(errno.ENOMEM, "Cannot allocate memory")
    with pytest.raises(HvHostError, match=r"'test' could not be built .*Cannot allocate memory"):
        one.machine.power_on()
    assert one.machine.info().state is MachineState.STARTING
    one.loop.close()


@pytest.mark.parametrize(
    "request_number",
    [
        k.KVM_CREATE_VM,
        k.KVM_CREATE_IRQCHIP,
        k.KVM_SET_USER_MEMORY_REGION,
        k.KVM_IRQFD,
        k.KVM_CREATE_VCPU,
        k.KVM_SET_CPUID2,
        k.KVM_SET_GSI_ROUTING,
        k.KVM_X86_SET_MSR_FILTER,
        k.KVM_SET_SREGS,
    ],
)
def test_a_machine_that_cannot_be_built_leaves_nothing(request_number: int) -> None:
    one = Life()
    connect = one.connect

    def failing() -> FakeTransport:
        transport = connect()
        transport.failures[request_number] = errno.EBUSY
        return transport

    one.machine._connect = failing
    with pytest.raises(HvHostError):
        one.machine.power_on()
    assert one.transports[0].closed == 1
    assert one.readers == 0
    assert one.machine._computer is None
    one.loop.close()


def test_a_reset_that_fails_is_a_failure() -> None:
    with life() as one:
        one.fail_connect = HvHostError("the rig has no room.")
        one.machine.reset()
        one.ended()
        info = one.machine.info()
        assert info.error == "the machine could not be reset: the rig has no room."
        assert info.state is MachineState.FAILED
        assert one.kinds()[-1] == ("stopped", info.error)


def test_an_initrd_that_is_gone_at_the_next_boot(tmp_path: Path) -> None:
    one = Life()
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"files")
    one.machine._config = MachineConfig("test", "/kernel", initrd=str(initrd), memory=MEMORY)
    one.start()
    initrd.unlink()
    one.machine.reset()
    one.ended()
    error = one.machine.info().error
    assert error is not None
    assert error.startswith("the machine could not be reset: machine 'test' could not be built")
    assert "No such file" in error
    one.loop.close()


def test_a_computer_that_does_not_close_does_not_keep_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Life()
    one.start()
    computer = one.machine._computer
    assert computer is not None
    close = computer.close

    def failing() -> None:
        close()
        raise OSError(errno.EIO, "a bug")

    computer.close = failing  # type: ignore[method-assign]
    one.machine.force_stop()
    one.ended()
    assert one.machine.info().state is MachineState.STOPPED
    one.loop.close()
