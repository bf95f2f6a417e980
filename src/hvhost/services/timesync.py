"""Time synchronization: the host's time for the guest.

Source: ``linux/hyperv.h``, ``drivers/hv/hv_util.c``. A SYNC makes the guest set its clock at once:
sent when the guest opens the channel, after its time stood still (a resumed or restored machine
calls :meth:`TimeSync.sync`) and when a person asks. In between come samples only, from which the
guest keeps the PTP clock ``hyperv`` that its own time daemon follows or not: a host that set the
clock regularly would fight that daemon.

A sample every five seconds is what Hyper-V sends; two clocks that run 100 ppm apart differ by half
a millisecond by then. Samples ride on the machine's heartbeat ticks, so that neither host nor guest
wakes up for them alone, and none is sent while one is unanswered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hvhost.errors import HvHostError
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.protocol import IcMessageType
from hvhost.services.timesync_protocol import (
    TIMESYNC_OFFER,
    TIMESYNC_VERSIONS,
    TimeSample,
    TimesyncFlags,
    host_time,
    timesync_body,
)
from hvhost.vmbus.channel import Channel, Offer, Packet

#: Seconds between two samples, at least.
SAMPLE_INTERVAL: Final = 5.0
#: A pair of clock readings this close together, in seconds, needs no better one.
GOOD_ERROR: Final = 10e-6
READINGS: Final = 8
_UNANSWERED_LIMIT: Final = 8


def read_clocks(
    reference_nanoseconds: Callable[[], int],
    wall_nanoseconds: Callable[[], int] = time.time_ns,
    monotonic: Callable[[], float] = time.perf_counter,
) -> TimeSample:
    """The host's clock and the partition's reference counter at the same moment.

    The counter may be far away (a call to another kernel): it was read somewhere between two
    looks at the host's clock, and the middle is off by half their distance at most. The closest of
    a few tries is taken.
    """
    best: TimeSample | None = None
    for _ in range(READINGS):
        started = monotonic()
        before = wall_nanoseconds()
        reference = reference_nanoseconds()
        distance = monotonic() - started
        error = distance / 2
        if best is None or error < best.error:
            best = TimeSample(host_time(before + round(error * 1e9)), reference // 100, error)
        if error <= GOOD_ERROR:
            break
    assert best is not None
    return best


@dataclass(slots=True)
class TimeSyncState:
    """``last_sample`` is when the guest was last told the time, on the clock of the ticks."""

    conversation: ConversationState = field(default_factory=ConversationState)
    last_sample: float | None = None


class TimeSync:
    """The time synchronization device; *read* gives both clocks."""

    offer: Offer = TIMESYNC_OFFER

    def __init__(self, read: Callable[[], TimeSample]) -> None:
        self.state = TimeSyncState()
        #: What the guest was told last, ``None`` before the first.
        self.sample: TimeSample | None = None
        self._read = read
        self._conversation = Conversation(
            "timesync", IcMessageType.TIMESYNC, TIMESYNC_VERSIONS, self.state.conversation
        )
        self._waiting: dict[int, Callable[[bool], None]] = {}

    @property
    def ready(self) -> bool:
        """A driver in the guest takes the time."""
        return self._conversation.ready

    def sync(self, done: Callable[[bool], None] = lambda taken: None) -> None:
        """Have the guest set its clock now; *done* hears whether its driver took the message.

        :class:`HvHostError` if no driver is there or it has stopped answering.
        """
        if not self.ready:
            raise HvHostError(
                "The guest has no time synchronization driver (yet); wait until it has booted, or "
                "load hv_utils in it."
            )
        if len(self.state.conversation.unanswered) >= _UNANSWERED_LIMIT:
            raise HvHostError(
                "The guest has not answered the last time messages; see whether it hangs."
            )
        transaction = self._send(TimesyncFlags.SYNC)
        if transaction is None:
            done(False)
        else:
            self._waiting[transaction] = done

    def tick(self, now: float) -> None:
        """Send a sample if the last is old enough; *now* in seconds on any steady clock."""
        state, conversation = self.state, self._conversation
        last = state.last_sample
        if last is not None and last <= now < last + SAMPLE_INTERVAL:
            return
        if not self.ready or conversation.blocked or state.conversation.unanswered:
            return
        state.last_sample = now
        self._send(TimesyncFlags.SAMPLE)

    def _send(self, flags: TimesyncFlags) -> int | None:
        self.sample = self._read()
        body = timesync_body(self.state.conversation.version, self.sample, flags)
        return self._conversation.request(body)

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._conversation.opened(channel)

    def closed(self) -> None:
        self._conversation.closed()
        self.state.last_sample = None
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            done(False)

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is not None:
            # The body is the host's own, sent back; the status is all that the guest says.
            done = self._waiting.pop(message.transaction_id, None)
            if done is not None:
                done(message.status == 0)
        elif self.ready:
            self._send(TimesyncFlags.SYNC)
