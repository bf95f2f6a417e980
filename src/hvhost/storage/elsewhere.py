"""A machine's storage in a process of its own, as the machine's worker sees it.

The worker negotiates: offers and where the rings are is the bus's business and stays here. The
rings themselves, the disks and all threads that move data are in :mod:`hvhost.storage.process`,
which maps the guest's memory, waits for an eventfd that KVM raises, and interrupts the guest by its
event flags and another eventfd. So disks do not wait for the worker's interpreter, nor the worker
for the disks'.

Whoever holds the bus's lock may wait for the storage process, which therefore never waits for that
lock: what needs it is done on the loop's thread, and nobody waits for that.

A storage process that ends by itself takes its machine along, as a worker does: what the guest
wrote last may be lost, as when a disk loses its power.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from hvhost.errors import HvHostError
from hvhost.machine.config_file import dump_config
from hvhost.machine.link import MOST_FILES, Link, LinkLostError, Received
from hvhost.machine.peripheral import Surroundings
from hvhost.partition.synic import Synic
from hvhost.services.vss import Done, VssAnswer
from hvhost.services.vss_protocol import VssOperation
from hvhost.storage import messages
from hvhost.vmbus.channel import Channel, ChannelState, Offer, Packet

if TYPE_CHECKING:
    from hvhost.machine.computer import Computer

#: How long a process may take to close its disks before it is ended.
_STOP_SECONDS: Final = 60.0
#: One eventfd each goes to the process at once, beside two files.
MOST_PROCESSORS: Final = MOST_FILES - 2


class ChannelElsewhere:
    """Implements :class:`hvhost.vmbus.channel.DeviceElsewhere` for one channel."""

    def __init__(self, offer: Offer, key: int, link: Link) -> None:
        self.offer = offer
        #: The device's state is its process's.
        self.state = None
        self.key, self.opening = key, 0
        self.channel: Channel | None = None
        self.signal = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._link = link

    def signalled(self) -> None:
        os.eventfd_write(self.signal, 1)

    def open_rings(
        self, channel: Channel, pages: array[int], downstream: int, target_vp: int
    ) -> None:
        self.opening += 1
        self._link.request(
            messages.Open(
                self.key, self.opening, channel.channel_id, tuple(pages), downstream, target_vp
            ),
            [self.signal],
        )

    def moved(self, target_vp: int) -> None:
        with contextlib.suppress(LinkLostError):
            self._link.request(messages.Move(self.key, target_vp))

    def opened(self, channel: Channel) -> None:
        self._link.send(messages.Begin(self.key))

    def closed(self) -> None:
        with contextlib.suppress(LinkLostError):  # then nobody is left who could use the memory
            self._link.request(messages.Close(self.key))

    def received(self, packet: Packet) -> None:
        raise AssertionError("what the guest sends is read by the other process")

    def release(self) -> None:
        """Give the eventfd back."""
        os.close(self.signal)


class StorageElsewhere:
    """Implements :class:`hvhost.machine.peripheral.Peripheral` for disks and their backups.

    :class:`HvHostError` or :class:`OSError` if the process cannot be had or a disk be opened.
    """

    def __init__(self, around: Surroundings) -> None:
        if around.config.cpus > MOST_PROCESSORS:
            raise HvHostError(
                f"a storage process serves machines of up to {MOST_PROCESSORS} virtual processors, "
                f"and {around.config.name!r} has {around.config.cpus}; leave --storage-process out."
            )
        self._machine, self._event = around.config.name, around.event
        self._loop, self._vss = around.loop, around.vss
        self._computer: Computer | None = None
        self._channels: dict[int, ChannelElsewhere] = {}
        #: Offers that are made by :meth:`attach` itself, before the guest looks.
        self._first: list[ChannelElsewhere] | None = None
        self._asked: dict[int, Done] = {}
        #: What to do of :meth:`_with_computer` where the loop comes to an end before.
        self._waiting: dict[object, Callable[[], None]] = {}
        self._stopping = False
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hvhost.storage.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._link = Link(
            "the storage process", ours, messages.FROM_STORAGE, self._received, self._link_ended
        )
        self._link.start()
        try:
            self._link.request(messages.Start(dump_config(around.config), str(around.directory)))
        except LinkLostError:
            status = self.process.wait()
            self.close()
            raise HvHostError(
                f"the storage process of machine {self._machine!r} did not start "
                f"({_how_it_ended(status)}); the machine's log says why."
            ) from None
        except BaseException:
            self.close()
            raise
        self._event("storage-process", f"process {self.process.pid} serves the disks")

    # Peripheral.

    def attach(self, computer: Computer) -> None:
        self._computer = computer
        transport = computer.transport
        descriptor, offset = transport.share()
        regions = tuple(
            messages.Region(each.guest_address, each.backing_offset, each.size)
            for each in computer.memory.regions
        )
        flags = _event_flags(computer.synics)
        first = self._first = list[ChannelElsewhere]()
        self._link.request(
            messages.Attach(offset, len(transport.memory), transport.notices_writes, regions),
            [descriptor, flags, *(each.descriptor for each in computer.event_lines)],
        )
        os.close(flags)
        self._first = None
        for device in first:
            self._add(device)
        computer.on_memory = lambda region: self._link.request(
            messages.Plug(messages.Region(region.guest_address, region.backing_offset, region.size))
        )

    def detach(self) -> None:
        self._computer = None
        with contextlib.suppress(LinkLostError):
            self._link.request(messages.Detach())
        while self._channels:
            self._channels.popitem()[1].release()

    def tick(self, now: float) -> None:
        """Nothing of storage needs the time."""

    def close(self) -> None:
        self._stopping = True
        self._give_up()
        with contextlib.suppress(HvHostError, OSError):
            try:
                self._link.request(messages.Stop(), timeout=_STOP_SECONDS)
            except TimeoutError:
                self.process.kill()
        self._link.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # For people.

    family = "storage"

    def call(self, name: str, parameters: str) -> str:
        """A route of storage in the worker's API: JSON of its parameters, JSON of its result."""
        result = self._link.request(messages.Call(name, parameters))
        assert isinstance(result, messages.Result)
        return result.json

    # For the link, on its thread.

    def _received(self, received: Received) -> None:
        message, number = received.message, received.number
        match message:
            case messages.Event():
                self._event(message.kind, message.detail)
            case messages.Written():
                self._link.serve(number, lambda: self._written(message))
            case messages.RequireRunning():
                self._link.serve(number, self._require_running)
            case messages.StillFrozen():
                self._with_computer(
                    lambda: self._link.serve(
                        number,
                        lambda: messages.Result("true" if self._vss.still_frozen else "false"),
                    ),
                    lambda: self._link.reply(number, messages.Result("false")),
                )
            case messages.Ask():
                self._with_computer(
                    lambda: self._ask(message),
                    lambda: self._answer(message.number, HvHostError("The machine was reset.")),
                )
            case messages.Abandon():
                self._with_computer(lambda: self._abandon(message.number))
            case messages.Offered():
                self._offered(message)
            case messages.Removed():
                self._with_computer(lambda: self._remove(message.key))
            case messages.Faulted():
                self._with_computer(lambda: self._fault(message))

    def _with_computer(
        self, function: Callable[[], None], otherwise: Callable[[], None] = lambda: None
    ) -> None:
        """Do something with the bus's lock held, on the loop's thread; *otherwise* without."""
        computer, this = self._computer, object()
        self._waiting[this] = otherwise
        if self._stopping:
            self._give_up()

        def locked() -> None:
            if self._waiting.pop(this, None) is None:
                return
            if computer is None or computer is not self._computer:
                otherwise()
                return
            with computer.lock:
                function()

        self._loop.call_soon_threadsafe(locked)

    def _give_up(self) -> None:
        """The loop does nothing any more, and the storage process must not wait for it."""
        for each in list(self._waiting):
            otherwise = self._waiting.pop(each, None)
            if otherwise is not None:
                otherwise()

    def _link_ended(self) -> None:
        if self._stopping:
            return
        self.process.kill()
        status = self.process.wait()
        why = f"the storage process ended ({_how_it_ended(status)}); start the machine again."

        def fail() -> None:
            computer = self._computer
            assert computer is not None
            computer.fail(why)

        self._with_computer(fail)

    # What the storage process wants.

    def _written(self, message: messages.Written) -> None:
        computer = self._computer
        if computer is not None:
            memory = computer.transport.memory
            computer.memory_written(
                [memory[each.offset : each.offset + each.size] for each in message.places]
            )

    def _require_running(self) -> None:
        computer = self._computer
        if computer is None:
            raise HvHostError("The machine is being reset; try again.")
        computer.require_running()

    def _offered(self, message: messages.Offered) -> None:
        offer = Offer(
            message.interface_type,
            message.interface_instance,
            message.name,
            sub_channel_index=message.sub_channel_index,
        )
        device = ChannelElsewhere(offer, message.key, self._link)
        self._channels[message.key] = device
        if self._first is not None:
            self._first.append(device)
        else:
            self._with_computer(lambda: self._add(device))

    def _add(self, device: ChannelElsewhere) -> None:
        computer = self._computer
        assert computer is not None
        device.channel = computer.bus.add_device(device)

    def _remove(self, key: int) -> None:
        computer, device = self._computer, self._channels.pop(key)
        channel = device.channel
        assert computer is not None and channel is not None
        if channel.state not in (ChannelState.RESCINDED, ChannelState.RELEASED):
            computer.bus.remove_device(channel)
        device.release()

    def _fault(self, message: messages.Faulted) -> None:
        device = self._channels.get(message.key)
        if device is not None and device.channel is not None and device.opening == message.opening:
            device.channel.fault(message.reason)

    def _ask(self, message: messages.Ask) -> None:
        number = message.number

        def done(answer: VssAnswer | HvHostError) -> None:
            self._asked.pop(number, None)
            self._answer(number, answer)

        self._asked[number] = done
        try:
            self._vss.request(VssOperation[message.operation], done)
        except HvHostError as error:
            done(error)

    def _answer(self, number: int, answer: VssAnswer | HvHostError) -> None:
        if isinstance(answer, HvHostError):
            self._link.send(messages.Answered(number, error=str(answer)))
        else:
            self._link.send(messages.Answered(number, answer.status))

    def _abandon(self, number: int) -> None:
        done = self._asked.pop(number, None)
        if done is not None:
            self._vss.abandon(done)


def _event_flags(synics: Sequence[Synic]) -> int:
    """A file of where each VP's event flags are, kept up to date; see :class:`messages.Attach`."""
    descriptor = os.memfd_create("hvhost-synic", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, mmap.PAGESIZE * -(-len(synics) * 8 // mmap.PAGESIZE))
    table = memoryview(mmap.mmap(descriptor, 0)).cast("Q")

    def keep(synic: Synic) -> None:
        synic.on_event_flags = lambda page: table.__setitem__(synic.vp, page)
        synic.on_event_flags(synic.state.event_flags_page)

    for synic in synics:
        keep(synic)
    return descriptor


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"signal {-status}, {signal.Signals(-status).name}"
