"""The bus of a storage process: rings are read and written here, offers are the worker's to make.

See :mod:`hvhost.storage.process`.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hvhost.errors import RemoteProtocolError
from hvhost.machine.link import Link
from hvhost.machine.loop import Loop
from hvhost.partition.memory import PAGE_SIZE, GuestMemory
from hvhost.partition.synic import Synic
from hvhost.storage import messages
from hvhost.vmbus.channel import Channel, ChannelDevice
from hvhost.vmbus.gpadl import Gpadl, GpaRange


@dataclass(slots=True)
class Door:
    """The eventfd of an open channel, which the guest's signals raise.

    A guest may signal before we know that it was told that its channel is open: ``begun``.
    """

    opening: int
    signal: int
    begun: bool = False


class Line:
    """Implements :class:`hvhost.partition.synic.Line` with an eventfd of the worker's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def trigger(self) -> None:
        os.eventfd_write(self.descriptor, 1)


class Interrupts:
    """Event flags and interrupts of each VP; *flags* and *lines* as with :class:`Attach`."""

    def __init__(self, memory: GuestMemory, flags: int, lines: Sequence[int]) -> None:
        self._pages = memoryview(mmap.mmap(flags, 0, prot=mmap.PROT_READ)).cast("Q")
        self._lines = [Line(os.dup(each)) for each in lines]
        self._synics = [Synic(memory, vp, line, line) for vp, line in enumerate(self._lines)]

    def signal(self, vp: int, sint: int, flag: int) -> None:
        """As :meth:`hvhost.partition.synic.Synic.signal`."""
        synic = self._synics[vp]
        # A guest moves the page when nothing is open that could be signalled there.
        synic.state.event_flags_page = self._pages[vp]
        synic.signal(sint, flag)

    def close(self) -> None:
        """Give the eventfds back."""
        for line in self._lines:
            os.close(line.descriptor)


class Bus:
    """Implements :class:`hvhost.storage.controller.Bus` and the hypervisor below its channels."""

    def __init__(
        self,
        link: Link,
        loop: Loop,
        lock: threading.RLock,
        memory: GuestMemory,
        interrupts: Interrupts,
    ) -> None:
        self._link, self._loop, self._lock, self._memory = link, loop, lock, memory
        self._interrupts = interrupts
        self._numbers = itertools.count(1)
        self._channels: dict[int, Channel] = {}
        self._keys: dict[Channel, int] = {}
        self._doors: dict[int, Door] = {}

    # For storage, with the lock held.

    def add_device(self, device: ChannelDevice) -> Channel:
        key = next(self._numbers)
        offer = device.offer
        channel = self._channels[key] = Channel(
            key,
            device,
            self._memory,
            self,
            violation=lambda sentence: self._violation(key),
            gpadl=_no_gpadl,
        )
        self._keys[channel] = key
        self._link.send(
            messages.Offered(
                key,
                offer.interface_type,
                offer.interface_instance,
                offer.name,
                offer.sub_channel_index,
            )
        )
        return channel

    def remove_device(self, channel: Channel) -> None:
        key = self._keys.pop(channel)
        channel.rescind()
        del self._channels[key]
        self._forget(key)
        self._link.send(messages.Removed(key))

    # For the worker.

    def open(self, message: messages.Open, signal_event: int) -> None:
        """Open a channel; :class:`RemoteProtocolError` if its pages are no rings."""
        key, pages = message.key, array("Q", message.pages)
        self._forget(key)
        self._doors[key] = Door(message.opening, signal_event)
        gpadl = Gpadl(0, key, (GpaRange(len(pages) * PAGE_SIZE, 0, pages),))
        try:
            if key not in self._channels:
                raise RemoteProtocolError("its device is gone.")
            channel = self._channels[key]
            channel.channel_id = message.channel_id
            channel.open(gpadl, message.downstream, message.target_vp)
        except BaseException:
            self._forget(key)
            raise

    def move(self, key: int, target_vp: int) -> None:
        """Interrupt another VP for that channel."""
        if key in self._channels:
            self._channels[key].move(target_vp)

    def begin(self, key: int) -> None:
        """The guest knows that its channel is open."""
        channel, door = self._channels.get(key), self._doors.get(key)
        if channel is not None and door is not None and channel.is_open:
            door.begun = True
            channel.start()

    def close(self, key: int) -> None:
        """The channel is over, and what was begun for it is done."""
        channel = self._channels.get(key)
        if channel is not None and channel.held_open:
            channel.close()
        self._forget(key)

    # For channels.

    def post_message(self, vp: int, sint: int, message_type: int, payload: bytes) -> None:
        raise AssertionError("messages to the guest are the worker's")

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        self._interrupts.signal(vp, sint, flag)

    def connect_signal(self, connection_id: int, channel: Channel) -> None:
        door = self._doors[self._keys[channel]]

        def signalled() -> None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(door.signal)
            process()

        def process() -> None:
            with self._lock:
                if door.begun and channel.process():
                    self._loop.call_soon_threadsafe(process)

        self._loop.add_reader(door.signal, signalled)

    def disconnect_signal(self, connection_id: int) -> None:
        """The descriptor is let go with its door."""

    def _violation(self, key: int) -> None:
        """The worker says that sentence, with the channel's number on the bus."""
        door = self._doors.get(key)
        if door is not None:
            reason = self._channels[key].fault_reason
            self._link.send(messages.Faulted(key, door.opening, reason))

    def _forget(self, key: int) -> None:
        door = self._doors.pop(key, None)
        if door is not None:
            self._loop.remove(door.signal)
            os.close(door.signal)


def _no_gpadl(handle: int, channel_id: int) -> Gpadl:
    raise RemoteProtocolError("storage has no page lists beside its rings.")
