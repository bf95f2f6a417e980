"""Volume snapshots: have the guest's file systems frozen for a moment, and thawed whatever happens.

One request at a time: Linux's driver keeps a single one. The device owes the guest a THAW from the
moment it sends FREEZE; whoever asked for the freeze is expected to ask for the THAW, and if that
does not come within :data:`FROZEN_SECONDS`, or fails because the guest's daemon is gone, the device
sends it by itself, again and again until the guest has taken one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from hvhost.errors import HvHostError
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.protocol import HV_S_OK, IcMessageType
from hvhost.services.vss_protocol import (
    VSS_OFFER,
    VSS_VERSIONS,
    VssOperation,
    request_body,
)
from hvhost.vmbus.channel import Channel, Offer, Packet

logger = logging.getLogger(__name__)

#: Seconds for the answer to a FREEZE, in which the guest writes all that waits to its disks.
FREEZE_SECONDS: Final = 60.0
#: Seconds for other answers; Linux's driver itself gives up on its daemon after 30.
ANSWER_SECONDS: Final = 40.0
#: Seconds for which file systems may stay frozen.
FROZEN_SECONDS: Final = 60.0
#: Seconds between attempts to thaw a guest that failed to.
RETRY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class VssAnswer:
    """The guest's status."""

    status: int

    @property
    def ok(self) -> bool:
        return self.status == HV_S_OK


#: Called once: with the answer, or with why there is none.
Done = Callable[[VssAnswer | HvHostError], None]


class SnapshotService(Protocol):
    """What asks a guest to freeze and thaw; see :class:`Vss`."""

    @property
    def still_frozen(self) -> bool: ...

    def request(self, operation: VssOperation, done: Done) -> None: ...

    def abandon(self, done: Done) -> None: ...


@dataclass(slots=True)
class VssState:
    """``asked`` is not answered yet; ``frozen``: a FREEZE was sent, and no THAW taken since.

    A FREEZE that failed counts too: a daemon may have died over it half-way.
    """

    conversation: ConversationState = field(default_factory=ConversationState)
    asked: VssOperation | None = None
    frozen: bool = False


class Vss:
    """The volume snapshot device; the machine calls :meth:`tick` now and then."""

    offer: Offer = VSS_OFFER

    def __init__(self) -> None:
        self.state = VssState()
        self._conversation = Conversation(
            "vss", IcMessageType.VSS, VSS_VERSIONS, self.state.conversation
        )
        self._done: Done | None = None
        self._asked_at: float | None = None
        self._thaw_at: float | None = None  # when the device sends THAW by itself

    @property
    def ready(self) -> bool:
        """A driver in the guest takes requests (its daemon may still be missing)."""
        return self._conversation.ready

    @property
    def still_frozen(self) -> bool:
        """The guest's file systems were frozen, and nobody has thawed them or reset it since."""
        return self.ready and self.state.frozen and self.state.asked is None

    def request(self, operation: VssOperation, done: Done) -> None:
        """Ask the guest; :class:`HvHostError` if that is not possible now."""
        if not self.ready:
            raise HvHostError(
                "The guest takes no snapshot requests (yet): it has not booted, or its driver "
                "hv_utils is missing; wait, or load it."
            )
        if self.state.asked is not None:
            raise HvHostError(
                f"The guest has not answered {self.state.asked.name} yet; restart its "
                "hv_vss_daemon, or try again later."
            )
        if operation is VssOperation.FREEZE and self.state.frozen:
            raise HvHostError(
                "The guest's file systems are to be thawed first; restart its hv_vss_daemon."
            )
        self._send(operation, done)

    def abandon(self, done: Done) -> None:
        """Who gave *done* waits no more; file systems that are frozen after that are thawed."""
        if self._done is done:
            self._done = None

    def tick(self, now: float) -> None:
        """Give up on answers that do not come, and thaw; *now* in seconds on a steady clock."""
        state = self.state
        if state.asked is not None:
            if self._asked_at is None:
                self._asked_at = now
            elif now - self._asked_at >= _patience(state.asked):
                self._finish(
                    HvHostError(
                        f"The guest did not answer {state.asked.name} within "
                        f"{_patience(state.asked):g} seconds; see whether it hangs, or its "
                        "hv_vss_daemon does."
                    )
                )
        elif state.frozen and self.ready:
            if self._thaw_at is None:
                self._thaw_at = now + FROZEN_SECONDS
            elif now >= self._thaw_at:
                self._thaw_at = now + RETRY_SECONDS
                self._send(VssOperation.THAW, None)

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._conversation.opened(channel)

    def closed(self) -> None:
        self._conversation.closed()
        # File systems stay frozen without a driver: what opens the channel again is asked to thaw.
        self.state.asked, self._thaw_at = None, 0.0
        self._finish(HvHostError("The guest's snapshot service went away; try again."))

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is None:
            return
        operation, answer = self.state.asked, VssAnswer(message.status)
        done, self._done, self.state.asked = self._done, None, None
        if operation is VssOperation.THAW and answer.ok:
            self.state.frozen = False
        elif operation is VssOperation.THAW and done is not None:
            logger.warning("the guest did not thaw its file systems; it will be asked again")
            self._thaw_at = 0.0
        elif operation is VssOperation.FREEZE and done is None:
            logger.warning("the guest answered FREEZE after it was given up")
            self._send(VssOperation.THAW, None)
        if done is not None:
            done(answer)

    def _send(self, operation: VssOperation, done: Done | None) -> None:
        state = self.state
        state.asked, self._done, self._asked_at = operation, done, None
        if operation is VssOperation.FREEZE:
            state.frozen, self._thaw_at = True, None
        # A channel that faults over it ends the request in closed().
        self._conversation.request(request_body(operation))

    def _finish(self, result: VssAnswer | HvHostError) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(result)


def _patience(operation: VssOperation) -> float:
    return FREEZE_SECONDS if operation is VssOperation.FREEZE else ANSWER_SECONDS
