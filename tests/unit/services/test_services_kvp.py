"""Key-value exchange against a guest's driver and daemon, good and bad."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from hvhost.errors import HvHostError
from hvhost.machine.model import IpSettings, KvpPool
from hvhost.services import kvp_protocol as protocol
from hvhost.services.kvp import (
    HOST_ITEMS_LIMIT,
    QUEUE_LIMIT,
    TIMEOUT,
    UNANSWERED_LIMIT,
    Kvp,
    KvpAnswer,
)
from hvhost.services.kvp_protocol import KvpItem, KvpOperation
from hvhost.vmbus.channel import ChannelState
from simulated.driver import SimulatedGuest
from simulated.kvp_daemon import BODY, Daemon

LINUX = [(4, 0), (3, 0), (1, 0)]
EXTERNAL, GUEST, AUTO_EXTERNAL = KvpPool.EXTERNAL, KvpPool.GUEST, KvpPool.AUTO_EXTERNAL


class Exchange:
    """A key-value device on a bus."""

    def __init__(self, *items: tuple[KvpPool, KvpItem]) -> None:
        self.guest = SimulatedGuest()
        self.device = Kvp(items)
        self.host = self.guest.server.add_device(self.device)
        self.guest.connect()
        self.daemon = Daemon(self.guest.open(1), LINUX)
        self.heard: list[KvpAnswer | HvHostError] = []

    def boot(self) -> Exchange:
        while self.daemon.run():
            pass
        return self

    def ask(self, body: bytes, parse: Any = None) -> Any:
        """Send one request and answer it."""
        self.device.request(body, self.heard.append, parse)
        self.boot()
        return self.heard[-1]

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            self.device.request(protocol.enumerate_message(GUEST, 0), self.heard.append)

    @property
    def said(self) -> list[str]:
        return [str(each) for each in self.heard]


def test_the_service_is_ready_once_the_daemon_is() -> None:
    exchange = Exchange()
    assert not exchange.device.ready
    with pytest.raises(HvHostError, match="hv_kvp_daemon must both run"):
        exchange.send()
    exchange.boot()
    assert exchange.device.ready and exchange.device.state.conversation.version == (4, 0)


def test_items_go_both_ways() -> None:
    exchange = Exchange().boot()
    assert exchange.ask(protocol.set_message(EXTERNAL, "städte", "東京 🗼")).ok
    assert exchange.daemon.pools[0] == {"städte": "東京 🗼"}
    exchange.daemon.pools[1]["from"] = "guest"
    answer = exchange.ask(protocol.enumerate_message(GUEST, 0), protocol.parse_enumerate)
    assert answer == KvpAnswer(0, KvpItem("from", "guest"))
    answer = exchange.ask(protocol.get_message(GUEST, "from"), protocol.parse_get)
    assert answer == KvpAnswer(0, KvpItem("from", "guest"))
    assert exchange.ask(protocol.delete_message(GUEST, "from")).ok
    assert exchange.daemon.pools[1] == {}
    answer = exchange.ask(protocol.delete_message(GUEST, "from"))
    assert (answer.ok, answer.content) == (False, None)
    assert answer.meaning == "it has no such item"
    assert KvpAnswer(5).meaning == "error 0x00000005"


def test_an_unknown_adapter_is_said_so() -> None:
    exchange = Exchange().boot()
    settings = IpSettings("{00000000-0000-0000-0000-000000000001}", addresses="192.0.2.1")
    answer = exchange.ask(
        protocol.ip_message(KvpOperation.SET_IP_INFO, settings), protocol.parse_ip
    )
    assert answer.status == 0x80041002
    assert answer.meaning == "it has no such network adapter"
    assert len(exchange.daemon.requests[0][1]) >= 7428


def test_the_hosts_items_are_given_to_every_new_daemon() -> None:
    items = [(AUTO_EXTERNAL, KvpItem(f"key{number}", f"{number}")) for number in range(20)]
    exchange = Exchange(*items).boot()
    wanted = {item.key: item.value for _, item in items}
    assert exchange.daemon.pools[3] == wanted
    exchange.device.remember(EXTERNAL, KvpItem("role", "web"))
    exchange.device.remember(EXTERNAL, KvpItem("role", "db"))
    exchange.device.forget(AUTO_EXTERNAL, "key0")
    del wanted["key0"]
    exchange.guest.close(1)
    exchange.daemon = Daemon(exchange.guest.open(1), LINUX)
    exchange.boot()
    assert exchange.daemon.pools[3] == wanted and exchange.daemon.pools[0] == {"role": "db"}
    assert len(exchange.device.state.host_items) == 20


def test_the_hosts_items_are_given_again_at_every_boot() -> None:
    exchange = Exchange((AUTO_EXTERNAL, KvpItem("a", "b"))).boot()
    exchange.device.remember(EXTERNAL, KvpItem("role", "web"))
    exchange.guest.server.reset()
    assert not exchange.device.ready
    guest = SimulatedGuest()  # another computer, the same machine
    guest.server.add_device(exchange.device)
    guest.connect()
    daemon = Daemon(guest.open(1), LINUX)
    while daemon.run():
        pass
    assert daemon.pools[3] == {"a": "b"} and daemon.pools[0] == {"role": "web"}


def test_the_hosts_items_are_not_without_number() -> None:
    device = Kvp((EXTERNAL, KvpItem(str(number), "")) for number in range(HOST_ITEMS_LIMIT))
    with pytest.raises(HvHostError, match="items of the host already"):
        device.remember(EXTERNAL, KvpItem("more", ""))
    device.remember(EXTERNAL, KvpItem("1", "changed"))


def test_a_daemon_that_refuses_the_hosts_items_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exchange = Exchange((AUTO_EXTERNAL, KvpItem("a", "b")), (AUTO_EXTERNAL, KvpItem("c", "d")))
    while exchange.daemon.run(status=0x80004005):
        pass
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the guest did not take 'a'",
        "the guest did not take 'c'",
    ]
    assert exchange.ask(protocol.enumerate_message(GUEST, 0)).status == 0x80070103


def test_a_guest_of_other_versions_is_not_given_the_hosts_items(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest = SimulatedGuest()
    device = Kvp([(AUTO_EXTERNAL, KvpItem("a", "b"))])
    guest.server.add_device(device)
    guest.connect()
    daemon = Daemon(guest.open(1), [(9, 9)])
    while daemon.run():
        pass
    guest.close(1)
    assert not device.ready and not guest.faults
    assert caplog.messages == ["the guest speaks no version of the kvp service we know"]


def test_only_one_request_is_under_way() -> None:
    exchange = Exchange().boot()
    exchange.send(10)
    for number in range(10):
        assert len(exchange.device.state.conversation.unanswered) == 1
        assert len(exchange.heard) == number
        assert exchange.daemon.run() == 1
    assert exchange.daemon.run() == 0


def test_the_queue_has_an_end() -> None:
    exchange = Exchange().boot()
    exchange.send(1 + QUEUE_LIMIT)
    with pytest.raises(HvHostError, match="wait for the guest already"):
        exchange.send()


def test_a_silent_daemon_loses_the_request_and_the_next_goes_on() -> None:
    exchange = Exchange().boot()
    exchange.send(2)
    exchange.device.tick(100.0)
    exchange.device.tick(100.0 + TIMEOUT - 0.1)
    assert exchange.heard == []
    exchange.device.tick(100.0 + TIMEOUT)
    assert len(exchange.heard) == 1 and "did not answer" in exchange.said[0]
    # The driver answers the first after all, then the second.
    assert exchange.daemon.run() == 1
    assert len(exchange.heard) == 1
    assert exchange.daemon.run() == 1
    assert exchange.heard[1] == KvpAnswer(0x80070103)
    assert not exchange.guest.faults


def test_ticks_without_a_request_do_nothing() -> None:
    exchange = Exchange().boot()
    for second in range(100):
        exchange.device.tick(float(second))
    assert exchange.daemon.run() == 0


def test_a_daemon_that_never_answers_is_asked_no_more_until_it_does() -> None:
    exchange = Exchange().boot()
    exchange.send(UNANSWERED_LIMIT + 3)
    now = 0.0
    for _ in range(2 * UNANSWERED_LIMIT):
        exchange.device.tick(now)
        now += TIMEOUT
    assert len(exchange.heard) == UNANSWERED_LIMIT + 3
    assert all("left the last 8" in each for each in exchange.said[UNANSWERED_LIMIT:])
    exchange.send()
    assert "left the last 8" in exchange.said[-1]
    assert len(exchange.device.state.conversation.unanswered) == UNANSWERED_LIMIT
    exchange.daemon.run()
    assert exchange.ask(protocol.enumerate_message(GUEST, 0)) == KvpAnswer(0x80070103)


def test_all_requests_end_with_the_channel() -> None:
    exchange = Exchange().boot()
    exchange.send(3)
    exchange.guest.close(1)
    assert len(exchange.heard) == 3 and all("channel ended" in each for each in exchange.said)
    exchange.daemon = Daemon(exchange.guest.open(1), LINUX)
    exchange.boot()
    assert exchange.ask(protocol.set_message(EXTERNAL, "a", "b")).ok


def test_a_request_over_a_broken_ring_is_told() -> None:
    exchange = Exchange().boot()
    exchange.daemon.channel.incoming.set_word(1, 4)
    exchange.send()
    assert exchange.host.state is ChannelState.FAULTED
    assert len(exchange.heard) == 1 and "channel ended" in exchange.said[0]


def test_a_ring_that_breaks_between_two_requests_loses_neither() -> None:
    exchange = Exchange().boot()
    exchange.send(2)
    (packet,) = exchange.daemon.channel.read()
    message = bytearray(packet.payload)
    message[25] = 5
    exchange.daemon.channel.incoming.set_word(1, 4)
    exchange.daemon.channel.write(bytes(message))
    assert exchange.host.state is ChannelState.FAULTED
    assert [type(each) for each in exchange.heard] == [KvpAnswer, HvHostError]


def reply(exchange: Exchange, at: dict[int, tuple[str, Any]], size: int | None = None) -> None:
    """Answer the request under way, changed as a bad guest would."""
    (packet,) = exchange.daemon.channel.read()
    message = bytearray(packet.payload)
    message[25] = 5
    for offset, (code, value) in at.items():
        struct.pack_into(code, message, offset, value)
    exchange.daemon.channel.write(bytes(message[:size]))


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ({18: ("<H", 100)}, "answered with 100 bytes"),
        ({18: ("<H", 0)}, "answered with 0 bytes"),
        ({18: ("<H", 60000)}, "announces 60000 bytes"),
        ({BODY + 12: ("<I", 513)}, "a key of 513 and"),
        ({BODY + 12: ("<I", 0xFFFFFFD6)}, "a key of 4294967254 and"),
        ({BODY + 16: ("<I", 2049)}, "a value of 2049 bytes"),
        ({BODY + 8: ("<I", 3)}, "unknown type 3"),
        ({24: ("B", 77)}, "answers no request"),
        ({12: ("<H", 1)}, "message 1 while ready"),
    ],
)
def test_a_wrong_answer_faults_the_service_and_fails_the_request(
    at: dict[int, tuple[str, Any]], why: str
) -> None:
    exchange = Exchange().boot()
    exchange.device.request(
        protocol.enumerate_message(GUEST, 0), exchange.heard.append, protocol.parse_enumerate
    )
    reply(exchange, at)
    assert exchange.host.state is ChannelState.FAULTED
    assert len(exchange.guest.faults) == 1 and why in exchange.guest.faults[0]
    assert len(exchange.heard) == 1 and isinstance(exchange.heard[0], HvHostError)


def test_an_answer_with_an_error_is_not_looked_into() -> None:
    exchange = Exchange().boot()
    exchange.device.request(
        protocol.enumerate_message(GUEST, 0), exchange.heard.append, protocol.parse_enumerate
    )
    reply(exchange, {20: ("<I", 0x80004005), BODY + 12: ("<I", 0xFFFFFFD6)})
    assert exchange.heard == [KvpAnswer(0x80004005)] and not exchange.guest.faults


def test_an_unasked_answer_faults_the_service() -> None:
    exchange = Exchange().boot()
    header = struct.pack("<IIHHHHHHIBBH", 1, 2600, 3, 0, 2, 4, 0, 2580, 0, 9, 5, 0)
    exchange.daemon.channel.write(header + bytes(2580))
    assert "answers no request" in exchange.guest.faults[0]
