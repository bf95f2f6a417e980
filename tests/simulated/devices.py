"""Devices for tests of the bus: one that answers everything, and one that only remembers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from hvhost.errors import RemoteProtocolError
from hvhost.partition.memory import GuestMemory
from hvhost.vmbus.channel import Channel, Offer, Packet

ECHO_TYPE = uuid.UUID("11111111-2222-3333-4444-555555555555")


def an_offer(number: int = 1) -> Offer:
    return Offer(ECHO_TYPE, uuid.UUID(int=number), f"echo-{number}")


@dataclass
class EchoState:
    packets: int = 0


@dataclass
class Echo:
    """Completes every packet with what it carried, and with the guest memory it points at.

    A payload that starts with ``refuse`` is a violation of its protocol.
    """

    memory: GuestMemory
    offer: Offer = field(default_factory=an_offer)
    state: EchoState = field(default_factory=EchoState)
    channel: Channel | None = None
    opens: int = 0
    closes: int = 0

    def opened(self, channel: Channel) -> None:
        assert self.channel is None
        self.channel = channel
        self.opens += 1

    def restored(self, channel: Channel) -> None:
        assert self.channel is None
        self.channel = channel

    def closed(self) -> None:
        assert self.channel is not None
        self.channel = None
        self.closes += 1

    def received(self, packet: Packet) -> None:
        assert self.channel is not None
        self.state.packets += 1
        if packet.payload.startswith(b"refuse"):
            raise RemoteProtocolError("the guest sent what it must not send.")
        answer = packet.payload + b"".join(
            view for item in packet.ranges for view in item.views(self.memory)
        )
        self.channel.send_completion(packet.transaction_id, answer[:1024])


@dataclass
class Recorder:
    """Keeps what it gets; *on_packet* may do something about it."""

    offer: Offer = field(default_factory=an_offer)
    on_packet: Callable[[Packet], None] = lambda packet: None
    state: None = None
    packets: list[Packet] = field(default_factory=list)
    channel: Channel | None = None

    def opened(self, channel: Channel) -> None:
        self.channel = channel

    def closed(self) -> None:
        self.channel = None

    def received(self, packet: Packet) -> None:
        self.packets.append(packet)
        self.on_packet(packet)
