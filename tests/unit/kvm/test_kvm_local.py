"""The local transport's own bookkeeping, over a device that is no KVM: on any computer."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from hvhost.errors import HvHostError
from hvhost.kvm import constants as k
from hvhost.kvm import local
from hvhost.kvm.local import LocalTransport
from hvhost.machine.loop import Loop

MEMORY = 4 << 20


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalTransport]:
    """One whose device only knows how large ``struct kvm_run`` is."""

    def ioctl(descriptor: int, request: int, *more: object) -> int:
        return 12288 if request == k.KVM_GET_VCPU_MMAP_SIZE else fcntl.ioctl(descriptor, request)

    monkeypatch.setattr(local, "fcntl", SimpleNamespace(ioctl=ioctl))
    one = LocalTransport(MEMORY, os.devnull)
    yield one
    one.close()


def test_memory_is_given_away_only_where_it_was_made_to_be(transport: LocalTransport) -> None:
    with pytest.raises(HvHostError, match="was not made shared"):
        transport.share()
    shared = LocalTransport(MEMORY, os.devnull, shared=True)
    descriptor, offset = shared.share()
    assert (os.fstat(descriptor).st_size, offset) == (MEMORY, 0)
    shared.close()


def test_an_error_of_a_call_by_value_is_raised(transport: LocalTransport) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        transport.ioctl(transport.open_kvm(), 0xAEFF)
    assert caught.value.errno == errno.ENOTTY


def test_a_handle_released_twice_closes_nobody_elses(transport: LocalTransport) -> None:
    handle = transport.out_event().handle
    transport.release(handle)
    other = os.open(os.devnull, os.O_RDONLY)
    assert other == handle, "the number is used again"
    transport.release(handle)
    os.fstat(other)
    os.close(other)


def test_only_the_event_that_is_released_is_listened_for_no_more(
    transport: LocalTransport,
) -> None:
    loop = Loop()
    told: list[str] = []

    def tell(name: str) -> None:
        told.append(name)
        loop.stop()

    kept = transport.in_event(loop, lambda: tell("kept"))
    released = transport.in_event(loop, lambda: tell("released"))
    transport.release(released)
    assert kept in loop._callbacks and released not in loop._callbacks
    os.eventfd_write(kept, 1)
    loop.run()
    assert told == ["kept"]
    transport.release(kept)
    loop.close()
