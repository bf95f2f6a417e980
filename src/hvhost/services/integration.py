"""The conversation every integration service has: negotiate, then requests and their answers.

A service device owns one :class:`Conversation` and hands it the channel's events; what its messages
mean is the device's business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from hvhost.errors import LocalProtocolError, RemoteProtocolError
from hvhost.services.protocol import (
    FRAMEWORK_VERSIONS,
    IcFlags,
    IcMessage,
    IcMessageType,
    IcVersion,
    decode,
    encode,
    negotiate_body,
    parse_choice,
)
from hvhost.vmbus.channel import Channel, Packet, PacketType

logger = logging.getLogger(__name__)

_OLDEST = FRAMEWORK_VERSIONS[0]
_RESPONSE: Final = int(IcFlags.RESPONSE)  # arithmetic on flags is slow
_TRANSACTIONS: Final = 256  # ictransaction_id is a byte


class Phase(StrEnum):
    """Where a conversation is; ``REFUSED`` is a guest that likes none of our versions."""

    CLOSED = "closed"
    NEGOTIATING = "negotiating"
    READY = "ready"
    REFUSED = "refused"


@dataclass(slots=True)
class ConversationState:
    """All that is needed to resume: the versions agreed on, and which requests are unanswered."""

    phase: Phase = Phase.CLOSED
    framework: IcVersion = _OLDEST
    version: IcVersion = _OLDEST
    last_transaction: int = 0
    unanswered: set[int] = field(default_factory=set)


class Conversation:
    """Negotiation and transactions of one service over one channel.

    *versions* are the service's, oldest first; all requests are of *message_type*.
    """

    def __init__(
        self,
        name: str,
        message_type: IcMessageType,
        versions: Sequence[IcVersion],
        state: ConversationState,
    ) -> None:
        self.name, self.state = name, state
        self._message_type, self._versions = message_type, tuple(versions)
        self._channel: Channel | None = None

    @property
    def ready(self) -> bool:
        """A driver in the guest has agreed on versions."""
        return self.state.phase is Phase.READY

    @property
    def blocked(self) -> bool:
        """Sent messages still wait for room in the guest's ring."""
        return self._channel is not None and self._channel.queued > 0

    def opened(self, channel: Channel) -> None:
        """Start negotiating; guests may take long to answer (KVP waits for its daemon)."""
        self._channel = channel
        self.state.phase = Phase.NEGOTIATING
        self.state.unanswered.clear()
        self._send(
            IcMessageType.NEGOTIATE,
            negotiate_body(FRAMEWORK_VERSIONS, self._versions),
            _OLDEST,
            _OLDEST,
        )

    def restored(self, channel: Channel) -> None:
        """Go on with a channel that was opened elsewhere; the state is as it was then."""
        self._channel = channel

    def closed(self) -> None:
        self._channel = None
        self.state.phase = Phase.CLOSED
        self.state.unanswered.clear()

    def request(self, data: bytes) -> int | None:
        """Send one request; its transaction, ``None`` if the channel faulted over it.

        :class:`LocalProtocolError` unless :attr:`ready`.
        """
        state = self.state
        if not self.ready:
            raise LocalProtocolError(f"the {self.name} service is not ready for requests.")
        return self._send(self._message_type, data, state.framework, state.version)

    def received(self, packet: Packet) -> IcMessage | None:
        """The answer to a request in *packet*, ``None`` if it was the answer to our offer.

        :class:`RemoteProtocolError` if it answers nothing we asked.
        """
        state = self.state
        if packet.type is not PacketType.DATA_INBAND:
            raise RemoteProtocolError(f"the {self.name} service got a packet {packet.type.name}.")
        message = decode(packet.payload)
        if not message.flags & _RESPONSE or message.transaction_id not in state.unanswered:
            raise RemoteProtocolError(
                f"the {self.name} service got message {message.type} of transaction "
                f"{message.transaction_id}, which answers no request of the host."
            )
        negotiating = state.phase is Phase.NEGOTIATING
        if message.type != (IcMessageType.NEGOTIATE if negotiating else self._message_type):
            raise RemoteProtocolError(
                f"the {self.name} service got message {message.type} while {state.phase.value}."
            )
        state.unanswered.discard(message.transaction_id)
        if negotiating:
            self._agree(message)
            return None
        return message

    def _agree(self, message: IcMessage) -> None:
        choice = parse_choice(message.data)
        if choice is None:
            logger.warning("the guest speaks no version of the %s service we know", self.name)
            self.state.phase = Phase.REFUSED
            return
        framework, version = choice
        if framework not in FRAMEWORK_VERSIONS or version not in self._versions:
            raise RemoteProtocolError(
                f"the guest chose {self.name} {version} over framework {framework}, "
                "which was not offered."
            )
        self.state.framework, self.state.version = framework, version
        self.state.phase = Phase.READY

    def _send(
        self, message_type: IcMessageType, data: bytes, framework: IcVersion, version: IcVersion
    ) -> int | None:
        state, channel = self.state, self._channel
        if channel is None:
            raise LocalProtocolError(f"the {self.name} service has no open channel.")
        if len(state.unanswered) >= _TRANSACTIONS:
            raise LocalProtocolError(f"the {self.name} service has no transaction number left.")
        number = (state.last_transaction + 1) % _TRANSACTIONS
        while number in state.unanswered:
            number = (number + 1) % _TRANSACTIONS
        state.last_transaction = number
        state.unanswered.add(number)
        message = encode(
            message_type, data, framework=framework, version=version, transaction_id=number
        )
        return number if channel.send(message, transaction_id=number) else None
