"""The bus's way to a guest whose device is in another process."""

from __future__ import annotations

import os
import threading
from array import array
from dataclasses import replace

import pytest
from fake_transport import FakeTransport

from hvhost.errors import LocalProtocolError
from hvhost.kvm.vm import Vm
from hvhost.machine import computer
from hvhost.machine.computer import BusPort
from hvhost.machine.loop import Loop
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.channel import Channel, Offer, Packet
from hvhost.vmbus.gpadl import Gpadl
from simulated.devices import an_offer


class Elsewhere:
    """A device in another process."""

    offer: Offer = replace(an_offer(), name="far")
    state = None

    def __init__(self) -> None:
        self.signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def signalled(self) -> None:
        os.eventfd_write(self.signal, 1)

    def open_rings(
        self, channel: Channel, pages: array[int], downstream: int, target_vp: int
    ) -> None:
        raise LocalProtocolError("nobody opens it here.")

    def moved(self, target_vp: int) -> None: ...

    def opened(self, channel: Channel) -> None: ...

    def closed(self) -> None: ...

    def received(self, packet: Packet) -> None: ...


def no_gpadl(handle: int, channel_id: int) -> Gpadl:
    raise LocalProtocolError("nobody lends pages here.")


def test_kvm_raises_the_other_processs_event_itself() -> None:
    transport, loop, device = FakeTransport(), Loop(), Elsewhere()
    port = BusPort(Vm(transport), loop, threading.RLock())
    channel = Channel(7, device, GuestMemory([]), port, violation=pytest.fail, gpadl=no_gpadl)
    port.connect_signal(channel.connection_id, channel)
    handle = transport.signals[channel.connection_id]
    assert transport.raises[handle] == device.signal and len(loop._callbacks) == 1
    port.disconnect_signal(channel.connection_id)
    assert handle not in transport.handles
    os.close(device.signal)
    loop.close()


def test_a_guest_cannot_use_up_the_hosts_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals of further channels arrive as hypercalls."""
    monkeypatch.setattr(computer, "MAXIMUM_SIGNALS", 2)
    transport, loop, device = FakeTransport(), Loop(), Elsewhere()
    port = BusPort(Vm(transport), loop, threading.RLock())
    channels = [
        Channel(number, device, GuestMemory([]), port, violation=pytest.fail, gpadl=no_gpadl)
        for number in (7, 8, 9)
    ]
    for channel in channels:
        port.connect_signal(channel.connection_id, channel)
    assert set(transport.signals) == {channel.connection_id for channel in channels[:2]}
    port.disconnect_signal(channels[2].connection_id)
    port.disconnect_signal(channels[0].connection_id)
    port.connect_signal(channels[2].connection_id, channels[2])
    assert channels[2].connection_id in transport.signals
    os.close(device.signal)
    loop.close()
