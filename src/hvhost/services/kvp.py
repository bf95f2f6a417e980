"""Key-value pair exchange: small texts between host and guest, in five pools.

Source: ``drivers/hv/hv_kvp.c``, ``tools/hv/hv_kvp_daemon.c``, ``uapi/linux/hyperv.h``. The guest's
driver hands every request to a daemon, and negotiates only once that daemon runs; until then the
service is not ready. It takes one request at a time, so requests queue here.

A guest that does not answer loses the request, not the service: after ``timeout`` seconds the
request fails and the next one is sent. Linux itself gives its daemon 30 seconds.

The device never waits: the machine calls :meth:`Kvp.tick` every few seconds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from hvhost.errors import HvHostError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.services.integration import Conversation, ConversationState
from hvhost.services.kvp_protocol import (
    HV_GUID_NOTFOUND,
    HV_INVALIDARG,
    HV_S_CONT,
    KVP_OFFER,
    KVP_VERSIONS,
    KvpItem,
    set_message,
)
from hvhost.services.protocol import HV_E_FAIL, HV_S_OK, IcMessageType
from hvhost.vmbus.channel import Channel, Offer, Packet

logger = logging.getLogger(__name__)

#: Seconds for an answer: a little more than Linux gives its daemon.
TIMEOUT: Final = 35.0
#: Requests that may wait for their turn.
QUEUE_LIMIT: Final = 256
#: Items kept for daemons to come.
HOST_ITEMS_LIMIT: Final = 256
#: Requests the guest may leave unanswered before it is asked no more.
UNANSWERED_LIMIT: Final = 8

_MEANINGS = {
    HV_S_CONT: "it has no such item",
    HV_GUID_NOTFOUND: "it has no such network adapter",
    HV_INVALIDARG: "it does not understand the values",
    HV_E_FAIL: "its daemon failed or gave no answer",
}


Content = KvpItem | IpSettings


@dataclass(frozen=True, slots=True)
class KvpAnswer:
    """The guest's HRESULT and, if that is a success, what the request asked for."""

    status: int
    content: Content | None = None

    @property
    def ok(self) -> bool:
        return self.status == HV_S_OK

    @property
    def meaning(self) -> str:
        """The status in words that continue "the guest says"."""
        return _MEANINGS.get(self.status, f"error {self.status:#010x}")


#: Called once: with the answer, or with why there is none.
Done = Callable[[KvpAnswer | HvHostError], None]


@dataclass(slots=True)
class _Request:
    body: bytes
    done: Done
    parse: Callable[[bytes], Content] | None = None
    transaction: int | None = None
    deadline: float | None = None


@dataclass(slots=True)
class KvpState:
    """``host_items`` are what every new daemon of the guest is given, in this order."""

    conversation: ConversationState = field(default_factory=ConversationState)
    host_items: list[tuple[KvpPool, KvpItem]] = field(default_factory=list)


class Kvp:
    """The key-value device.

    *host_items* are written whenever the guest's daemon registers anew; *timeout* in seconds, on
    the clock :meth:`tick` is called with.
    """

    offer: Offer = KVP_OFFER

    def __init__(
        self, host_items: Iterable[tuple[KvpPool, KvpItem]] = (), *, timeout: float = TIMEOUT
    ) -> None:
        self.state = KvpState(host_items=list(host_items))
        self._timeout = timeout
        self._conversation = Conversation(
            "kvp", IcMessageType.KVPEXCHANGE, KVP_VERSIONS, self.state.conversation
        )
        self._queue: deque[_Request] = deque()
        self._current: _Request | None = None

    @property
    def ready(self) -> bool:
        """The guest's driver and its daemon take requests."""
        return self._conversation.ready

    def request(
        self, body: bytes, done: Done, parse: Callable[[bytes], Content] | None = None
    ) -> None:
        """Send *body* (of :mod:`hvhost.services.kvp_protocol`) when its turn comes.

        *parse* makes the answer's content of its body. :class:`HvHostError` if nobody is there, or
        too many requests wait.
        """
        if not self.ready:
            raise HvHostError(
                "The guest takes no key-value pairs (yet): its driver hv_utils and its daemon "
                "hv_kvp_daemon must both run; start them or wait until it has booted."
            )
        if len(self._queue) >= QUEUE_LIMIT:
            raise HvHostError(
                f"{QUEUE_LIMIT} key-value requests wait for the guest already; try again later."
            )
        self._queue.append(_Request(body, done, parse))
        self._send_next()

    def remember(self, pool: KvpPool, item: KvpItem) -> None:
        """Give *item* to every daemon that registers from now on, in place of one of its key.

        :class:`HvHostError` if that would be too many.
        """
        self.forget(pool, item.key)
        if len(self.state.host_items) >= HOST_ITEMS_LIMIT:
            raise HvHostError(
                f"The guest has {HOST_ITEMS_LIMIT} items of the host already; delete some."
            )
        self.state.host_items.append((pool, item))

    def forget(self, pool: KvpPool, key: str) -> None:
        """Undo :meth:`remember`."""
        self.state.host_items[:] = [
            each for each in self.state.host_items if (each[0], each[1].key) != (pool, key)
        ]

    def tick(self, now: float) -> None:
        """Give up on a request that waits too long; *now* in seconds on any steady clock."""
        request = self._current
        if request is None:
            return
        if request.deadline is None:  # sent since the last tick
            request.deadline = now + self._timeout
        elif now >= request.deadline:
            self._current = None
            request.done(
                HvHostError(
                    f"The guest did not answer a key-value request within {self._timeout:g} "
                    "seconds; see whether its hv_kvp_daemon runs."
                )
            )
            self._send_next()

    # For the channel.

    def opened(self, channel: Channel) -> None:
        self._conversation.opened(channel)

    def closed(self) -> None:
        self._conversation.closed()
        self._fail_all("The guest's key-value channel ended before the answer came; try again.")

    def received(self, packet: Packet) -> None:
        message = self._conversation.received(packet)
        if message is None:
            if self.ready:
                self._write_host_items()
            return
        request = self._current
        if request is None or request.transaction != message.transaction_id:
            logger.info("the guest answered a key-value request that was given up before")
        else:
            content: Content | None = None
            if message.status == HV_S_OK and request.parse is not None:
                content = request.parse(message.data)  # an error here ends in closed()
            self._current = None
            request.done(KvpAnswer(message.status, content))
        self._send_next()

    def _write_host_items(self) -> None:
        for pool, item in self.state.host_items:

            def written(answer: KvpAnswer | HvHostError, key: str = item.key) -> None:
                if isinstance(answer, HvHostError):
                    logger.warning("the guest was not given %r: %s", key, answer)
                elif not answer.ok:
                    logger.warning("the guest did not take %r: %s", key, answer.meaning)

            self._queue.append(_Request(set_message(pool, item.key, item.value), written))
        self._send_next()

    def _send_next(self) -> None:
        unanswered = self.state.conversation.unanswered
        while self._queue and self._current is None and self.ready:
            request = self._queue.popleft()
            if len(unanswered) >= UNANSWERED_LIMIT:
                request.done(
                    HvHostError(
                        f"The guest left the last {len(unanswered)} key-value requests "
                        "unanswered; restart its hv_kvp_daemon or the guest."
                    )
                )
                continue
            self._current = request  # a channel that fails now ends in closed()
            request.transaction = self._conversation.request(request.body)

    def _fail_all(self, why: str) -> None:
        requests = list(self._queue)
        if self._current is not None:
            requests.insert(0, self._current)
        self._queue.clear()
        self._current = None
        for request in requests:
            request.done(HvHostError(why))
