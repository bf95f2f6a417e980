"""Key-value exchange for callers that wait: whole pools, single items, network settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from hvhost.errors import HvHostError
from hvhost.machine.model import IpSettings, KvpPool, KvpRecord
from hvhost.services import kvp_protocol as protocol
from hvhost.services.kvp import TIMEOUT, Content, Kvp, KvpAnswer
from hvhost.services.kvp_protocol import HV_S_CONT, KvpItem, KvpOperation

#: Items a pool may have: an enumeration that never ends must end somewhere.
MAXIMUM_ITEMS = 1024
#: Pools whose items the guest is given again whenever its daemon registers anew.
HOST_POOLS = (KvpPool.EXTERNAL, KvpPool.AUTO_EXTERNAL)
#: Seconds a caller waits: its own request, and those in the queue before it.
_WAIT_SECONDS = 3 * TIMEOUT


class KvpExchange:
    """The guest's pools through *device*, which *lock* protects.

    All methods wait for the guest, on any thread but the loop's, and raise :class:`HvHostError`.
    """

    def __init__(self, device: Kvp, lock: threading.RLock) -> None:
        self._device, self._lock = device, lock

    def items(self, pool: KvpPool | None) -> list[KvpRecord]:
        """All items of *pool*, or of all pools."""
        pools = tuple(KvpPool) if pool is None else (pool,)
        return [
            KvpRecord(each, item.key, item.value) for each in pools for item in self._items(each)
        ]

    def get(self, pool: KvpPool | None, key: str) -> KvpRecord:
        """One item; the first pool that has it, if *pool* is ``None``."""
        for each in tuple(KvpPool) if pool is None else (pool,):
            value = self._value(each, key)
            if value is not None:
                return KvpRecord(each, key, value)
        where = "any pool" if pool is None else f"pool {pool}"
        raise HvHostError(f"The guest has no item {key!r} in {where}; list what it has.")

    def set(self, pool: KvpPool, key: str, value: str) -> None:
        """Add or change an item."""
        if pool is KvpPool.AUTO:
            raise HvHostError(
                "Pool auto holds what the guest's daemon finds out itself and takes no items; "
                "choose another pool."
            )
        answer = self._ask(protocol.set_message(pool, key, value))
        if not answer.ok:
            raise HvHostError(f"The guest did not take the item {key!r}: {answer.meaning}.")
        if pool in HOST_POOLS:
            with self._lock:
                self._device.remember(pool, KvpItem(key, value))

    def delete(self, pool: KvpPool, key: str) -> None:
        """Remove an item."""
        answer = self._ask(protocol.delete_message(pool, key))
        with self._lock:
            self._device.forget(pool, key)
        if not answer.ok:
            raise HvHostError(
                f"The guest did not delete the item {key!r} of pool {pool}: {answer.meaning}."
            )

    def ip_settings(self, adapter: str) -> IpSettings:
        """The addresses of the adapter with this MAC address."""
        message = protocol.ip_message(KvpOperation.GET_IP_INFO, IpSettings(adapter))
        answer = self._ask(message, protocol.parse_ip)
        if not isinstance(answer.content, IpSettings):
            raise HvHostError(
                f"The guest does not tell the addresses of {adapter}: {answer.meaning}."
            )
        return answer.content

    def set_ip(self, settings: IpSettings) -> None:
        """Have the guest configure an adapter, named by its instance GUID in braces."""
        answer = self._ask(protocol.ip_message(KvpOperation.SET_IP_INFO, settings))
        if not answer.ok:
            raise HvHostError(
                f"The guest did not configure adapter {settings.adapter}: {answer.meaning}."
            )

    def _items(self, pool: KvpPool) -> Iterator[KvpItem]:
        for index in range(MAXIMUM_ITEMS):
            message = protocol.enumerate_message(pool, index)
            answer = self._ask(message, protocol.parse_enumerate)
            if answer.status == HV_S_CONT:
                return
            if not isinstance(answer.content, KvpItem):
                raise HvHostError(f"The guest does not list its pool {pool}: {answer.meaning}.")
            yield answer.content
        raise HvHostError(
            f"The guest names more than {MAXIMUM_ITEMS} items in pool {pool}; delete some in it."
        )

    def _value(self, pool: KvpPool, key: str) -> str | None:
        # What the guest's daemon finds out itself can only be enumerated.
        if pool is not KvpPool.AUTO:
            answer = self._ask(protocol.get_message(pool, key), protocol.parse_get)
            if answer.status == HV_S_CONT:
                return None
            if not isinstance(answer.content, KvpItem):
                raise HvHostError(f"The guest does not give the item {key!r}: {answer.meaning}.")
            if answer.content.value:
                return answer.content.value
        # Linux's driver forgets to say how much room a value has: its daemon then gives none.
        return next((item.value for item in self._items(pool) if item.key == key), None)

    def _ask(self, body: bytes, parse: Callable[[bytes], Content] | None = None) -> KvpAnswer:
        answered = threading.Event()
        result: list[KvpAnswer | HvHostError] = []

        def done(answer: KvpAnswer | HvHostError) -> None:
            result.append(answer)
            answered.set()

        with self._lock:
            self._device.request(body, done, parse)
        if not answered.wait(_WAIT_SECONDS):
            raise HvHostError(
                "The guest is too slow with its key-value requests; see whether it hangs."
            )
        if isinstance(result[0], HvHostError):
            raise result[0]
        return result[0]
