"""One Hyper-V socket connection as a device of the bus: a state machine without sockets.

What belongs to it on the host is a :class:`Stream`. Flow is controlled on both sides: a stream
gives data only while the device is :attr:`~SocketDevice.writable`, and makes the device
:attr:`~SocketDevice.paused` while it cannot pass on what it got. Neither keeps more than what one
look into a ring brought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hvhost.errors import LocalProtocolError, RemoteProtocolError
from hvhost.sockets.protocol import FIN, data_size, decode_data, encode_data
from hvhost.vmbus.channel import Channel, Offer, Packet, PacketType


class Stream(Protocol):
    """The host's end of a connection; called with the bus's lock held."""

    def connected(self) -> None:
        """The guest took the connection."""

    def received(self, data: bytes) -> None:
        """The guest sent *data*."""

    def finished(self) -> None:
        """The guest sends no more; it may still receive."""

    def settle(self) -> None:
        """All there is for now was received, and room in the ring was used: move data on."""

    def disconnected(self) -> None:
        """The connection is over, by whatever cause; the device is of no more use."""


@dataclass(slots=True)
class SocketState:
    """A connection does not outlive the machine's run: there is nothing to resume it with."""

    fin_sent: bool = False
    fin_received: bool = False


class SocketDevice:
    """A connection to be offered with *offer* (see :mod:`hvhost.sockets.protocol`)."""

    def __init__(self, offer: Offer, stream: Stream) -> None:
        self.offer = offer
        self.state = SocketState()
        self._stream = stream
        self._channel: Channel | None = None
        self._data_size = 0

    @property
    def data_size(self) -> int:
        """Most bytes to be given to :meth:`send` at once."""
        return self._data_size

    @property
    def writable(self) -> bool:
        """Data may be sent; once that is false, wait for ``settle`` to look again."""
        return self.flushed and not self.state.fin_sent

    @property
    def flushed(self) -> bool:
        """The channel is open and all that was sent lies in the ring."""
        return self._channel is not None and self._channel.queued == 0

    @property
    def paused(self) -> bool:
        """Nothing is taken out of the guest's ring."""
        return self._channel is not None and self._channel.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        if self._channel is not None:
            self._channel.paused = paused

    def send(self, data: bytes) -> None:
        """Send up to :attr:`data_size` bytes; :class:`LocalProtocolError` unless writable."""
        self._send(encode_data(data))

    def finish(self) -> None:
        """Tell the guest that no more comes; :class:`LocalProtocolError` unless writable."""
        self._send(FIN)
        self.state.fin_sent = True

    def _send(self, payload: bytes) -> None:
        if self._channel is None or not self.writable:
            raise LocalProtocolError(f"{self.offer.name} cannot be written to now.")
        self._channel.send(payload)

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._channel = channel
        self._data_size = data_size(channel.outgoing_size)
        channel.settle = self._stream.settle
        self._stream.connected()

    def closed(self) -> None:
        self._channel = None
        self._stream.disconnected()

    def received(self, packet: Packet) -> None:
        if packet.type is not PacketType.DATA_INBAND:
            raise RemoteProtocolError(f"{self.offer.name} got a packet {packet.type.name}.")
        data = decode_data(packet.payload)
        if self.state.fin_received:
            raise RemoteProtocolError(f"{self.offer.name} got a packet after the last one.")
        if data:
            self._stream.received(data)
        else:
            self.state.fin_received = True
            self._stream.finished()
