"""What FreeBSD's driver does otherwise than Linux's, played through in its order.

Source: ``sys/dev/hyperv/vmbus/vmbus.c`` and ``vmbus_chan.c`` of FreeBSD 14.2. How it finds the bus
and its processor is told by the tests of ACPI, CPUID and PVH.
"""

from __future__ import annotations

import struct

import pytest

from hvhost.partition.hypercall import Hypercalls
from hvhost.vmbus.protocol import (
    AllOffersDelivered,
    InitiateContact,
    OfferChannel,
    RequestOffers,
    VersionResponse,
)
from simulated.devices import Echo, an_offer
from simulated.driver import SimulatedGuest

EVENT_FLAGS, MONITOR_1, MONITOR_2 = 0x5000, 0x6000, 0x7000
PARAMETER = 0x8000


def a_guest(echoes: int = 1) -> SimulatedGuest:
    guest = SimulatedGuest()
    for number in range(1, echoes + 1):
        guest.server.add_device(Echo(guest.memory, an_offer(number)))
    guest.allocate(9)  # its own pages
    return guest


def attach(guest: SimulatedGuest, version: int = 0x40000) -> dict[int, OfferChannel]:
    """vmbus_connect() and vmbus_scan(): both wait without a time-out for their answers."""
    before = len(guest.port.messages)
    contact = InitiateContact(version, 0, EVENT_FLAGS, MONITOR_1, MONITOR_2)
    guest.post(contact, connection_id=1)
    assert [type(message) for _, message in guest.port.messages[before:]] == [VersionResponse]
    guest.post(RequestOffers(), connection_id=1)
    offers = [message for _, message in guest.port.messages[before + 1 :]]
    assert isinstance(offers.pop(), AllOffersDelivered), "that is the last of them"
    assert all(isinstance(offer, OfferChannel) for offer in offers)
    guest._seen = before
    guest.collect_offers()
    return guest.offers


@pytest.mark.parametrize("echoes", [0, 1, 3])
def test_its_attachment_never_waits_in_vain(echoes: int) -> None:
    assert len(attach(a_guest(echoes))) == echoes


@pytest.mark.parametrize(
    ("offered", "taken"),
    [([0x40000], 0x40000), ([0x60000, 0x30000], 0x30000), ([0x20004], 0x20004)],
)
def test_it_takes_the_newest_version_it_shares(offered: list[int], taken: int) -> None:
    """It tries one after another, 4.0 first, and never one above it."""
    guest = a_guest()
    for version in offered:
        contact = InitiateContact(version, 0, EVENT_FLAGS, MONITOR_1, MONITOR_2)
        guest.post(contact, connection_id=1)
        (answer,) = (m for _, m in guest.port.messages if isinstance(m, VersionResponse))
        guest.port.messages.clear()
        assert bool(answer.version_supported) == (version == taken)
        if answer.version_supported:
            assert answer.msg_conn_id == 1
    assert guest.faults == []


def test_no_channel_asks_for_a_monitor_page() -> None:
    """Offered without one, its ``ch_flags`` lack HASMNF: it signals by hypercall alone."""
    guest = a_guest(2)
    for offer in attach(guest).values():
        assert (offer.monitorid, offer.monitor_allocated) == (0, 0)
        assert offer.is_dedicated_interrupt == 1
    for page in (EVENT_FLAGS, MONITOR_1, MONITOR_2):
        assert guest.memory.read(page, 4096) == bytes(4096), "nor does the host touch its pages"


def test_it_signals_by_a_parameter_in_memory() -> None:
    guest = a_guest()
    attach(guest)
    channel = guest.open(1)
    calls = Hypercalls(
        guest.memory, guest.server.post_message, guest.server.signal, lambda address, size: None
    )
    # struct hypercall_sigevt_in: connection id, event flag offset, reserved.
    guest.memory.write(PARAMETER, struct.pack("<IHH", channel.offer.connection_id, 0, 0))
    channel.write(b"ping", transaction_id=5, signal=False)
    assert calls.call(0x5D, PARAMETER) == 0
    (answer,) = channel.read()
    assert (answer.transaction_id, answer.payload[:4]) == (5, b"ping")
    assert guest.port.interrupts == [(0, 1)]
    assert guest.memory.read(EVENT_FLAGS, 4096) == bytes(4096)
