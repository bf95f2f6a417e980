"""Shutdown: ask the guest to power off, restart or hibernate, as its own administrator would.

Source: ``linux/hyperv.h`` (``shutdown_msg_data``), ``drivers/hv/hv_util.c``. The guest answers at
once whether it will; that it did shows when it writes its sleep state or resets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hvhost.errors import HvHostError
from hvhost.machine.model import ShutdownAction
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.protocol import (
    DISPLAY_MESSAGE_BYTES,
    SHTDN_REASON_FLAG_PLANNED,
    SHUTDOWN_OFFER,
    SHUTDOWN_VERSIONS,
    IcMessageType,
    IcVersion,
    ShutdownFlags,
    ShutdownMessage,
)
from hvhost.vmbus.channel import Channel, Offer, Packet

_FLAGS = {
    ShutdownAction.POWER_OFF: ShutdownFlags(0),
    ShutdownAction.REBOOT: ShutdownFlags.RESTART,
}
_HIBERNATE_VERSION = IcVersion(3, 2)


@dataclass(slots=True)
class ShutdownState:
    """Everything needed to resume the device."""

    conversation: ConversationState = field(default_factory=ConversationState)


class Shutdown:
    """The shutdown device; *on_reply* gets the guest's HRESULT (0: it will do as asked)."""

    offer: Offer = SHUTDOWN_OFFER

    def __init__(self, *, on_reply: Callable[[int], None] = lambda status: None) -> None:
        self.state = ShutdownState()
        self._on_reply = on_reply
        self._conversation = Conversation(
            "shutdown", IcMessageType.SHUTDOWN, SHUTDOWN_VERSIONS, self.state.conversation
        )

    @property
    def ready(self) -> bool:
        """A driver in the guest takes requests."""
        return self._conversation.ready

    @property
    def can_hibernate(self) -> bool:
        """The guest's driver knows hibernation; the guest may still decline it."""
        return self.ready and self.state.conversation.version >= _HIBERNATE_VERSION

    def request(self, action: ShutdownAction, force: bool = False, reason: str = "") -> None:
        """Ask for *action*; *force* asks the guest not to wait for its programs.

        *reason* is a text for the guest's log, cut to what the message holds.
        :class:`HvHostError` if no driver is there or a request is unanswered.
        """
        self._request(_FLAGS[action], force, reason)

    def request_hibernation(self, force: bool = False, reason: str = "") -> None:
        """As :meth:`request`; :class:`HvHostError` also if the guest cannot hibernate."""
        if self.ready and not self.can_hibernate:
            raise HvHostError(
                "The guest's shutdown driver does not know hibernation; shut it down instead."
            )
        self._request(ShutdownFlags.HIBERNATE, force, reason)

    def _request(self, flags: ShutdownFlags, force: bool, reason: str) -> None:
        if not self.ready:
            raise HvHostError(
                "The guest has no shutdown driver (yet); wait until it has booted or stop it "
                "by force."
            )
        if self.state.conversation.unanswered:
            raise HvHostError(
                "The guest has not answered the last shutdown request yet; wait or stop it by "
                "force."
            )
        message = ShutdownMessage(
            reason_code=SHTDN_REASON_FLAG_PLANNED,
            timeout_seconds=0,
            flags=flags | ShutdownFlags.FORCE if force else flags,
            # What hosts encode it in is not documented and Linux does not read it: UTF-8.
            display_message=reason.encode()[: DISPLAY_MESSAGE_BYTES - 1],
        )
        self._conversation.request(message.pack())

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._conversation.opened(channel)

    def closed(self) -> None:
        self._conversation.closed()

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is not None:
            self._on_reply(message.status)
