"""Heartbeat: is the guest alive?

Source: ``linux/hyperv.h`` (``heartbeat_msg_data``), ``drivers/hv/hv_util.c``. The host sends a
sequence number every two seconds; the driver sends it back plus one, from interrupt context: a
guest that no longer takes interrupts no longer answers.

The device never waits: the machine calls :meth:`Heartbeat.tick` every ``interval`` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.model import HeartbeatStatus
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.protocol import (
    HEARTBEAT_OFFER,
    HEARTBEAT_VERSIONS,
    IcMessageType,
    heartbeat_body,
    parse_heartbeat,
)
from hvhost.vmbus.channel import Channel, Offer, Packet

#: Seconds between two heartbeats.
INTERVAL: Final = 2.0
#: Intervals of silence after which contact is lost.
MISSED: Final = 3
#: A hung guest is not sent more than this; it finds them all when it wakes up.
UNANSWERED_LIMIT: Final = 8


@dataclass(slots=True)
class HeartbeatState:
    """``silence`` is how many seconds a heartbeat has been unanswered; ``crashed`` stays until the
    machine takes it back or a new driver opens the channel; ``paused`` while the machine is."""

    conversation: ConversationState = field(default_factory=ConversationState)
    sequence: int = 0
    silence: float = 0.0
    crashed: bool = False
    paused: bool = False


@dataclass(slots=True)
class _Measurement:
    count: int
    done: Callable[[list[float]], None]
    transaction: int | None = None
    round_trips: list[float] = field(default_factory=list)


class Heartbeat:
    """The heartbeat device.

    *interval* in seconds; *clock* gives seconds for round trips; *on_status* is told every change.
    """

    offer: Offer = HEARTBEAT_OFFER

    def __init__(
        self,
        *,
        state: HeartbeatState | None = None,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
        on_status: Callable[[HeartbeatStatus], None] = lambda status: None,
    ) -> None:
        self.state = HeartbeatState() if state is None else state
        #: Seconds the last answered heartbeat took, ``None`` before the first.
        self.round_trip: float | None = None
        self.interval = interval
        self._clock, self._on_status = clock, on_status
        self._conversation = Conversation(
            "heartbeat", IcMessageType.HEARTBEAT, HEARTBEAT_VERSIONS, self.state.conversation
        )
        self._sent_at: dict[int, float] = {}
        self._last_tick: float | None = None
        self._told = HeartbeatStatus.NO_DRIVER
        self._measurement: _Measurement | None = None

    @property
    def ready(self) -> bool:
        """A driver in the guest answers heartbeats."""
        return self._conversation.ready

    def status(self, now: float) -> HeartbeatStatus:
        """What is known at *now*, on the clock :meth:`tick` is called with.

        Time in which nobody called :meth:`tick` (a paused machine, a busy computer) counts as one
        interval at most, so that a guest is not declared lost for having been stopped itself.
        """
        state = self.state
        if state.crashed:
            return HeartbeatStatus.CRASHED
        if state.paused:
            return HeartbeatStatus.PAUSED
        if not self._conversation.ready:
            return HeartbeatStatus.NO_DRIVER
        if self._silence(now) >= MISSED * self.interval:
            return HeartbeatStatus.NO_CONTACT
        return HeartbeatStatus.OK

    def tick(self, now: float) -> None:
        """An interval has passed: judge the guest's silence, send the next heartbeat."""
        state = self.state
        state.silence, self._last_tick = self._silence(now), now
        self._tell(self.status(now))
        if (
            self._conversation.ready
            and self._measurement is None
            and not self._conversation.blocked
            and len(state.conversation.unanswered) < UNANSWERED_LIMIT
        ):
            self._beat()

    def set_crashed(self, crashed: bool) -> None:
        """The machine knows that the guest panicked, or that it was reset since."""
        self.state.crashed = crashed
        self._tell(self._status_now())

    def set_paused(self, paused: bool, now: float) -> None:
        """The machine stands still, or goes on: *now*, from when on silence counts again."""
        if paused:
            self.state.silence = self._silence(now)
        self.state.paused, self._last_tick = paused, now
        self._tell(self._status_now())

    def measure(self, count: int, done: Callable[[list[float]], None]) -> None:
        """Send *count* heartbeats, each when the one before was answered.

        *done* gets their round trips in seconds; fewer than *count* if the channel closed.
        :class:`HvHostError` if no driver is there or a measurement runs.
        """
        if count < 1:
            raise HvHostError(f"{count} heartbeats cannot be measured; ask for at least one.")
        if not self._conversation.ready:
            raise HvHostError("The guest has no heartbeat driver yet; wait until it has booted.")
        if self._measurement is not None:
            raise HvHostError("Heartbeats are being measured already; wait for that to end.")
        self._measurement = measurement = _Measurement(count, done)
        measurement.transaction = self._beat()

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self.state.crashed = False
        self._conversation.opened(channel)

    def restored(self, channel: Channel) -> None:
        self._conversation.restored(channel)

    def closed(self) -> None:
        self._conversation.closed()
        self._sent_at.clear()
        self.state.silence = 0.0
        self._tell(self._status_now())
        self._end_measurement()

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is None:
            self._tell(self._status_now())
            if self._conversation.ready:
                self._beat()
            return
        parse_heartbeat(message.data)
        now = self._clock()
        self.round_trip = now - self._sent_at.pop(message.transaction_id, now)
        self.state.silence = 0.0
        if self._told is not HeartbeatStatus.OK:
            self._tell(self._status_now())
        measurement = self._measurement
        if measurement is not None and measurement.transaction == message.transaction_id:
            measurement.round_trips.append(self.round_trip)
            if len(measurement.round_trips) < measurement.count:
                measurement.transaction = self._beat()
            else:
                self._end_measurement()

    def _beat(self) -> int | None:
        """Send one heartbeat; its transaction, ``None`` if the channel faulted over it."""
        self.state.sequence += 1
        started = self._clock()
        transaction = self._conversation.request(heartbeat_body(self.state.sequence))
        if transaction is not None:
            self._sent_at[transaction] = started
        return transaction

    def _end_measurement(self) -> None:
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            measurement.done(measurement.round_trips)

    def _silence(self, now: float) -> float:
        """Seconds for which a heartbeat has been unanswered."""
        if not self.state.conversation.unanswered or self._last_tick is None:
            return 0.0
        return self.state.silence + min(max(now - self._last_tick, 0.0), self.interval)

    def _status_now(self) -> HeartbeatStatus:
        """The status as of the last tick."""
        return self.status(self._last_tick or 0.0)

    def _tell(self, status: HeartbeatStatus) -> None:
        if status is not self._told:
            self._told = status
            self._on_status(status)
